"""In which order and mixture the data of a stream are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class Phase:
    """One training run inside the stream, followed by an evaluation.

    Attributes:
        task: what is trained on; may be the union of several tasks.
        position: row of the accuracy matrix that the evaluation after it fills.
        fresh: start from a newly built learner.
    """

    task: Task
    position: int
    fresh: bool = False


def one_per_task(tasks: Sequence[Task]) -> list[Phase]:
    """Each task in turn: the continual learner's way."""
    return [Phase(task, position) for position, task in enumerate(tasks)]


def all_at_once(tasks: Sequence[Task]) -> list[Phase]:
    """One training on the union of all tasks; earlier rows of the matrix stay empty."""
    return [Phase(union(tasks), len(tasks) - 1)]


def growing_union(tasks: Sequence[Task], fresh: bool) -> list[Phase]:
    """Training on the union of the tasks so far, from scratch each time (``fresh``) or going on."""
    return [Phase(union(tasks[: i + 1]), i, fresh=fresh and i > 0) for i in range(len(tasks))]


def union(tasks: Sequence[Task]) -> Task:
    """One task that holds the training and validation data of all, under the id of the last."""
    from cl_platform.scenarios.mixture import concatenate

    last = tasks[-1]
    classes = tuple(dict.fromkeys(c for task in tasks for c in task.classes))
    return replace(
        last,
        classes=classes,
        train=concatenate([task.train for task in tasks]),
        validation=concatenate([task.validation for task in tasks]),
        parts=tuple(tasks),
    )
