"""L2P with adapters for prompts (Wistuba et al. 2024, "Choice of PEFT Technique in Continual Learning")."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_platform.backbones.prefix import BlockExtras
from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, stream
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.adapters import AdapterStrategy, LoRAConfig, note_order, tasks_until
from cl_platform.strategies.base import Component, Context, Needs, Step
from cl_platform.strategies.l2p import votes
from cl_platform.strategies.prompting import cosines, largest

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

log = logging.getLogger("cl_platform")
KEY = "key"
CROWDED = 0.9
"""Share of the images above which one adapter is picked by too many."""


@dataclass(frozen=True)
class L2PLoRAConfig(LoRAConfig):
    """Keys of ``l2p_lora``."""

    rank: int = setting(4, doc="r, rank of an adapter of the pool", min=1)
    alpha: float = setting(4.0, doc="adapters count alpha/rank", above=0)
    pool_size: int = setting(10, doc="P, adapters of the pool", min=1)
    top_k: int = setting(2, doc="k, adapters that an image picks; their sum has rank k * r", min=1)
    pull: float = setting(0.5, doc="lambda, weight of the term that draws picked keys to the queries", min=0)


@strategies.register("l2p_lora")
class L2PLoRA(AdapterStrategy):
    """The ``top_k`` adapters whose keys are nearest in angle to the image's query act on it, as their sum.

    All tasks share one pool. The query is the plain trunk's feature; every image picks for itself, in training too.
    The loss adds ``pull * mean over images of the sum of 1 - cos(query, picked key)``, whose gradient reaches the keys
    alone. An adapter and key that no image of a step picked keep their bits in it: the optimizer's memory of earlier
    gradients would move them otherwise.
    """

    name = "l2p_lora"
    Config = L2PLoRAConfig
    needs = Needs(prompts=True, boundaries=False)
    query = "beside"
    leaks = frozenset({"L-01", "L-13"})

    def __init__(self, config: L2PLoRAConfig) -> None:
        super().__init__(config)
        self.pool = nn.ParameterDict()
        self.usage = Slots(buffers=("count",))
        self.trained = Slots(buffers=("order",))
        self._before: dict[str, Tensor] = {}
        self._used: Tensor | None = None

    def attach(self, context: Context) -> None:
        """Draw the pool.

        Raises:
            UserError: more adapters to pick than there are; a target or a block that is not there.
        """
        super().attach(context)
        config = self.config
        if config.top_k > config.pool_size:
            raise UserError(
                "strategy.l2p_lora.top_k", config.top_k, f"must be at most the pool's {config.pool_size} adapters",
                "Lower it, or raise strategy.l2p_lora.pool_size",
            )  # fmt: skip
        first = [self.layout.first(context.seed, RUN_LEVEL, index) for index in range(config.pool_size)]
        for name in first[0]:
            self.pool[name] = nn.Parameter(torch.stack([module[name] for module in first]))  # (P, blocks, ...)
        shape = (config.pool_size, context.backbone.feature_dim)
        drawn = 2 * torch.rand(shape, generator=stream(context.seed, RUN_LEVEL, "l2p_lora/key")) - 1
        self.pool[KEY] = nn.Parameter(drawn.to(next(context.backbone.parameters()).device))

    def begin_task(self, task: Task) -> None:
        """Note that the pool is trained on this task."""
        super().begin_task(task)
        device = self.pool[KEY].device
        self._used, self._before = None, {}
        if note_order(self.trained, task.task_id, device):
            count = torch.zeros(self.config.pool_size, dtype=torch.int64, device=device)
            self.usage.add(task.task_id, count=count)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The whole pool, keys included."""
        return list(self.pool.values())

    @torch.no_grad()
    def select(self, batch: Batch) -> Tensor:
        """Ids (B, k) of the adapters that each image picks; of equal keys the lower id first."""
        return largest(cosines(batch.extra["query"], self.pool[KEY]), self.config.top_k)

    def extras(self, batch: Batch) -> Mapping[int, BlockExtras]:
        """Each image's own adapters."""
        factors = {name: tensor for name, tensor in self.pool.items() if name != KEY}
        return self.layout.extras(factors, self.select(batch))

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy over the task's own classes, and the pull of picked keys towards the queries."""
        similarity = cosines(step.batch.extra["query"], self.pool[KEY])  # (B, P)
        self._picked = self.select(step.batch)
        for each in step.passes:
            self._note(self.select(each.batch))
        pulled = (1 - similarity.gather(1, self._picked)).sum(dim=1)
        return {**super().losses(step), "pull": self.config.pull * pulled.mean()}

    def _note(self, picked: Tensor) -> None:
        used = torch.zeros(self.config.pool_size, dtype=torch.bool, device=picked.device)
        used[picked.flatten()] = True
        self._used = used if self._used is None else self._used | used

    def after_backward(self, step: Step) -> None:
        """Keep what the update may not move."""
        self._before = {name: tensor.detach().clone() for name, tensor in self.pool.items()}

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
        """Put back adapters and keys that no image of the update picked."""
        for name, before in self._before.items():
            if self._used is not None:
                used = self._used.view(-1, *([1] * (before.dim() - 1)))
                self.pool[name].copy_(torch.where(used, self.pool[name], before))
        self._used, self._before = None, {}

    def after_batch(self, step: Step) -> None:
        """Count which adapters the task's images picked before the update moved the keys."""
        count = self.usage.get(step.task.task_id, "count")
        count += votes(self._picked, ~step.batch.is_replay, self.config.pool_size)

    def end_task(self, task: Task) -> None:
        """Say so where nearly every image picks the same adapter: it is no pool any more."""
        share = self.inspect()["most_picked_share"]
        if self.config.top_k < self.config.pool_size and share > CROWDED:
            log.warning("%s: one adapter was picked by %.0f %% of the images; see pull", self.name, 100 * share)

    def components(self) -> Iterator[Component]:
        """The pool belongs to every task it was trained on; a task's counts also to those that had moved the keys."""
        tasks = tuple(self.trained.task_ids)
        yield Component("pool", tasks, "adapter", dict(self.pool.state_dict()))
        yield Component("trained", tasks, "lineage", dict(self.trained.state_dict()))
        for task_id in self.usage.task_ids:
            tensors = {"count": self.usage.get(task_id, "count")}
            yield Component(f"usage.tasks.{task_id}", tasks_until(self.trained, task_id), "statistics", tensors)

    def drop_task(self, task_id: int) -> None:
        """Remove the task's counts. The pool keeps what it learnt from the task, so its lineage keeps the task."""
        self.usage.drop(task_id)

    def inspect(self) -> dict[str, Any]:
        """How often each adapter was picked in the training of each task, and the largest share of all picks."""
        usage = {t: self.usage.get(t, "count") for t in self.usage.task_ids}
        total = sum(usage.values(), torch.zeros(self.config.pool_size, device=self.pool[KEY].device))
        most = float(total.max() * self.config.top_k / total.sum().clamp_min(1))  # 1: every image picked it
        return {
            **super().inspect(),
            "usage": {str(t): count.tolist() for t, count in usage.items()},
            "most_picked_share": most,
        }
