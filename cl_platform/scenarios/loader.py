"""Batches of one task, in an order that depends on nothing but (seed, task id, epoch)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cl_platform.batch import Batch
from cl_platform.errors import UserError
from cl_platform.random_streams import stream
from cl_platform.scenarios.image_set import ImageSet


class TaskLoader:
    """An iterable of batches; Lightning takes it as a dataloader.

    Args:
        task_set: images of one split of a task; a column ``task_ids`` marks those that are remembered from others.
        task_id: the task's id, written into every batch.
        batch_size: images per batch and process.
        seed: the run's seed.
        shuffle: a new order each epoch; otherwise the set's own order.
        drop_last: leave out a last batch that is not full.
        rank: this process among ``world_size``.
        world_size: number of processes; each takes every ``world_size``-th image of the common order, and the order is
            cut (``drop_last``) or continued from its start so that all take equally many.

    Attributes:
        epoch: keys the order of the next iteration; starts at 0 and grows by one with the last batch of an iteration.

    Raises:
        UserError: there is no image, or no full batch under ``drop_last``.
    """

    def __init__(
        self,
        task_set: ImageSet,
        task_id: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UserError("trainer.batch_size", batch_size, "must be at least 1", "Raise trainer.batch_size")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among {world_size} processes")
        self.task_set = task_set
        self.task_id = task_id
        self.batch_size = batch_size
        self.epoch = 0
        self._seed = seed
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._rank = rank
        self._world_size = world_size
        if len(task_set) == 0:
            raise UserError(
                "scenario", f"task {task_id}", "the task has no images", "Leave it out by scenario.skip_tasks"
            )
        if len(self) == 0:
            largest = len(task_set) // world_size
            raise UserError(
                "trainer.batch_size",
                batch_size,
                f"task {task_id} has {len(task_set)} images on {world_size} process(es): an epoch has no full batch",
                f"Set trainer.batch_size to at most {largest}" if largest else "Use fewer processes",
            )

    def __len__(self) -> int:
        rows = self._rows_per_process()
        return rows // self.batch_size if self._drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = self.order(self.epoch)
        following = self.epoch + 1
        for step in range(len(self)):
            batch = self._batch(order[step * self.batch_size : (step + 1) * self.batch_size])
            if step == len(self) - 1:
                self.epoch = following  # before the last batch leaves: a reader that knows the length asks for no more
            yield batch

    def order(self, epoch: int) -> Tensor:
        """Rows (n,) int64 that this process reads in the given epoch, in order."""
        count = len(self.task_set)
        if self._shuffle:
            order = torch.randperm(count, generator=stream(self._seed, self.task_id, "shuffle", epoch))
        else:
            order = torch.arange(count)
        total = self._rows_per_process() * self._world_size
        if total > count:
            order = order.repeat(-(-total // count))
        return order[:total][self._rank :: self._world_size]

    def _rows_per_process(self) -> int:
        count = len(self.task_set)
        return count // self._world_size if self._drop_last else -(-count // self._world_size)

    def _batch(self, rows: Tensor) -> Batch:
        owners = getattr(self.task_set, "task_ids", None)
        task_ids = torch.full((len(rows),), self.task_id, dtype=torch.int64) if owners is None else owners[rows]
        return Batch(
            images=self.task_set.images(rows),
            labels=self.task_set.labels[rows],
            example_ids=self.task_set.example_ids[rows],
            task_ids=task_ids,
            is_replay=task_ids != self.task_id,
            extra={"row": rows},
        )
