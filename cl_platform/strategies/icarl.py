"""iCaRL (Rebuffi et al., CVPR 2017): exemplars are learnt with each task, and answer by their means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.backbones.feature_cache import READ_BATCH
from cl_platform.batch import Batch, constant
from cl_platform.config import setting
from cl_platform.errors import UserError, keys_below
from cl_platform.heads import columns_of, picked
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.memory.build import BufferConfig, build_buffer
from cl_platform.registry import strategies
from cl_platform.scenarios.mixture import StoredImages, rehearsal
from cl_platform.slots import Slots
from cl_platform.strategies.base import Component, Context, Needs, Step, Strategy
from cl_platform.strategies.exemplars import answering, image_features, offer_task
from cl_platform.strategies.statistics import counted, pooled

if TYPE_CHECKING:
    from cl_platform.scenarios import ImageSet, Task


@dataclass(frozen=True)
class ExemplarConfig:
    """Keys of the exemplars' memory."""

    size: int = setting(200, min=1, doc="exemplars of all classes together")
    bytes: int | None = setting(None, min=1, doc="room in bytes instead of size")


@dataclass(frozen=True)
class ICaRLConfig:
    """Keys of ``icarl``."""

    columns: str = setting(
        "seen", doc="the loss is a mean over the seen columns, or over as many as the stream has classes",
        choices=("seen", "all"),
    )  # fmt: skip
    buffer: ExemplarConfig = setting(factory=ExemplarConfig, doc="the exemplars")


