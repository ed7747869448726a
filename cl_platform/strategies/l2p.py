"""L2P, Learning to Prompt (Wang et al., CVPR 2022): every image picks prompts from one pool that all tasks share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cl_platform.backbones import BlockExtras, PromptedViT
from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, stream
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.base import Component, Context, Needs, ParameterGroup, Step, Strategy
from cl_platform.strategies.prompting import cosines, largest, learning_order, uniform

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

READOUTS = ("prompt", "token", "token+prompt", "gap")


@dataclass(frozen=True)
class L2PConfig:
    """Keys of ``l2p``; symbols as in the paper."""

    pool_size: int = setting(10, doc="M, prompts of the pool; 0 switches prompts off", min=0)
    length: int = setting(10, doc="L, tokens of a prompt; 0 switches prompts off", min=0)
    top_k: int = setting(4, doc="prompts that an image picks", min=1)
    pull: float = setting(1.0, doc="lambda, weight of the term that draws picked keys to the queries", min=0)
    head_input: str = setting("prompt", doc="outputs averaged for the head", choices=READOUTS)
    selection: str = setting("per_sample", doc="who picks in training", choices=("per_sample", "batch_majority"))
    prompt_mask: bool = setting(False, doc="train task t with prompts t*k..(t+1)*k-1 where the pool has them")
    copy_previous: bool = setting(True, doc="with prompt_mask: a task's prompts start from the previous task's",
                                  only_with=("prompt_mask", (True,)))  # fmt: skip
    prompt_pos_embed: bool = setting(False, doc="add the class token's position to prompts, as ports of the code do")


@strategies.register("l2p")
class L2P(Strategy):
    """The ``top_k`` prompts whose keys are nearest in angle to the image's query enter a frozen ViT as tokens.

    The query is the unprompted trunk's feature. Prompts go in before block 0, after positions were added, and the
    head reads the mean of their outputs. Pool and keys are trained in every task: prompts by cross-entropy over the
    task's classes, keys by ``-pull * mean over images of the sum of cos(query, picked key)``. The released code lets
    the batch vote for its prompts, at test time too; here every image picks for itself, and
    ``selection=batch_majority`` lets the batch vote in training alone.
    """

    name = "l2p"
    Config = L2PConfig
    needs = Needs(prompts=True, boundaries=False)
    owns = frozenset({"features", "classification", "trainable"})
    query = "beside"
    leaks = frozenset({"L-01", "L-13"})

    def __init__(self, config: L2PConfig) -> None:
        super().__init__(config)
        self.pool = nn.ParameterDict()
        self.usage = Slots(buffers=("count",))
        self.trained = Slots(buffers=("order",))

    def attach(self, context: Context) -> None:
        """Create the pool.

        Raises:
            UserError: more prompts to pick than there are, or a read-out or position that needs a class token.
        """
        super().attach(context)
        config, vit = self.config, cast(PromptedViT, context.backbone)
        if config.pool_size * config.length == 0:
            return
        if config.top_k > config.pool_size:
            raise UserError(
                "strategy.l2p.top_k", config.top_k, f"must be at most the pool's {config.pool_size} prompts",
                "Lower it, or raise strategy.l2p.pool_size",
            )  # fmt: skip
        if "token" in config.head_input and vit.vit.cls_token is None:
            raise UserError(
                "strategy.l2p.head_input", config.head_input, "there is no class token", "Use prompt or gap"
            )
        has_position = vit.vit.cls_token is not None and vit.vit.pos_embed is not None and not vit.vit.no_embed_class
        if config.prompt_pos_embed and not has_position:
            raise UserError("strategy.l2p.prompt_pos_embed", True, "the class token has no position", "Set it to false")
        generator = stream(context.seed, RUN_LEVEL, "l2p_init")
        shapes = {"prompt": (config.pool_size, config.length, vit.width), "key": (config.pool_size, vit.feature_dim)}
        device = next(vit.parameters()).device
        for part, shape in shapes.items():
            self.pool[part] = nn.Parameter(uniform(shape, generator, device))

    def begin_task(self, task: Task) -> None:
        """Note that the pool is trained on this task; with a mask, start its prompts from the previous ones."""
        self._head_rows = self.context.head.parameters_for(task.classes)
        if not self.pool or task.task_id in self.trained:
            return
        earlier, k, prompt = learning_order(self.trained), self.config.top_k, self.pool["prompt"]
        if self.config.prompt_mask and self.config.copy_previous and earlier:
            start, source = task.task_id * k, earlier[-1] * k
            if max(start, source) + k <= self.config.pool_size:
                with torch.no_grad():
                    prompt[start : start + k] = prompt[source : source + k].clone()
        self.usage.add(task.task_id, count=torch.zeros(self.config.pool_size, dtype=torch.int64, device=prompt.device))
        self.trained.add(task.task_id, order=torch.tensor(len(earlier), device=prompt.device))

    def trainable(self) -> Iterator[ParameterGroup]:
        """The whole pool and the head rows of the task's classes."""
        yield ParameterGroup(list(self.pool.values()) + self._head_rows)

    @torch.no_grad()
    def select(self, batch: Batch) -> Tensor:
        """Ids (B, k) of the prompts of each image; ``selection`` and ``prompt_mask`` act on training rows only."""
        k, size = self.config.top_k, self.config.pool_size
        training = batch.task_ids[:, None] >= 0
        chosen = largest(cosines(batch.extra["query"], self.pool["key"]), k)
        if self.config.selection == "batch_majority":
            majority = largest(votes(chosen, training[:, 0], size)[None], k)  # (1, k)
            chosen = torch.where(training, majority, chosen)
        if self.config.prompt_mask:
            own = batch.task_ids[:, None] * k + torch.arange(k, device=chosen.device)  # (B, k)
            chosen = torch.where(training & (own[:, -1:] < size), own, chosen)
        return chosen

    def forward(self, batch: Batch) -> Tensor:
        """Features (B, D): the chosen read-out of the trunk with each image's prompts."""
        vit = cast(PromptedViT, self.context.backbone)
        tokens = vit.embed(batch.images)
        if not self.pool:
            return vit.readout(vit.finish(vit.run(tokens)))
        prompts = self.pool["prompt"][self.select(batch)].flatten(1, 2)  # (B, k * L, D)
        if self.config.prompt_pos_embed:
            prompts = prompts + vit.vit.pos_embed[:, :1]
        tokens = vit.finish(vit.run(tokens, extras={0: BlockExtras(tokens=prompts)}))
        return vit.readout(tokens, prompts.shape[1], self.config.head_input)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy over the task's own classes, and the pull of picked keys towards the queries."""
        terms = {"ce": step.cross_entropy()}
        if self.pool:
            similarity = cosines(step.batch.extra["query"], self.pool["key"])  # (B, M)
            self._picked = self.select(step.batch)
            picked = similarity.gather(1, self._picked).sum(dim=1)
            terms["pull"] = -self.config.pull * picked.mean()
        return terms

    def after_batch(self, step: Step) -> None:
        """Count which prompts the task's images picked before the update moved the keys."""
        if self.pool:
            count = self.usage.get(step.task.task_id, "count")
            count += votes(self._picked, ~step.batch.is_replay, self.config.pool_size)

    def components(self) -> Iterator[Component]:
        """The pool belongs to every task it was trained on; a task's counts also to those that had moved the keys."""
        order = learning_order(self.trained)
        if self.pool:
            yield Component("pool", tuple(sorted(order)), "prompt", dict(self.pool.state_dict()))
            yield Component("trained", tuple(sorted(order)), "lineage", dict(self.trained.state_dict()))
        for task_id in self.usage.task_ids:
            tasks = tuple(sorted(order[: order.index(task_id) + 1]))
            yield Component(f"usage.tasks.{task_id}", tasks, "statistics", {"count": self.usage.get(task_id, "count")})

    def drop_task(self, task_id: int) -> None:
        """Remove the task's counts. The pool keeps what it learnt from the task, so its lineage keeps the task."""
        self.usage.drop(task_id)

    def let_go(self) -> None:
        """See :class:`Strategy`."""
        self._head_rows = []

    def inspect(self) -> dict[str, Any]:
        """How often each prompt was picked in the training of each task."""
        return {"usage": {str(t): self.usage.get(t, "count").tolist() for t in self.usage.task_ids}}


def votes(chosen: Tensor, rows: Tensor, size: int) -> Tensor:
    """How often (size,) int64 each id stands in ``chosen`` (B, k), over those of the rows (B,) bool that count."""
    hits = chosen[:, :, None] == torch.arange(size, device=chosen.device)  # (B, k, size)
    return (hits & rows[:, None, None]).sum(dim=(0, 1))
