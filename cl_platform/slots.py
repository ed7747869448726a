"""Tensors that belong to one task each, kept apart so that a task's share can be frozen, counted and removed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Slot(nn.Module):
    """The named tensors of one task."""


class PerTask(nn.Module):
    """Modules that belong to one task each, under the state keys ``tasks.<task id>``."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict()

    @property
    def task_ids(self) -> list[int]:
        """Task ids that have a module, ascending."""
        return sorted(int(key) for key in self.tasks)

    def __contains__(self, task_id: object) -> bool:
        return str(task_id) in self.tasks

    def drop(self, task_id: int) -> None:
        """Remove the module of ``task_id`` if there is one."""
        if task_id in self:
            del self.tasks[str(task_id)]


class Slots(PerTask):
    """Per-task tensors under the state keys ``tasks.<task id>.<name>``.

    A ``state_dict`` alone restores them: loading creates the slots that the state has and removes those it lacks.

    Args:
        parameters: names of tensors that a gradient may train.
        buffers: names of tensors that are remembered but never trained; ``None``: any.
    """

    def __init__(self, parameters: tuple[str, ...] = (), buffers: tuple[str, ...] | None = ()) -> None:
        super().__init__()
        self._parameter_names = parameters
        self._buffer_names = buffers
        self._known: dict[tuple[int, str], tuple[weakref.ref[Tensor], int, tuple[int, ...]]] = {}

    def add(self, task_id: int, **tensors: Tensor) -> None:
        """Create the slot of ``task_id`` holding ``tensors``; an existing one is replaced."""
        slot = _Slot()
        declared = {name: place for place, name in enumerate((*self._parameter_names, *(self._buffer_names or ())))}
        # in the declared order, restored or new: sums over all parameters, as in clipping, must not depend on it
        for name, tensor in sorted(tensors.items(), key=lambda item: declared.get(item[0], len(declared))):
            if name in self._parameter_names:
                slot.register_parameter(name, nn.Parameter(tensor.clone()))
            elif self._buffer_names is None or name in self._buffer_names:
                slot.register_buffer(name, tensor.clone())
            else:
                raise KeyError(f"slot tensor {name!r} was not declared")
        self.tasks[str(task_id)] = slot

    def get(self, task_id: int, name: str) -> Tensor:
        """The tensor ``name`` of task ``task_id`` itself, not a copy."""
        return getattr(self.tasks[str(task_id)], name)

    def set(self, task_id: int, name: str, value: Tensor) -> None:
        """Exchange a buffer of ``task_id`` for ``value``, which may have another shape."""
        setattr(self.tasks[str(task_id)], name, value)

    def all(self, name: str) -> list[Tensor]:
        """The tensor ``name`` of every task, in ascending task id."""
        return [self.get(task_id, name) for task_id in self.task_ids]

    def numbers(self, task_id: int, name: str) -> tuple[int, ...]:
        """The whole numbers of a remembered tensor, read from the device once for as long as they stay the same."""
        tensor = self.get(task_id, name)
        known = self._known.get((task_id, name))
        if known is None or known[0]() is not tensor or known[1] != tensor._version:
            values = tuple(int(number) for number in tensor.flatten().tolist())
            known = self._known[task_id, name] = (weakref.ref(tensor), tensor._version, values)
        return known[2]

    def all_numbers(self, name: str) -> list[tuple[int, ...]]:
        """:meth:`numbers` of every task, in ascending task id."""
        return [self.numbers(task_id, name) for task_id in self.task_ids]

    def parameters_of(self, task_id: int) -> dict[str, nn.Parameter]:
        """The trainable tensors of one task by name."""
        return dict(self.tasks[str(task_id)].named_parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slots:
        """A move to a device keeps what the host knows of the numbers."""
        kept = {
            (task_id, name): values
            for (task_id, name), (tensor, version, values) in self._known.items()
            if task_id in self and self.get(task_id, name) is (found := tensor()) and found._version == version
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = {key: self.get(*key) for key in kept}
        self._known = {k: (weakref.ref(moved[k]), moved[k]._version, values) for k, values in kept.items()}
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        start = f"{prefix}tasks."
        found: dict[int, dict[str, Tensor]] = {}
        for key, value in state_dict.items():
            if key.startswith(start):
                task_text, name = key[len(start) :].split(".", 1)
                found.setdefault(int(task_text), {})[name] = value
        for task_id in self.task_ids:
            if task_id not in found:
                self.drop(task_id)
        for task_id in sorted(found):
            shapes = {n: tuple(t.shape) for n, t in found[task_id].items()}
            here = (
                {n: tuple(t.shape) for n, t in self.tasks[str(task_id)].state_dict().items()} if task_id in self else {}
            )
            if shapes != here:
                device = self._device()
                self.add(task_id, **{n: torch.empty_like(t, device=device) for n, t in found[task_id].items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _device(self) -> torch.device:
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")
