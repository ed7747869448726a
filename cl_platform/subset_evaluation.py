"""Continual evaluation: every seen task's evaluation subset answered in one batched forward pass.

Knows learners and image sets; Lightning, files and the choice of the moment are the callers' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from cl_platform.evaluation import EVALUATION_BATCH, answered, spaces_of
from cl_platform.heads import cross_entropy
from cl_platform.metrics import Cell
from cl_platform.metrics.subset import evaluation_subset

if TYPE_CHECKING:
    from cl_platform.backbones import PromptedViT
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import ImageSet, Task

SPLIT = "subset"
"""Name of the evaluation subsets in the feature cache."""


@dataclass(frozen=True)
class Subset:
    """The images of a task that continual evaluation looks at.

    Attributes:
        task_id: whose they are.
        classes: the task's.
        images: in the order of the test set.
        wanted: how many were asked for; more than there are means that all are used.
    """

    task_id: int
    classes: tuple[int, ...]
    images: ImageSet
    wanted: int

    def __len__(self) -> int:
        return len(self.images)


def subset_of(task: Task, count: int, seed: int) -> Subset:
    """``count`` class-balanced images of the task's test set, the same in every run with this seed."""
    rows = evaluation_subset(task.test.labels.tolist(), count, seed, task.task_id)
    return Subset(task.task_id, task.classes, task.test.select(torch.tensor(rows, dtype=torch.int64)), count)


@dataclass(frozen=True)
class Resident:
    """Subsets ready to be answered again and again while one task trains: pixels and kept columns on the device.

    Attributes:
        subsets: in the order of the rows.
        images: (n, 3, H, W) uint8, or of no size (n, 0) where kept columns stand for them.
        labels: (n,) int64.
        columns: what :meth:`ContinualLearner.kept_columns` gives, joined.
    """

    subsets: tuple[Subset, ...]
    images: Tensor
    labels: Tensor
    columns: dict[str, Tensor]


def resident(learner: ContinualLearner, subsets: Sequence[Subset]) -> Resident:
    """Lay out subsets for the learner's current task; call it again when another task begins."""
    device = learner.device
    found = [learner.kept_columns(subset.task_id, SPLIT, subset.images) for subset in subsets]
    names = set.intersection(*(set(columns) for columns in found))  # a column that one subset lacks serves none
    columns = {name: torch.cat([kept[name] for kept in found]) for name in sorted(names)}
    labels = torch.cat([subset.images.labels for subset in subsets]).to(device)
    if "tokens" in columns or learner.composition.query == "only":
        images = torch.empty(len(labels), 0, dtype=torch.uint8, device=device)
    else:
        images = torch.cat([subset.images.images(slice(None)) for subset in subsets]).to(device)
    return Resident(tuple(subsets), images, labels, columns)


def count_subsets(
    learner: ContinualLearner, ready: Resident, losses: dict[int, float] | None = None
) -> dict[int, dict[str, Cell]]:
    """Right answers of the learner as it is: task id -> prediction space -> (right, all).

    No generator is drawn from, no gradient exists, and every module's mode is put back.

    Args:
        learner: at any time.
        ready: the subsets.
        losses: filled, where given, with each task's mean cross-entropy in nats, in the first prediction space.
    """
    spaces = spaces_of(learner.setting)
    with learner.answering():
        seen = learner.seen_classes()
        if not seen:  # a closed form before its first task has no answer yet
            return {s.task_id: {space: (0, len(s)) for space in spaces} for s in ready.subsets}
        parts = []
        for start in range(0, len(ready.labels), EVALUATION_BATCH):
            rows = slice(start, start + EVALUATION_BATCH)
            images = ready.images[rows]
            if images.dim() == 4:
                images = learner.transforms.evaluate(images)
            parts.append(learner.answer(images, {name: column[rows] for name, column in ready.columns.items()}))
        logits = torch.cat(parts)  # (n, S)
        sums, entropies, measured = [], [], []
        first = 0
        for subset in ready.subsets:
            rows = slice(first, first + len(subset))
            if losses is not None and set(subset.classes) <= set(seen):  # a closed form learns a task at its end
                over = subset.classes if spaces[0] == "til" else seen
                entropies.append(cross_entropy(logits[rows], ready.labels[rows], seen, over))
                measured.append(subset.task_id)
            for space in spaces:
                candidates = subset.classes if space == "til" else seen
                sums.append((answered(logits[rows], seen, candidates) == ready.labels[rows]).sum())
            first += len(subset)
        right = iter(torch.stack(sums).tolist())  # the one wait for the device
        if losses is not None and measured:
            losses |= zip(measured, torch.stack(entropies).tolist(), strict=True)
    return {s.task_id: {space: (next(right), len(s)) for space in spaces} for s in ready.subsets}


def image_weight(learner: ContinualLearner, columns: Mapping[str, Tensor] | None = None) -> Fraction:
    """Forward passes that one answered image costs, a pass through the whole trunk counting 1.

    Args:
        learner: at any time; the current task's frozen blocks count.
        columns: what is kept, or ``None`` to assume all that can be.
    """
    if learner.composition.query == "only":
        return head_weight(learner)
    kept = learner.kept_names() if columns is None else set(columns)
    weight = Fraction(1)
    if "tokens" in kept:
        depth = cast("PromptedViT", learner.backbone).depth
        weight = max(Fraction(depth - learner.context.kept_blocks, depth), head_weight(learner))
    if learner.composition.query in ("answers", "beside") and "query" not in kept:
        weight += 1
    return weight


def head_weight(learner: ContinualLearner) -> Fraction:
    """The head's share of a forward pass, by multiplications: D * classes over trunk weights * tokens."""
    trunk = sum(p.numel() for p in learner.backbone.parameters()) or 1
    tokens = getattr(learner.backbone, "num_tokens", 1)
    head = learner.backbone.feature_dim * learner.context.num_classes
    return min(Fraction(1), Fraction(head, trunk * tokens))


def training_weight(learner: ContinualLearner) -> Fraction:
    """Forward passes that one training image costs in an update, kept query features counting none."""
    query = learner.composition.query
    if query == "only":
        return head_weight(learner)
    return Fraction(2 if query == "beside" and not learner.transforms.deterministic else 1)
