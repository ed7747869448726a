"""The learner as it was at the end of the task before: what distillation looks up to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_platform.batch import Batch
from cl_platform.slots import Slots
from cl_platform.strategies.base import Component, Context, Pass, Strategy


class Teacher(nn.Module):
    """A copy of every tensor that training can change, put in place of the live one for a forward pass.

    A frozen trunk is shared. Slots that came after the copy are hidden meanwhile, so that a grown head answers over the
    classes it knew. One copy serves all strategies of a composition; it lives in ``state_dict`` like all that is
    learnt.

    Args:
        context: the learner's parts.
        features_owner: the strategy that computes the features, if one does.
    """

    def __init__(self, context: Context, features_owner: Strategy | None) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {"head": context.head, "backbone": context.backbone}
        if features_owner is not None:
            parts["features"] = features_owner
        # plain references: nothing of the learner is a submodule of its teacher
        object.__setattr__(self, "_parts", parts)
        object.__setattr__(self, "_features", features_owner)
        self._context = context
        self.copy = _Copies()

    _parts: dict[str, nn.Module]
    _features: Strategy | None

    @property
    def ready(self) -> bool:
        """Whether a task has ended."""
        return len(self.copy.names) > 0

    @property
    def classes(self) -> list[int]:
        """Classes that it knows, ascending: the columns of its logits."""
        with self._in_place():
            return self._context.head.classes

    def take(self, task_id: int) -> None:
        """Copy the learner as it is, at the end of the task ``task_id``."""
        tensors = {name: tensor.detach().clone() for name, tensor in self._changing()}
        seen = {*self.copy.task_ids, *self._context.behind(task_id)} - {task_id}
        self.copy.fill(tensors, [*sorted(seen), task_id])

    def drop_task(self, task_id: int) -> None:
        """Keep no slot that went with a task, such as its head rows, and no copy at all that was taken at its end."""
        if self.copy.task_ids[-1:] == [task_id]:
            self.copy.fill({}, [])
            return
        gone = f".tasks.{task_id}."
        live = {name for name, _ in self._changing()}
        kept = {name: tensor for name, tensor in self.copy.items() if gone not in name or name in live}
        self.copy.fill(kept, self.copy.task_ids)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Pass:
        """What the teacher makes of a batch, in eval mode: features (B, D) and logits (B, its classes)."""
        with self._in_place():
            features = self._features(batch) if self._features is not None else self._context.plain_features(batch)
            return Pass(batch, features, self._context.head(features))

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        for part, module in self._parts.items():
            if part == "backbone" and self._context.backbone.frozen:
                continue
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                yield f"{part}.{name}", tensor

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        modules = [module for part in self._parts.values() for module in part.modules()]
        modes = [(module, module.training) for module in modules]
        with ExitStack() as stack:
            for part, module in self._parts.items():
                own = {
                    name.removeprefix(f"{part}."): tensor
                    for name, tensor in self.copy.items()
                    if name.startswith(f"{part}.")
                }
                stack.enter_context(_exchanged(module, own))
            try:
                for module in modules:
                    module.training = False
                yield
            finally:
                for module, mode in modes:
                    module.training = mode

    def components(self) -> Iterator[Component]:
        """The copy has seen every task so far."""
        yield Component("teacher", tuple(sorted(self.copy.task_ids)), "teacher", dict(self.state_dict()))


@contextmanager
def _exchanged(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """``module`` with other tensors under the given names, and without the slots that these names do not hold."""
    hidden: list[tuple[Slots, dict[str, nn.Module]]] = []
    put_back: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for prefix, slots in list(module.named_modules()):
            if isinstance(slots, Slots):
                start = f"{prefix}.tasks." if prefix else "tasks."
                known = {name[len(start) :].split(".", 1)[0] for name in tensors if name.startswith(start)}
                newer = {key: slots.tasks[key] for key in slots.tasks if key not in known}
                hidden.append((slots, dict(slots.tasks.items())))
                for key in newer:
                    del slots.tasks[key]
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            try:
                owner = module.get_submodule(path)
            except AttributeError:
                continue  # a slot that was dropped since
            table = owner._parameters if leaf in owner._parameters else owner._buffers
            put_back.append((owner, leaf, table[leaf]))  # type: ignore[arg-type]
            table[leaf] = tensor  # type: ignore[assignment]
        yield
    finally:
        for owner, leaf, live in reversed(put_back):
            table = owner._parameters if leaf in owner._parameters else owner._buffers
            table[leaf] = live  # type: ignore[assignment]
        for slots, all_slots in hidden:
            for key in list(slots.tasks):
                del slots.tasks[key]
            for key, slot in all_slots.items():
                slots.tasks[key] = slot


class _Copies(nn.Module):
    """Tensors by dotted name, and the tasks they have seen, the newest last; a ``state_dict`` alone restores them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0, dtype=torch.int64))
        self.seen: Tensor

    @property
    def names(self) -> list[str]:
        return [name for name in self._buffers if name != "seen"]

    @property
    def task_ids(self) -> list[int]:
        return [int(t) for t in self.seen.tolist()]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name.replace("/", "."), self._buffers[name]  # type: ignore[misc]

    def fill(self, tensors: dict[str, Tensor], task_ids: list[int]) -> None:
        for name in self.names:
            del self._buffers[name]
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "/"), tensor)
        self.seen = torch.tensor(task_ids, dtype=torch.int64, device=self.seen.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        seen = found.pop("seen", None)
        device = self.seen.device
        tensors = {name.replace("/", "."): torch.empty_like(t, device=device) for name, t in found.items()}
        self.fill(tensors, [] if seen is None else seen.tolist())
        super()._load_from_state_dict(state_dict, prefix, *args)