def binary_losses(
    logits: Tensor, labels: Tensor, seen: Sequence[int], old: Sequence[int] = (), answers: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of each row and column (B, S), in float32 at least.

    The target of a column is 1 for the label's and 0 for others; for ``old`` classes it is the teacher's sigmoid,
    whatever the label.

    Args:
        logits: (B, S) over ``seen``, ascending class ids.
        labels: (B,) int64 class ids.
        seen: classes of the columns.
        old: classes, ascending, that the teacher answers for.
        answers: (B, len(old)) its logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = (labels[:, None] == constant(list(seen), labels.device)).to(logits.dtype)  # (B, S)
    if answers is not None and len(old):
        columns = constant(columns_of(old, seen), targets.device)
        targets.index_copy_(1, columns, answers.to(targets.dtype).sigmoid())
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def mean_distances(features: Tensor, means: Tensor) -> Tensor:
    """Lengths (B, S) of the differences between features (B, D) brought to unit length and class means (S, D)."""
    unit = F.normalize(features.to(means.dtype), dim=1)
    return torch.cdist(unit, means, compute_mode="donot_use_mm_for_euclid_dist")  # row by row: no batch mates


@strategies.register("icarl")
class ICaRL(Strategy):
    """Current images and exemplars are passed over together, under one binary loss per class; old columns follow the
    teacher, new ones the label.

    At a task's end herding picks the exemplars, and every class gets its mean: of the unit-length features of its
    exemplars and of their mirror images, itself brought to unit length. An image goes to the class whose mean is
    nearest; the head's logits only train. A class answers from the end of its first task on, and between the ends of
    tasks by the means of the last one. The teacher is the learner at the end of the task before, on the same view.
    Classes that come again are learnt by their labels.
    """

    name = "icarl"
    Config = ICaRLConfig
    needs = Needs(boundaries=True, teacher=True)
    owns = frozenset({"classification", "prediction", "buffer"})
    leaks = frozenset({"L-01", "L-04", "L-10", "L-14"})
    stability = frozenset({"kd"})

    def __init__(self, config: ICaRLConfig) -> None:
        super().__init__(config)
        self.means = Slots(buffers=("sum", "count", "classes", "seen"))
        self._known: list[int] = []  # the teacher's classes
        self._old: list[int] = []  # those of them that the task does not bring again
        self._step = 0

    def attach(self, context: Context) -> None:
        """Make room for the exemplars.

        Raises:
            UserError: a memory that cannot hold an exemplar of every class, of every task where classes come again.
        """
        super().attach(context)
        config = BufferConfig(policy="herding", size=self.config.buffer.size, bytes=self.config.buffer.bytes)
        with keys_below(f"strategy.{self.name}", "buffer"):
            self.buffer: ReplayBuffer = build_buffer(config, context.seed, context.image_shape)
        context.buffer, context.draw = self.buffer, self._draw
        groups = context.num_classes * (context.total_tasks if context.setting == "domain" else 1)
        if self.buffer.capacity < groups:
            raise UserError(
                f"strategy.{self.name}.buffer.size", self.buffer.capacity,
                f"the stream brings {groups} classes, and an exemplar of each must be held", "Raise it",
            )  # fmt: skip

    # -- training -----------------------------------------------------------------------------------------------------

    def training_set(self, task: Task, images: ImageSet) -> ImageSet:
        """The task's images, then all exemplars."""
        if not len(self.buffer):
            return images
        held, pixels = self.buffer.contents, self.buffer.images
        assert pixels is not None
        labels, example_ids, task_ids = (
            torch.from_numpy(column.copy()) for column in (held.labels, held.example_ids, held.task_ids)
        )
        return rehearsal(images, task.task_id, StoredImages(pixels[: len(held)].cpu(), labels, example_ids, task_ids))

    def remembered(self, tasks: Sequence[Task]) -> int:
        """Exemplars that herding holds at the start of the last task: an equal share for each class, or all it has."""
        sizes = [n for task in tasks[:-1] for n in torch.unique(task.train.labels, return_counts=True)[1].tolist()]
        return sum(min(n, self.buffer.capacity // len(sizes)) for n in sizes)

    def begin_task(self, task: Task) -> None:
        """Look up which columns follow the teacher."""
        teacher = self.context.teacher
        assert teacher is not None
        self._known = teacher.classes if teacher.ready else []
        self._old = [c for c in self._known if c not in task.classes]

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The loss in two parts: columns that follow the labels, and those that follow the teacher."""
        seen, answers = step.seen_classes, None
        if self._old:
            assert self.context.teacher is not None
            answers = picked(self.context.teacher(step.batch).logits, columns_of(self._old, self._known))
        entries = binary_losses(step.logits, step.batch.labels, seen, self._old, answers)
        width = len(seen) if self.config.columns == "seen" else self.context.declared[0]
        old = columns_of(self._old, seen)
        new = [column for column in range(len(seen)) if column not in set(old)]
        terms = {"bce": picked(entries, new).sum() / (len(entries) * width)}
        if old:
            terms["kd"] = picked(entries, old).sum() / (len(entries) * width)
        return terms

    def after_batch(self, step: Step) -> None:
        """Note the update after which the exemplars will be chosen."""
        self._step = step.global_step

    def _draw(self) -> Batch | None:
        """A batch of exemplars for whoever asks for one."""
        rows = self.buffer.sample(self.context.batch_size, self.context.step_stream("buffer.sample"))
        if rows is None:
            return None
        return self.context.prepare(rows.images, rows.labels, rows.example_ids, rows.task_ids)

    # -- the end of a task --------------------------------------------------------------------------------------------

    def end_task(self, task: Task) -> None:
        """Choose exemplars, then measure the mean of every class anew."""
        with keys_below(f"strategy.{self.name}", "buffer"):
            offer_task(self.buffer, task, self.context, self._step)
        with answering(self.context):
            self._measure(task.task_id)

    def remeasure(self) -> None:
        """The means of all classes, by features as they are now."""
        if self.means.task_ids and len(self.buffer):
            with answering(self.context):
                self._measure(self.means.task_ids[-1])

    def _measure(self, task_id: int) -> None:
        held, pixels = self.buffer.contents, self.buffer.images
        assert pixels is not None
        parts = pixels[: len(held)].split(READ_BATCH)
        plain, mirrored = (
            torch.cat([F.normalize(image_features(self.context, part, flip).double(), dim=1) for part in parts])
            for flip in (False, True)
        )
        unit = plain + mirrored  # (n, D)
        labels, owners = (torch.from_numpy(c.copy()).to(unit.device) for c in (held.labels, held.task_ids))
        behind = sorted({*self.context.behind(task_id), *self._seen()})
        for owner in sorted(self.buffer.owners()):
            own = owners == owner
            classes, place = labels[own].unique(return_inverse=True)
            total = unit.new_zeros(len(classes), unit.shape[1]).index_add_(0, place, unit[own])
            seen = torch.tensor(behind, dtype=torch.int64, device=unit.device)
            count = torch.bincount(place, minlength=len(classes))
            self.means.add(owner, sum=total, count=count, classes=classes, seen=seen)

    # -- answers ------------------------------------------------------------------------------------------------------

    def seen_classes(self) -> list[int]:
        """Classes that have exemplars, ascending."""
        return counted(self.means)

    def class_means(self) -> Tensor:
        """Means (S, D) of unit length, float64, of :meth:`seen_classes`."""
        if not self.means.task_ids:
            return torch.zeros(0, self.context.head.feature_dim, dtype=torch.float64)
        _, total, _ = pooled(self.means.all("classes"), self.means.all("sum"), self.means.all("count"))
        return F.normalize(total, dim=1)

    def predict(self, batch: Batch) -> Tensor:
        """Minus the distance (B, S) to each class mean."""
        features = self.context.features(batch)
        return -mean_distances(features, self.class_means().to(features.device))

    # -- lineage ------------------------------------------------------------------------------------------------------

    def components(self) -> Iterator[Component]:
        """Exemplars and means belong to all tasks that shaped features and shares, a dropped one included."""
        for task_id in self.means.task_ids:
            seen = tuple(int(t) for t in self.means.get(task_id, "seen").tolist())
            tensors = dict(self.means.tasks[str(task_id)].state_dict())
            yield Component(f"means.tasks.{task_id}", seen, "statistics", tensors)
        owners = tuple(sorted(self.buffer.offered() | self.buffer.owners() | self._seen()))
        yield Component("buffer", owners, "buffer", dict(self.buffer.state_dict()))

    def _seen(self) -> set[int]:
        """Tasks that shaped any of the means."""
        return {int(t) for seen in self.means.all("seen") for t in seen.tolist()}

    def drop_task(self, task_id: int) -> None:
        """Remove the task's exemplars and their means."""
        super().drop_task(task_id)
        self.buffer.drop_task(task_id)

    def inspect(self) -> dict[str, Any]:
        """How full the memory is, and by which rule images are answered."""
        held = {"filled": len(self.buffer), "unique": self.buffer.unique, "bytes": self.buffer.bytes}
        return {"buffer": held, "rule": "nearest mean of exemplars"}
