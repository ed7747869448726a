"""Who shaped what: the learnt state in full, its owner records, and a check that no task writes outside its own."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from cl_platform.random_streams import RUN_LEVEL
from cl_platform.strategies.base import Component
from cl_platform.unlearning.canonical import tensor_digest

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner

BOOKKEEPING = {
    "*.buffer.steps": "updates of the run by which a row came; nothing that is learnt reads it",
}
"""Patterns of keys that are no learnt state, and why; a key that none matches is."""

SHARED_WEIGHTS = "L-01"
MEMBERS = "composition.members"


def learnt_state(learner: ContinualLearner) -> dict[str, Tensor]:
    """Every learnt tensor by its key in the learner: parameters, buffers, also those that are not saved, records.

    A frozen trunk is part of it: its running statistics must not move either. What ``BOOKKEEPING`` lists is left out.
    """
    return _state(learner)


def _state(learner: ContinualLearner, keep_vars: bool = False) -> dict[str, Tensor]:
    """See :func:`learnt_state`; with ``keep_vars`` the learner's own objects, which gradients may be part of."""
    state = dict(learner.state_dict(keep_vars=keep_vars))
    state |= {name: buffer for name, buffer in learner.named_buffers() if name not in state}  # those not saved
    return {name: tensor for name, tensor in state.items() if not is_bookkeeping(name)}


def is_bookkeeping(name: str) -> bool:
    """Whether a key is on the list of what is no learnt state."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in BOOKKEEPING)


def components(learner: ContinualLearner) -> list[Component]:
    """Owner records of the whole learnt state, names as the learner's keys; :func:`full_names` gives the tensors'."""
    found = [*_network(learner), *_records(learner)]
    for component in learner.composition.components():
        room = "composition" if component.name.split(".")[0] == "teacher" else MEMBERS
        found.append(replace(component, name=f"{room}.{component.name}"))
    return [replace(c, tasks=tuple(sorted(set(c.tasks)))) for c in found if c.tensors]


def full_names(component: Component) -> dict[str, Tensor]:
    """The tensors of a component by their keys in the learnt state."""
    leaf = component.name.rpartition(".")[2]
    return {component.name if name == leaf else f"{component.name}.{name}": t for name, t in component.tensors.items()}


def owners(learner: ContinualLearner) -> dict[str, tuple[int, ...]]:
    """The tasks that could have shaped each tensor, by its key. A key that is missing has no declared owner."""
    return {name: component.tasks for component in components(learner) for name in full_names(component)}


def holders(learner: ContinualLearner, task_id: int) -> list[Component]:
    """Components of a learner that list a task. Once the task is dropped: those in which something of it is left."""
    return [component for component in components(learner) if task_id in component.tasks]


def remaining_leaks(learner: ContinualLearner, task_id: int) -> tuple[str, ...]:
    """Channels of :data:`~cl_platform.strategies.base.LEAKS` by which dropping a task leaves something of it, or has.

    They are what the strategies declare. Where none does and kept components list the task all the same, such as a
    head block whose classes several tasks share, that is learning on shared weights.
    """
    composition = learner.composition
    dropped = task_id not in learner.owners.learnt
    if dropped and not holders(learner, task_id):
        return ()
    if not composition.apart(task_id):
        return tuple(sorted(composition.leaks)) or (SHARED_WEIGHTS,)
    shared = dropped or len(learner.owners.classes_of_none_but(task_id)) < len(learner.owners.classes(task_id))
    return (SHARED_WEIGHTS,) if shared and _others_shaped(learner, task_id) else ()


def undeclared(learner: ContinualLearner) -> list[str]:
    """Keys of learnt tensors that are in no component; an honest lineage has none."""
    declared = owners(learner)
    return [name for name in learnt_state(learner) if name not in declared]


def _others_shaped(learner: ContinualLearner, task_id: int) -> bool:
    """Whether a head block or the backbone lists the task beside others."""
    records = [learner.owners.shaped(place) for place in learner.owners.task_ids]
    return any(task_id in by and len(by) > 1 for by in records)


def _network(learner: ContinualLearner) -> Iterator[Component]:
    """The backbone, whole, and the head block by block; a block is at least its own task's."""
    tensors = {**learner.backbone.state_dict(), **dict(learner.backbone.named_buffers())}
    yield Component("backbone", learner.owners.shaped(RUN_LEVEL), "backbone", tensors)
    blocks = learner.head.blocks
    for task_id in blocks.task_ids:
        tasks = (task_id, *learner.owners.shaped(task_id))
        yield Component(f"head.blocks.tasks.{task_id}", tasks, "head", dict(blocks.tasks[str(task_id)].state_dict()))


