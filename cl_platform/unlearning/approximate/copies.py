"""What the strategies of a learner ever trained, found out on a copy of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cl_platform.copies import copied
from cl_platform.scenarios import Task

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import ImageSet


def begin(twin: ContinualLearner, task_id: int, images: ImageSet) -> None:
    """Let the strategies of a copy begin a learnt task again, so that they know which part is the current one.

    Args:
        twin: the copy; what this changes in it must not reach the learner.
        task_id: the task.
        images: stand for its images; no strategy reads those of a task it has learnt.
    """
    twin.composition.begin_task(Task(task_id, 0, tuple(twin.seen_classes()), images, images, images))


def trained_names(learner: ContinualLearner, images: ImageSet) -> list[str]:
    """Names of all parameters that the strategies trained in any learnt task, head rows of every class included.

    Args:
        learner: whose; nothing of it changes.
        images: see :func:`begin`.
    """
    scratch = copied(learner)
    known = {name for name, _ in learner.named_parameters()}  # a beginning may add what serves training alone
    chosen: set[int] = set()
    for task_id in scratch.owners.learnt:
        begin(scratch, task_id, images)
        chosen |= {id(p) for group in scratch.composition.trainable() for p in group.parameters}
    return [name for name, p in scratch.named_parameters() if id(p) in chosen and name in known]
