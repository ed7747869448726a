"""DualPrompt (Wang et al., ECCV 2022): a general prompt for all tasks and an expert prompt with a key for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.backbones import BlockExtras, PromptedViT
from cl_platform.batch import Batch, constant
from cl_platform.config import setting
from cl_platform.random_streams import RUN_LEVEL, stream
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.base import Component, Context, Needs, ParameterGroup, Step, Strategy
from cl_platform.strategies.prompting import check_layers, cosines, largest, learning_order, uniform

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class DualPromptConfig:
    """Keys of ``dual_prompt``; G and E as in the paper."""

    g_length: int = setting(5, doc="rows that the G-prompt adds to keys and to values; 0 switches it off", min=0)
    g_layers: list[int] = setting(factory=lambda: [0, 1], doc="blocks that receive the G-prompt")
    e_length: int = setting(5, doc="rows that an E-prompt adds to keys and to values; 0 switches them off", min=0)
    e_layers: list[int] = setting(factory=lambda: [2, 3, 4], doc="blocks that receive the E-prompt")
    pull: float = setting(1.0, doc="lambda, weight of the term that draws a task's key to its queries", min=0)
    copy_previous: bool = setting(True, doc="a task's E-prompt starts from the previous task's")
    isolated: bool = setting(False, doc="train the G-prompt on the first task only, and copy no E-prompt")


@strategies.register("dual_prompt")
class DualPrompt(Strategy):
    """Prefixes for a frozen ViT: ``g_prompt``, trained in every task, and one E-prompt and key per task.

    Training rows use the E-prompt of their own task (replayed ones included); at test an image uses that of the
    nearest key among the tasks learnt so far. Cross-entropy over the task's classes trains the prompts, and
    ``-pull * mean cos(query, own key)`` the key. In a block of both lists the rows of G stand before those of E.
    The released code also lets random keys of tasks not yet learnt compete, and ports of it mix rows of different
    images; neither is done here.
    """

    name = "dual_prompt"
    Config = DualPromptConfig
    needs = Needs(prompts=True)
    owns = frozenset({"features", "classification", "trainable"})
    query = "beside"
    leaks = frozenset({"L-01", "L-02"})

    def __init__(self, config: DualPromptConfig) -> None:
        super().__init__(config)
        self.e_prompt = Slots(parameters=("prefix", "key"))
        self.trained = Slots(buffers=("order",))
        self._current = -1
        self._head_rows: list[nn.Parameter] = []
        shared = {"L-01"} if config.g_length and config.g_layers else set()
        copied = {"L-02"} if config.copy_previous and config.e_length and config.e_layers else set()
        self.leaks = frozenset() if config.isolated else frozenset(shared | copied)  # type: ignore[misc]

    def attach(self, context: Context) -> None:
        """Create the G-prompt.

        Raises:
            UserError: a list names a block that is not there, or names one twice.
        """
        super().attach(context)
        config, vit = self.config, cast(PromptedViT, context.backbone)
        check_layers("strategy.dual_prompt.g_layers", config.g_layers, context)
        check_layers("strategy.dual_prompt.e_layers", config.e_layers, context)
        generator = stream(context.seed, RUN_LEVEL, "dual_prompt_init")
        shape = (len(config.g_layers), 2, config.g_length, vit.attention_width)
        self.g_prompt = nn.Parameter(uniform(shape, generator, next(vit.parameters()).device))

    def begin_task(self, task: Task) -> None:
        """Add the task's E-prompt, a copy of the previous task's if wanted, and a fresh key."""
        self._current = task.task_id
        self._head_rows = self.context.head.parameters_for(task.classes)
        if task.task_id in self.trained:
            return
        config, vit, device = self.config, cast(PromptedViT, self.context.backbone), self.g_prompt.device
        generator = stream(self.context.seed, task.task_id, "dual_prompt_init")
        key = uniform((vit.feature_dim,), generator, device)
        prefix = uniform((len(config.e_layers), 2, config.e_length, vit.attention_width), generator, device)
        earlier = learning_order(self.trained)
        kept = [task_id for task_id in earlier if task_id in self.e_prompt]
        if config.copy_previous and not config.isolated and kept:
            prefix = self.e_prompt.get(kept[-1], "prefix").detach()
        self.e_prompt.add(task.task_id, prefix=prefix, key=key)
        self.trained.add(task.task_id, order=torch.tensor(len(earlier), device=device))

    def trainable(self) -> Iterator[ParameterGroup]:
        """The task's E-prompt and key, the head rows of its classes, and the G-prompt unless it is closed."""
        own = list(self.e_prompt.parameters_of(self._current).values())
        if not self.config.isolated or learning_order(self.trained)[0] == self._current:
            own.append(self.g_prompt)
        yield ParameterGroup([p for p in own if p.numel()] + self._head_rows)

    def _stacked(self, part: str) -> Tensor:
        """A part of every E-prompt (tasks, ...), ascending task id; those of past tasks are frozen."""
        return torch.stack(self.e_prompt.all(part))

    @torch.no_grad()
    def select(self, batch: Batch) -> Tensor:
        """Row (B,) among the ascending tasks: in training an image's own task where it has one, else the nearest
        key's."""
        nearest = largest(cosines(batch.extra["query"], self._stacked("key")), 1)[:, 0]
        if not self.training:
            return nearest
        ids = constant(self.e_prompt.task_ids, batch.task_ids.device)
        own = batch.task_ids[:, None] == ids  # (B, tasks)
        return torch.where(own.any(dim=1), own.int().argmax(dim=1), nearest)

    def prefixes(self, batch: Batch) -> dict[int, Tensor]:
        """Block -> (1 or B, 2, rows, D), index 0 of the second axis for keys and 1 for values."""
        found = {number: self.g_prompt[i][None] for i, number in enumerate(self.config.g_layers)}
        if not self.e_prompt.task_ids:
            return found
        expert = self._stacked("prefix")[self.select(batch)]  # (B, layers, 2, L, D)
        for i, number in enumerate(self.config.e_layers):
            rows = expert[:, i]
            if number in found:
                rows = torch.cat((found[number].expand(batch.labels.shape[0], -1, -1, -1), rows), dim=2)
            found[number] = rows
        return found

    def forward(self, batch: Batch) -> Tensor:
        """Features (B, D) of the trunk with each image's prefixes."""
        vit = cast(PromptedViT, self.context.backbone)
        extras = {number: BlockExtras(kv=(rows[:, 0], rows[:, 1])) for number, rows in self.prefixes(batch).items()}
        tokens, start = self.context.embed(batch)
        return vit.readout(vit.finish(vit.run(tokens, start, extras=extras)))

    def first_block(self) -> int | None:
        """The first block with prefixes."""
        return min([*self.config.g_layers, *self.config.e_layers], default=None)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy over the task's own classes, and the pull of the task's key towards the queries."""
        query, key = step.batch.extra["query"], self._stacked("key")[self.select(step.batch)]  # (B, D) each
        with torch.autocast(device_type=query.device.type, enabled=False):
            similarity = F.cosine_similarity(query.float(), key.float(), dim=1)  # (B,)
        return {
            "ce": step.cross_entropy(),
            "pull": -self.config.pull * similarity.mean(),
        }

    def components(self) -> Iterator[Component]:
        """The G-prompt belongs to the tasks it was trained on; an E-prompt also to those it was copied from or
        trained beside."""
        order = learning_order(self.trained)
        shaped_g = order[:1] if self.config.isolated else sorted(order)
        yield Component("g_prompt", tuple(shaped_g), "prompt", {"g_prompt": self.g_prompt.detach()})
        yield Component("trained", tuple(sorted(order)), "lineage", dict(self.trained.state_dict()))
        for task_id in self.e_prompt.task_ids:
            tensors = dict(self.e_prompt.tasks[str(task_id)].state_dict())
            yield Component(f"e_prompt.tasks.{task_id}", self._e_tasks(order, task_id), "prompt", tensors)

    def _e_tasks(self, order: list[int], task_id: int) -> tuple[int, ...]:
        shared = self.g_prompt.numel() > 0
        if not self.config.isolated and (shared or self.config.copy_previous):
            return tuple(sorted(order[: order.index(task_id) + 1]))
        return tuple(sorted({order[0], task_id} if shared else {task_id}))

    def apart(self, task_id: int) -> bool:
        """With ``isolated`` every task is but the first, whose G-prompt all others are trained with."""
        order = learning_order(self.trained)
        first = self.config.isolated and self.g_prompt.numel() > 0 and order[:1] == [task_id]
        return super().apart(task_id) and not first

    def drop_task(self, task_id: int) -> None:
        """Remove the task's E-prompt and key. What was learnt from the task elsewhere stays, and so does its record."""
        self.e_prompt.drop(task_id)
        if self.apart(task_id):
            self.trained.drop(task_id)
            for place, other in enumerate(learning_order(self.trained)):
                self.trained.set(other, "order", torch.tensor(place, device=self.g_prompt.device))

    def let_go(self) -> None:
        """See :class:`Strategy`."""
        self._head_rows = []
