"""Which tasks could have shaped the backbone and each block of the head: records that outlive the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from cl_platform.random_streams import RUN_LEVEL
from cl_platform.slots import Slots


class Owners(Slots):
    """A record per learnt task under the state keys ``tasks.<task id>``, and one of the run for the backbone.

    ``classes``: of the task. ``behind``: tasks that could have shaped what was trained in it, itself included. ``by``:
    tasks that could have shaped its block of the head, or in the record of the run the backbone; none while nothing
    trained it. All are (n,) int64, ascending. A dropped task stays listed in the records of others: what they learnt
    from it is still there.
    """

    def __init__(self) -> None:
        super().__init__(buffers=("classes", "behind", "by"))
        self.add(RUN_LEVEL, by=_ids(()))

    @property
    def learnt(self) -> list[int]:
        """Ids of the tasks that were begun and not dropped, ascending."""
        return [t for t in self.task_ids if hasattr(self.tasks[str(t)], "classes")]

    def known(self) -> set[int]:
        """Every task that any record lists."""
        held = [
            tensor for t in self.task_ids for name, tensor in self.tasks[str(t)].named_buffers() if name != "classes"
        ]
        return {int(t) for tensor in held for t in tensor.tolist()}

    def begin(self, task_id: int, classes: Sequence[int], behind: Iterable[int]) -> None:
        """Record that a task is about to be trained, on top of what the tasks ``behind`` it have left."""
        before = self.behind(task_id) if task_id in self.learnt else ()
        self.add(
            task_id,
            classes=_ids(classes).to(self._device()),
            behind=_ids({task_id, *behind, *before}).to(self._device()),
            by=_ids(self.shaped(task_id)).to(self._device()),
        )

    def add_shapers(self, places: Iterable[int], behind: Iterable[int]) -> None:
        """Record that parts, blocks of the head by task id or ``RUN_LEVEL``, are trained on top of ``behind``."""
        for place in places:
            by = _ids({*self.shaped(place), *behind}).to(self._device())
            if place in self:
                self.set(place, "by", by)
            else:
                self.add(place, by=by)

    def shaped(self, place: int) -> tuple[int, ...]:
        """Tasks that could have shaped the head block of a task, or the backbone for ``RUN_LEVEL``."""
        return tuple(self.get(place, "by").tolist()) if place in self else ()

    def behind(self, task_id: int) -> tuple[int, ...]:
        """Tasks that could have shaped what was trained in a task; itself alone where nothing is known of it."""
        return tuple(self.get(task_id, "behind").tolist()) if task_id in self.learnt else (task_id,)

    def classes(self, task_id: int) -> tuple[int, ...]:
        """Classes of a task, ascending."""
        return tuple(self.get(task_id, "classes").tolist())

    def classes_of_none_but(self, task_id: int) -> list[int]:
        """Classes of a task that no other learnt task has, ascending."""
        if task_id not in self.learnt:
            return []
        others = {c for t in self.learnt if t != task_id for c in self.classes(t)}
        return [c for c in self.classes(task_id) if c not in others]

    def forget(self, task_id: int, block_stays: bool) -> None:
        """Remove the record of a task, but for who shaped its head block where that stays with other tasks' classes."""
        by = self.get(task_id, "by")
        self.drop(task_id)
        if block_stays:
            self.add(task_id, by=by)

    def discard(self, task_id: int) -> None:
        """Take a task out of all records: nothing of it is left in what they stand for."""
        for slot in self.tasks.values():
            for name, tensor in list(slot.named_buffers()):
                if name != "classes":
                    setattr(slot, name, tensor[tensor != task_id])


def tasks_behind(owners: Owners, task_ids: Iterable[int], apart: Callable[[int], bool]) -> list[int]:
    """The tasks that could shape what is trained on ``task_ids`` now: those, and all known ones not held apart."""
    return sorted({*task_ids, *(t for t in owners.known() if not apart(t))})


def _ids(numbers: Iterable[int]) -> torch.Tensor:
    return torch.tensor(sorted(set(numbers)), dtype=torch.int64)
