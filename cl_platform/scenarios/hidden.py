"""A stream whose bounds between tasks are hidden: for whoever learns, one task that runs through all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cl_platform.batch import Batch
from cl_platform.scenarios.loader import TaskLoader
from cl_platform.scenarios.mixture import concatenate
from cl_platform.scenarios.stream import Stream, Task

WHOLE = 0
"""Task id of the one task."""


def as_told(stream: Stream) -> Stream:
    """The stream as learners are told of it: itself, or a single pass over one task where the bounds are hidden.

    The one task declares the classes of all tasks from the start; its training images stand in the stream's order.
    """
    if not stream.hidden:
        return stream
    return replace(stream, tasks=(_one_task(stream.tasks),), online=True, left_out=())


def _one_task(tasks: Sequence[Task]) -> Task:
    classes = tuple(sorted({c for task in tasks for c in task.classes}))
    train, validation, test = (
        concatenate([getattr(task, split) for task in tasks]) for split in ("train", "validation", "test")
    )
    return Task(WHOLE, 0, classes, train, validation, test)


class StreamLoader(TaskLoader):
    """Batches of the one task: each task's images in turn, in the orders in which its own loader would give them.

    A batch goes on with the next task's images where a task ends inside it.

    Args:
        tasks: the scenario's.
        whole: the one task of :func:`as_told`.
        batch_size: images per batch.
        seed: the run's seed.
        passes: how often a task's images come, each time in a new order, before those of the next task.
        drop_last: leave out a last batch that is not full.

    Raises:
        UserError: there is no image, or no full batch under ``drop_last``.
    """

    def __init__(
        self, tasks: Sequence[Task], whole: Task, batch_size: int, seed: int, passes: int = 1, drop_last: bool = False
    ) -> None:
        self._tasks, self._passes = list(tasks), passes
        super().__init__(whole.train, whole.task_id, batch_size, seed, drop_last=drop_last)

    def __iter__(self) -> Iterator[Batch]:
        """Batches with a column ``pass``: how often each image came before."""
        numbers = torch.cat([
            torch.arange(self._passes).repeat_interleave(len(task.train)) for task in self._tasks
        ])  # fmt: skip
        for start, batch in zip(range(0, len(numbers), self.batch_size), super().__iter__(), strict=False):
            yield batch.with_extra(**{"pass": numbers[start : start + len(batch)]})

    def order(self, epoch: int) -> Tensor:
        """Rows of the one task in their order, the same in every epoch."""
        parts, start = [], 0
        for task in self._tasks:
            own = TaskLoader(task.train, task.task_id, self.batch_size, self._seed)
            parts += [own.order(number) + start for number in range(self._passes)]
            start += len(task.train)
        return torch.cat(parts)

    def ends(self) -> list[int]:
        """After how many batches each task's last image has come; the last entry is the number of batches."""
        images = torch.tensor([len(task.train) * self._passes for task in self._tasks]).cumsum(0).tolist()
        return [*(min(-(-count // self.batch_size), len(self)) for count in images[:-1]), len(self)]

    def _rows_per_process(self) -> int:
        return self._passes * len(self.task_set)
