"""Models of run folders, and what they answer: everything that verification compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_platform.errors import UserError
from cl_platform.evaluation import EVALUATION_BATCH, answered, spaces_of
from cl_platform.heads import columns_of
from cl_platform.run_folder import Checkpoint, checkpoints

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import ImageSet, Stream, Task

Build = Callable[[Mapping[str, Any]], "tuple[ContinualLearner, Stream]"]
"""A resolved configuration -> a learner that has learnt nothing, on the run's device, and its stream."""

SPLITS = ("train", "test")


# -- from a folder --------------------------------------------------------------------------------------------------


def checkpoint_after(run: Path, learnt: Sequence[int] | None = None, but: Sequence[int] = ()) -> Checkpoint | None:
    """The newest checkpoint of a run, or the one after exactly the tasks ``learnt``; ``None`` if there is none.

    Args:
        run: its folder.
        learnt: task ids in the order of learning; ``None``: any.
        but: task ids that count as not learnt.
    """
    for checkpoint in checkpoints(run):
        there = [task_id for task_id in checkpoint.state.get("learnt", ()) if task_id not in but]
        if learnt is None or there == list(learnt):
            return checkpoint
    return None


def restored(config: Mapping[str, Any], checkpoint: Checkpoint, build: Build) -> ContinualLearner:
    """A learner as it was when a checkpoint was written, built anew: nothing is shared with any other learner.

    Raises:
        UserError: the backbone's weights are not those that the run started with.
    """
    learner, _ = build(config)
    started_with = checkpoint.state.get("backbone_sha256")
    if started_with is not None and learner.backbone.digest() != started_with:
        raise UserError(
            "run", str((config.get("backbone") or {}).get("kind")), "the backbone's weights are not those the run "
            "started with", "Use the same backbone",
        )  # fmt: skip
    state = checkpoint.state
    learner.restore(checkpoint.tensors, state.get("learnt", ()), bool(state.get("backbone_frozen")))
    return learner


# -- answers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskAnswers:
    """What a model answers to one split of a task.

    Attributes:
        labels: class ids (n,).
        correct: prediction space -> images answered right.
        answerable: prediction space -> whether all labels are possible answers.
        classes: class ids of the columns below, ascending: the candidates of the run's own prediction space.
        likelihood: probability (n,) of the true class among them; ``None`` where a label is not.
        logits: (n, C); ``None`` where only counts were asked for.
    """

    labels: Tensor
    correct: dict[str, int]
    answerable: dict[str, bool]
    classes: tuple[int, ...]
    likelihood: Tensor | None
    logits: Tensor | None


@dataclass(frozen=True)
class Answers:
    """What a model answers to all images that verification looks at.

    Attributes:
        target: id of the forgotten task.
        spaces: prediction spaces of the scenario, the primary one first.
        by: split -> task id -> answers.
        features: split -> features (n, D) of the forgotten task's images.
        shared_trunk: the features are those of a frozen trunk that learnt nothing from the stream.
    """

    target: int
    spaces: tuple[str, ...]
    by: dict[str, dict[int, TaskAnswers]]
    features: dict[str, Tensor]
    shared_trunk: bool

    def kept(self, split: str) -> list[TaskAnswers]:
        """Answers to the kept tasks, in ascending task id."""
        return [answers for task_id, answers in sorted(self.by[split].items()) if task_id != self.target]

    def forgotten(self, split: str) -> TaskAnswers:
        """Answers to the forgotten task."""
        return self.by[split][self.target]


def ask(learner: ContinualLearner, target: Task, kept: Sequence[Task]) -> Answers:
    """Let a model answer the training and test images of the forgotten task and of the kept ones.

    Logits of the kept tasks' training images, of which there may be very many, are not held.
    """
    by: dict[str, dict[int, TaskAnswers]] = {}
    with learner.answering():
        for split in SPLITS:
            by[split] = {}
            for task in (target, *kept):
                whole = split == "test" or task is target
                by[split][task.task_id] = answers_to(learner, task, split, whole)
    features = {split: learner.features_of(getattr(target, split)).cpu() for split in SPLITS}
    own = learner.composition.owner("features") is None and learner.backbone.frozen
    return Answers(target.task_id, spaces_of(learner.setting), by, features, own)


def answers_to(learner: ContinualLearner, task: Task, split: str, whole: bool = True) -> TaskAnswers:
    """Answers to one split of a task; call inside ``learner.answering()``.

    Args:
        learner: asked as it is.
        task: whose images.
        split: ``train`` or ``test``.
        whole: keep the logits.
    """
    seen, image_set = learner.seen_classes(), getattr(task, split)
    spaces, labels = spaces_of(learner.setting), image_set.labels
    candidates = {space: list(task.classes) if space == "til" else seen for space in spaces}
    columns = columns_of(candidates[spaces[0]], seen)
    classes = [seen[column] for column in columns]
    likely = set(labels.tolist()) <= set(classes)
    correct, parts, shares = dict.fromkeys(spaces, 0), [], []
    for rows in torch.arange(len(image_set)).split(EVALUATION_BATCH):
        logits = learner.logits_of(task.task_id, split, image_set, rows).cpu()
        truth = labels[rows]
        for space in spaces:
            correct[space] += int((answered(logits, seen, candidates[space]) == truth).sum())
        own = logits[:, columns]
        if likely and classes:
            place = torch.searchsorted(torch.tensor(classes), truth)
            shares.append(own.double().softmax(dim=1).gather(1, place[:, None])[:, 0])
        if whole:
            parts.append(own)
    answerable = {space: set(labels.tolist()) <= set(candidates[space]) & set(seen) for space in spaces}
    return TaskAnswers(
        labels=labels,
        correct=correct,
        answerable=answerable,
        classes=tuple(classes),
        likelihood=torch.cat(shares) if shares else None,
        logits=(torch.cat(parts) if parts else torch.zeros(0, len(classes))) if whole else None,
    )


def task_images(stream: Stream, task_id: int) -> Task:
    """A task of a stream.

    Raises:
        UserError: the stream does not hold it, so that nothing about it can be measured.
    """
    try:
        return stream.task(task_id)
    except KeyError:
        raise UserError(
            "run", f"task {task_id}", "the scenario of the run does not hold the forgotten task",
            "Verification needs its images; take it out of scenario.skip_tasks in the run's config.yaml",
        ) from None  # fmt: skip


def sample(image_set: ImageSet, count: int, generator: torch.Generator) -> Tensor:
    """Rows (k,) int64 of a keyed sample of an image set, ascending."""
    return torch.randperm(len(image_set), generator=generator)[:count].sort().values
