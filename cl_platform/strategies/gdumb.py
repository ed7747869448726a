"""GDumb (Prabhu et al., ECCV 2020): fill a balanced buffer, and learn from it alone when an answer is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import keys_below
from cl_platform.finetuning import STATISTICS, Finetuning
from cl_platform.heads import Head, cross_entropy
from cl_platform.memory.build import BufferConfig
from cl_platform.random_streams import RUN_LEVEL
from cl_platform.registry import buffer_policies, strategies
from cl_platform.scenarios import TaskLoader
from cl_platform.strategies.base import Context, Needs, ParameterGroup, Pass
from cl_platform.strategies.replay import Replay

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

WARM_UP = 0.1
"""Factor of the rate in the first pass."""


@dataclass(frozen=True)
class GDumbBufferConfig(BufferConfig):
    """Keys of its buffer."""

    policy: str = setting("greedy", choices=buffer_policies.names, doc="which examples stay")


@dataclass(frozen=True)
class GDumbConfig:
    """Keys of ``gdumb``."""

    fit: str = setting("every_task", doc="when the buffer is learnt: after every task, or at the end of the stream",
                       choices=("every_task", "end"))  # fmt: skip
    passes: int = setting(32, doc="passes over the buffer", min=0)
    batch_size: int = setting(16, doc="images of an update", min=1)
    lr: float = setting(0.05, doc="largest learning rate", above=0)
    min_lr: float = setting(5e-4, doc="smallest learning rate after the first pass", min=0)
    momentum: float = setting(0.9, doc="momentum of SGD", min=0, max=1)
    weight_decay: float = setting(1e-6, doc="decay of all parameters", min=0)
    clip: float | None = setting(10.0, doc="largest norm of the gradient", above=0)
    cutmix: float = setting(0.5, doc="probability that the images of an update are mixed", min=0, max=1)
    cutmix_alpha: float = setting(1.0, doc="both parameters of the beta distribution of the kept share", above=0)
    buffer: GDumbBufferConfig = setting(factory=GDumbBufferConfig, doc="the replay buffer")

    insert = "first_epoch"
    exclude_current = False
    sampler = "uniform"


@strategies.register("gdumb")
class GDumb(Replay):
    """Nothing is trained while images arrive; they are offered to the buffer once, in the stream's order.

    A fit sets backbone and head back to the weights with which the run began and trains all of them on the buffer. What
    it gives depends on the buffer's content and the run's seed alone: not on how many images were offered, nor on the
    order of the slots.
    """

    name = "gdumb"
    Config = GDumbConfig
    needs = Needs(gradient=False, alone=True)
    owns = frozenset({"buffer", "classification", "trainable"})
    leaks = frozenset({"L-10"})

    def attach(self, context: Context) -> None:
        """Make room for the buffer, and copy the initial weights."""
        super().attach(context)
        self._initial = {name: tensor.detach().clone() for name, tensor in context.backbone.state_dict().items()}

    @property
    def foresees(self) -> str:
        """The end, where it learns the buffer there alone."""
        return "end" if self.config.fit == "end" else "nothing"

    def further_updates(self, planned: Sequence[int]) -> list[int]:
        """Those of the fits if the buffer is full."""
        updates = self.config.passes * -(-self.buffer.capacity // self.config.batch_size)
        return [updates * self._fits_after(i, len(planned)) for i in range(len(planned))]

    def _fits_after(self, position: int, tasks: int) -> bool:
        return self.config.fit == "every_task" or position == tasks - 1 or position in self.context.ends

    def trainable(self) -> Iterator[ParameterGroup]:
        """Everything."""
        yield self.context.whole_network()

    def refine(self, task: Task) -> None:
        """Offer the task's images; fit the buffer if it is time to."""
        for batch in TaskLoader(task.train, task.task_id, self.context.batch_size, self.context.seed):
            with keys_below(f"strategy.{self.name}", "buffer"):
                self.buffer.insert(batch.images, batch.labels, batch.task_ids, batch.example_ids, 0)
        if self._fits_after(task.position, self.context.length):
            self.fit()

    def fit(self) -> None:
        """Begin anew, and learn the buffer."""
        self.reset()
        contents, config = self.buffer.contents, self.config
        rows = np.lexsort((contents.example_ids, contents.task_ids))  # by content, wherever the slots are
        updates = -(-len(rows) // config.batch_size)

        def batch(step: int) -> Batch:
            turn, place = divmod(step, updates)
            order = torch.randperm(len(rows), generator=plan.stream("shuffle", turn)).numpy()
            chosen = rows[order[place * config.batch_size : (place + 1) * config.batch_size]]
            held = self.buffer.read(chosen)
            draws = plan.stream("replay.augment", step)
            ready = self.context.prepare(held.images, held.labels, held.example_ids, held.task_ids, draws)
            return cutmixed(ready, config.cutmix, config.cutmix_alpha, plan.stream("cutmix", step))

        plan = Finetuning(
            purpose="gdumb_fit",
            seed=self.context.seed,
            task_id=RUN_LEVEL,
            number=0,
            steps=config.passes * updates,
            parameters=self._everything(),
            statistics=[b for n, b in self.context.backbone.named_buffers() if n.rpartition(".")[2] in STATISTICS],
            batch=batch,
            loss=self._loss,
            rate=restarting_rate(config.lr, config.min_lr, updates),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip=config.clip,
            key=f"strategy.{self.name}.lr",
        )
        self.context.run_finetuning(plan)

    def relearn(self, task_id: int) -> bool:
        """Learn what is left in the buffer, if a fit had been made: as if the task had never been offered.

        Returns:
            whether the buffer's rows of other tasks are what they would be without the task.
        """
        now = self.context.backbone.state_dict()
        if any(not torch.equal(first.to(now[name].device), now[name]) for name, first in self._initial.items()):
            self.fit()
        return not self.buffer.policy.shared

    def _everything(self) -> list[nn.Parameter]:
        """Everything, in an order that does not depend on that in which the tasks came."""
        blocks = self.context.head.blocks
        rows = [parameter for task_id in blocks.task_ids for parameter in blocks.parameters_of(task_id).values()]
        return [*self.context.backbone.parameters(), *rows]

    @torch.no_grad()
    def reset(self) -> None:
        """Backbone and head as they were when the run, or the head's rows, began."""
        self.context.backbone.load_state_dict(self._initial)
        head = self.context.head
        fresh = Head(head.feature_dim, head.seed, head.init)
        for task_id in head.blocks.task_ids:
            fresh.begin_task(task_id, head.blocks.get(task_id, "classes").tolist())
        head.load_state_dict(fresh.state_dict())

    def _loss(self, passed: Pass) -> Tensor:
        seen, extra = self.context.head.classes, passed.batch.extra
        loss = cross_entropy(passed.logits, passed.batch.labels, seen)
        if "other" not in extra:
            return loss
        share = extra["share"][0]
        return share * loss + (1 - share) * cross_entropy(passed.logits, extra["other"], seen)


def cutmixed(batch: Batch, probability: float, alpha: float, draws: torch.Generator) -> Batch:
    """A box of each image replaced by that of another of the batch (Yun et al., ICCV 2019), for all or for none.

    Args:
        batch: images (b, 3, H, W).
        probability: of mixing.
        alpha: the kept share is drawn from Beta(alpha, alpha).
        draws: decides all.

    Returns:
        where mixed, with the columns ``other`` (b,), labels of the box, and ``share`` (b,), the area that was kept.
    """
    if float(torch.rand((), generator=draws)) >= probability:
        return batch
    numbers = np.random.default_rng(int(torch.randint(2**62, (), generator=draws)))
    height, width = batch.images.shape[-2:]
    cut = math.sqrt(1 - numbers.beta(alpha, alpha))
    rows, columns = _span(height, cut, numbers), _span(width, cut, numbers)
    partner = torch.from_numpy(numbers.permutation(len(batch))).to(batch.labels.device)
    images = batch.images.clone()
    images[:, :, rows, columns] = batch.images[partner][:, :, rows, columns]
    kept = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    share = torch.full((len(batch),), kept, dtype=torch.float32, device=images.device)
    return batch.replace(images=images).with_extra(other=batch.labels[partner], share=share)


def _span(size: int, cut: float, numbers: np.random.Generator) -> slice:
    """A stretch of ``cut * size`` pixels around a random centre, cut off at the edges."""
    centre, length = int(numbers.integers(size)), int(size * cut)
    return slice(max(0, centre - length // 2), min(size, centre + length // 2))


def restarting_rate(high: float, low: float, updates: int) -> Callable[[int], float]:
    """Learning rate of an update: a pass at a tenth, then half cosines over 1, 2, 4, .. passes, constant in a pass.

    Args:
        high: at the start of each half cosine.
        low: which it falls towards.
        updates: of a pass.
    """

    def rate(step: int) -> float:
        done = step // updates  # whole passes
        if done == 0:
            return WARM_UP * high
        length = 2 ** (done.bit_length() - 1)  # of the cosine that pass ``done`` is in; it began with pass ``length``
        return low + 0.5 * (high - low) * (1 + math.cos(math.pi * (done - length) / length))

    return rate
