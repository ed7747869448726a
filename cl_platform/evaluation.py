"""Counting right answers on the tasks' images, every prediction space from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_platform.heads import columns_of
from cl_platform.metrics.calibration import BinCounts, confidences

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import Task

EVALUATION_BATCH = 128
"""Images of a forward pass; on CPUs 256 took a quarter longer per image, their activations no longer fit the caches."""


@dataclass
class Counts:
    """Right answers per task and prediction space.

    Attributes:
        total: images per task, in the order of the tasks given.
        correct: space (``cil``, ``til`` or ``dil``) -> right answers per task.
        cumulative: entry t counts images of tasks 0..t answered among the classes of tasks 0..t (class-incremental).
        per_class: class id -> (right, all) in the run's primary space.
        answers: the answered class ids (n,) of each task's images in the primary space.
        calibration: confidences of these answers among the tasks learnt so far.
    """

    total: list[int]
    correct: dict[str, list[int]]
    cumulative: list[tuple[int, int]] = field(default_factory=list)
    per_class: dict[int, tuple[int, int]] = field(default_factory=dict)
    answers: list[Tensor] = field(default_factory=list)
    calibration: BinCounts = field(default_factory=BinCounts.empty)


def spaces_of(setting: str) -> tuple[str, ...]:
    """Prediction spaces that a scenario's setting defines, the primary one first."""
    return {"class": ("cil", "til"), "task": ("til", "cil"), "domain": ("dil",)}[setting]


def count_correct(learner: ContinualLearner, tasks: Sequence[Task], split: str = "test") -> Counts:
    """Evaluate the whole ``split`` of ``tasks`` (the seen ones, in stream order) with the learner as it is."""
    spaces = spaces_of(learner.setting)
    counts = Counts(total=[], correct={space: [] for space in spaces})
    pooled = [[0, 0] for _ in tasks]
    with learner.answering():
        seen = learner.seen_classes()
        for position, task in enumerate(tasks):
            image_set = getattr(task, split)
            logits = _logits(learner, task, split, image_set)  # (n, S)
            labels = image_set.labels.to(logits.device)
            counts.total.append(len(image_set))
            right: dict[str, Tensor] = {}
            for space in spaces:
                candidates = task.classes if space == "til" else seen
                answers = answered(logits, seen, candidates)
                right[space] = answers == labels
                if space == spaces[0]:
                    counts.answers.append(answers.cpu())
                    _count_confidence(counts.calibration, logits, columns_of(candidates, seen), right[space])
                counts.correct[space].append(int(right[space].sum()))
            _count_classes(counts.per_class, labels, right[spaces[0]])
            if learner.setting == "class":
                _count_cumulative(pooled, position, tasks, logits, labels, seen)
    if learner.setting == "class":
        counts.cumulative = [(right_, all_) for right_, all_ in pooled]
    return counts


def answered(logits: Tensor, seen: Sequence[int], candidates: Sequence[int]) -> Tensor:
    """The predicted class id (n,) among ``candidates``; ties go to the lowest id; -1 where none of them was learnt."""
    columns = columns_of(candidates, seen)
    if not columns:
        return torch.full((len(logits),), -1, device=logits.device)
    ids = torch.tensor([seen[c] for c in columns], device=logits.device)
    chosen = logits if len(columns) == len(seen) else logits[:, columns]
    best = (chosen == chosen.max(dim=1, keepdim=True).values).int().argmax(dim=1)  # the first of equal maxima
    return ids[best]


def _logits(learner: ContinualLearner, task: Task, split: str, image_set: object) -> Tensor:
    parts = []
    for start in range(0, len(image_set), EVALUATION_BATCH):  # type: ignore[arg-type]
        rows = torch.arange(start, min(start + EVALUATION_BATCH, len(image_set)))  # type: ignore[arg-type]
        parts.append(learner.logits_of(task.task_id, split, image_set, rows))  # type: ignore[arg-type]
    return torch.cat(parts)


def _count_confidence(bins: BinCounts, logits: Tensor, columns: list[int], right: Tensor) -> None:
    if columns:  # a task not learnt yet has no candidate
        bins.add(confidences(logits[:, columns]), right)


def _count_classes(per_class: dict[int, tuple[int, int]], labels: Tensor, right: Tensor) -> None:
    for c in labels.unique().tolist():
        mask = labels == c
        done, all_ = per_class.get(c, (0, 0))
        per_class[c] = (done + int(right[mask].sum()), all_ + int(mask.sum()))


def _count_cumulative(
    pooled: list[list[int]], position: int, tasks: Sequence[Task], logits: Tensor, labels: Tensor, seen: Sequence[int]
) -> None:
    for t in range(position, len(tasks)):
        candidates = [c for task in tasks[: t + 1] for c in task.classes]
        pooled[t][0] += int((answered(logits, seen, candidates) == labels).sum())
        pooled[t][1] += len(labels)