def _records(learner: ContinualLearner) -> Iterator[Component]:
    """The owner records themselves: each says what tasks it speaks of."""
    for task_id in learner.owners.task_ids:
        slot = dict(learner.owners.tasks[str(task_id)].state_dict())
        tasks = {int(t) for name, tensor in slot.items() if name != "classes" for t in tensor.tolist()}
        own = () if task_id == RUN_LEVEL else (task_id,)
        yield Component(f"owners.tasks.{task_id}", (*own, *tasks), "lineage", slot)


@dataclass(frozen=True)
class Write:
    """A tensor that changed while a task was learnt whose owner record lacks the task.

    Attributes:
        name: its key in the learnt state.
        task_id: of the task.
        owners: what is declared; ``None`` where the tensor is in no component.
    """

    name: str
    task_id: int
    owners: tuple[int, ...] | None

    def __str__(self) -> str:
        if self.owners is None:
            return f"{self.name} changed while task {self.task_id} was learnt, and no component declares it"
        listed = ", ".join(map(str, self.owners)) or "none"
        return f"{self.name} changed while task {self.task_id} was learnt, and its owners are {listed}"


class WriteCheck:
    """Holds what changes while a task is learnt against the owner records; digests are taken between tasks only.

    Call :meth:`before` ahead of a task's start and :meth:`after` behind its end. What was digested behind one task
    serves the start of the next, tensor by tensor, where nothing has written to it since.
    """

    def __init__(self) -> None:
        self._before: dict[str, str] | None = None
        self._kept: dict[str, tuple[_Mark, str]] = {}

    def before(self, learner: ContinualLearner) -> None:
        """Note what there is."""
        self._before, self._kept = _digests(learner, self._kept), {}

    def after(self, learner: ContinualLearner, *task_ids: int) -> list[Write]:
        """What changed or came without listing the tasks just learnt as owners, by name.

        Args:
            learner: behind the end of the task.
            task_ids: the task, or all those that were learnt together.
        """
        if self._before is None:
            raise ValueError("before() comes first")
        now, declared = _digests(learner, {}), owners(learner)  # training may write past any count: all anew
        changed = sorted(name for name, digest in now.items() if self._before.get(name) != digest)
        self._before = None
        self._kept = {name: (_Mark.of(t), now[name]) for name, t in _state(learner, keep_vars=True).items()}
        return list(_undeclared_writes(changed, declared, task_ids))


@dataclass(frozen=True)
class _Mark:
    """By what a tensor is known to be as it was: the object, without keeping it alive, its memory, writes to it."""

    tensor: weakref.ref[Tensor]
    place: int
    writes: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Mark:
        return cls(weakref.ref(tensor), tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)

    def holds(self, tensor: Tensor) -> bool:
        now = _Mark.of(tensor)
        return self.tensor() is tensor and self.writes >= 0 and (now.place, now.writes) == (self.place, self.writes)


def _digests(learner: ContinualLearner, known: Mapping[str, tuple[_Mark, str]]) -> dict[str, str]:
    """Digests of the learnt state; those of ``known`` tensors that are as they were are taken over."""
    found = {}
    for name, tensor in _state(learner, keep_vars=True).items():
        mark, digest = known.get(name, (None, ""))
        found[name] = digest if mark is not None and mark.holds(tensor) else tensor_digest(name, tensor)
    return found


def _undeclared_writes(
    changed: Sequence[str], declared: dict[str, tuple[int, ...]], task_ids: Sequence[int]
) -> Iterator[Write]:
    for name in changed:
        tasks = declared.get(name)
        missing = [t for t in task_ids if tasks is None or t not in tasks]
        if missing:
            yield Write(name, missing[0], tasks)
