"""What penalties share: where the parameters stood at the end of a task, remembered by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cl_platform.slots import Slots
from cl_platform.strategies.base import Component, Strategy

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

log = logging.getLogger("cl_platform")


class Anchored(NamedTuple):
    """A parameter in training, and what a record holds of it.

    Attributes:
        parameter: the live one.
        anchor: its value at the end of a task.
        importance: a weight for each of its entries; ``None`` stands for ones.
    """

    parameter: nn.Parameter
    anchor: Tensor
    importance: Tensor | None


class Records(Slots):
    """One record per task that left some: groups of tensors under the names of parameters, and the tasks behind it.

    A name that a record lacks did not exist, or was not trained, when the record was made. So rows of a head that were
    added later are in none of the sums over a record.
    """

    def __init__(self) -> None:
        super().__init__(buffers=None)

    def write(self, task_id: int, seen: Sequence[int], **groups: Mapping[str, Tensor]) -> None:
        """Copy the tensors of each group by parameter name; ``seen`` are the tasks that could have shaped them."""
        tensors = {f"{group}/{n.replace('.', '/')}": t for group, named in groups.items() for n, t in named.items()}
        device = next(iter(tensors.values())).device if tensors else None
        self.add(task_id, seen=torch.tensor(sorted(seen), dtype=torch.int64, device=device), **tensors)

    def read(self, task_id: int, group: str) -> dict[str, Tensor]:
        """The tensors of a group by parameter name, themselves and not copies."""
        start = f"{group}/"
        held = self.tasks[str(task_id)].named_buffers()
        return {name.removeprefix(start).replace("/", "."): t for name, t in held if name.startswith(start)}

    def seen(self, task_id: int) -> list[int]:
        """Tasks that could have shaped a record, ascending."""
        return [int(t) for t in self.get(task_id, "seen").tolist()]

    def drop_slot(self, task_id: int) -> None:
        """Remove from every record what it holds of another part's slot of ``task_id``, such as its head rows."""
        for record in self.tasks.values():
            for name in [n for n, _ in record.named_buffers() if f"/tasks/{task_id}/" in n]:
                del record._buffers[name]


class AnchoringStrategy(Strategy):
    """A strategy that pulls parameters to where they stood, by how much each of their entries mattered.

    Args:
        config: an instance of the class's ``Config``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.records = Records()
        self._anchored: list[Anchored] | None = None
        self._said = False

    def begin_task(self, task: Task) -> None:
        """Match parameters with records anew at the first step: what is trained may have changed."""
        self._anchored = None

    def penalised(self) -> dict[str, nn.Parameter]:
        """The parameters in question by name: all that answer and are trained."""
        return self.context.trained()

    def anchored(self) -> list[Anchored]:
        """Every trained parameter with every record that knows it."""
        if self._anchored is None:
            live, found = self.penalised(), []
            for task_id in self.records.task_ids:
                importance = self.records.read(task_id, "importance")
                for name, anchor in self.records.read(task_id, "anchor").items():
                    if name in live:
                        found.append(Anchored(live[name], anchor, importance.get(name)))
            self._anchored = found
            if self.records.task_ids and not found and not self._said:
                self._said = True
                log.warning("%s: nothing that is trained now existed before, so that it holds nothing", self.name)
        return self._anchored

    def positions(self, names: Sequence[str] = ()) -> dict[str, Tensor]:
        """Where the trained parameters and those called ``names`` stand now; names that are gone are left out."""
        trained = self.penalised()
        everything = {f"{part}.{n}": p for part, m in self.context.parts.items() for n, p in m.named_parameters()}
        wanted = [*trained, *(n for n in names if n not in trained and n in everything)]
        return {name: everything[name].detach() for name in wanted}

    def replace_records(self, task_id: int, **groups: Mapping[str, Tensor]) -> None:
        """Put one record, that of ``task_id``, in the place of all."""
        seen = self.tasks_behind(task_id)
        for old in self.records.task_ids:
            self.records.drop(old)
        self.records.write(task_id, seen, **groups)

    def tasks_behind(self, task_id: int) -> list[int]:
        """Tasks that shaped the parameters by the end of ``task_id``, dropped ones among them."""
        recorded = {t for record in self.records.task_ids for t in self.records.seen(record)}
        return sorted({*self.context.behind(task_id), *recorded})

    def components(self) -> Iterator[Component]:
        """A record belongs to all tasks that had been learnt when it was made."""
        for task_id in self.records.task_ids:
            tensors = dict(self.records.tasks[str(task_id)].state_dict())
            yield Component(f"records.tasks.{task_id}", tuple(self.records.seen(task_id)), "importance", tensors)

    def drop_task(self, task_id: int) -> None:
        """Remove a record that the task alone shaped, and its head rows from all; a record of several tasks stays."""
        if task_id in self.records and self.records.seen(task_id) == [task_id]:
            self.records.drop(task_id)
        self.records.drop_slot(task_id)
        self._anchored = None


def weighted_distance(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], importances: Sequence[Tensor | None]
) -> Tensor:
    """Sum over all entries of importance times squared distance to the anchor; ``None`` weighs every entry by one."""
    terms = []
    for parameter, anchor, importance in zip(parameters, anchors, importances, strict=True):
        squared = (parameter - anchor).square()
        terms.append((squared if importance is None else importance * squared).sum())
    return torch.stack(terms).sum()


def distance(anchored: Sequence[Anchored]) -> Tensor:
    """:func:`weighted_distance` of matched parameters."""
    parameters, anchors, importances = zip(*anchored, strict=True)
    return weighted_distance(parameters, anchors, importances)
