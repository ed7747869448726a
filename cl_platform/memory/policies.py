"""Which offered examples a buffer keeps: the interface of policies, reservoir sampling and rings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cl_platform.errors import UserError
from cl_platform.memory.grouping import Ledger, occurrence
from cl_platform.memory.host_state import HostState
from cl_platform.memory.uniforms import Floats, Ints, counter_uniforms

BLOCK = 4096
"""Decisions that are computed at a time, where they do not depend on what is offered."""

NOTHING: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Contents:
    """What a buffer holds, on the host, in ascending slot.

    Attributes:
        labels: (filled,) int64 class ids.
        task_ids: (filled,) int64.
        example_ids: (filled,) int64.
        keys: (filled,) float64, or None for policies without keys.
    """

    labels: Ints
    task_ids: Ints
    example_ids: Ints
    keys: Floats | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Offers:
    """What a batch offers to a buffer, on the host.

    Attributes:
        labels: (n,) int64 class ids.
        task_ids: (n,) int64.
        example_ids: (n,) int64, rows of the data set.
        features: (n, D) float, for policies that select by features.
    """

    labels: Ints
    task_ids: Ints
    example_ids: Ints
    features: NDArray[Any] | None = None

    @classmethod
    def of(cls, labels: Any, task_ids: Any, example_ids: Any, features: Any = None) -> Offers:
        """From tensors on the host, arrays or lists.

        Raises:
            ValueError: a tensor on another device (reading it would wait for the device), or unequal lengths.
        """
        columns = [_on_host(column).astype(np.int64) for column in (labels, task_ids, example_ids)]
        found = None if features is None else _on_host(features)
        if len({len(c) for c in (*columns, *([] if found is None else [found]))}) > 1:
            raise ValueError("labels, task ids, example ids and features need one row per example")
        return cls(columns[0], columns[1], columns[2], found)

    def __len__(self) -> int:
        return len(self.labels)


def _on_host(column: Any) -> NDArray[Any]:
    if isinstance(column, Tensor):
        if column.device.type != "cpu":
            raise ValueError(f"a column of offers lies on {column.device}: give the copy that the host has")
        column = column.detach().numpy()
    return np.asarray(column)


@dataclass(frozen=True)
class Decision:
    """What to do with a batch: ``slots[k]`` takes the offered example ``sources[k]``.

    Attributes:
        slots: (w,) int64, no slot twice; slots that were empty continue the filled ones without a gap.
        sources: (w,) int64 rows of the batch.
        keep: (k,) int64 slots that stay, ascending: they move to slots 0..k-1 before anything is written. None: all.
        keys: (w,) float64, or None.
    """

    slots: Ints = field(default_factory=lambda: NOTHING)
    sources: Ints = field(default_factory=lambda: NOTHING)
    keep: Ints | None = None
    keys: Floats | None = None


class Policy(HostState):
    """Decides on host integers alone which offers a buffer keeps; all that it remembers is in ``state_dict``.

    ``when`` says what is offered: every batch (``step``) or a finished task as a whole (``task_end``). ``keyed``
    policies store a number beside each example. ``shared``: which rows of a task stay depends on what other tasks
    offered; where it does not, a dropped task leaves what a buffer holds that never saw it.

    Args:
        capacity: slots M >= 1.
        seed: of the stream of draws, from :func:`cl_platform.random_streams.stream_seed`.
    """

    name: ClassVar[str] = ""
    when: ClassVar[Literal["step", "task_end"]] = "step"
    keyed: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False
    shared: bool = True

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__()
        if capacity < 1:
            raise UserError("buffer.size", capacity, "must be at least 1", "Raise buffer.size")
        self.capacity, self.seed = capacity, seed
        self.offers = 0
        self.ledger = Ledger()

    def decide(self, offers: Offers, contents: Contents) -> Decision:
        """What to keep of ``offers``, of which there is at least one; each call counts them: carry its answer out."""
        raise NotImplementedError

    def drop_task(self, task_id: int, contents: Contents) -> None:
        """Forget what ``task_id`` offered; called with what the buffer held before its rows were removed."""
        dropped = self.ledger.drop_task(task_id)
        if not self.shared:  # no draw depends on the number of offers
            self.offers -= dropped

    def host_state(self) -> dict[str, Any]:
        """``offers``: all that were ever made, of dropped tasks too if ``shared``; ``ledger``: of the present tasks."""
        return {"offers": np.int64(self.offers), "ledger": self.ledger.to_array()}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`host_state` gave."""
        self.offers = int(state["offers"])
        self.ledger.load_array(state["ledger"])

    def _count(self, offers: Offers) -> Ints:
        """Enter a batch into the ledger; (n,) indices of the offers."""
        self.ledger.add(offers.labels, offers.task_ids)
        first = self.offers
        self.offers += len(offers)
        return np.arange(first, self.offers, dtype=np.int64)


def reservoir_slots(uniforms: Floats, first: int, capacity: int) -> Ints:
    """The slot that sequential reservoir sampling writes each offer to (algorithm R), -1 for those it refuses.

    Offer ``i`` goes to slot ``i`` while ``i < capacity``, then to ``j = floor(u (i + 1))`` if ``j < capacity``: after
    ``N >= capacity`` offers every subset of that size is equally likely.

    Args:
        uniforms: (n,) float64 in [0, 1), one per offer.
        first: index of the first offer.
        capacity: slots.

    Returns:
        (n,) int64.
    """
    index = np.arange(first, first + len(uniforms), dtype=np.int64)
    drawn = np.floor(uniforms * (index + 1)).astype(np.int64)  # below i + 1: float64 rounds no product up to it
    slots = np.where(index < capacity, index, drawn)
    return np.where(slots < capacity, slots, -1)


def last_writes(slots: Ints) -> tuple[Ints, Ints]:
    """Turn a sequence of writes into one that writes no slot twice; the last write to a slot stays.

    Args:
        slots: (n,) the slot of each offer, -1 for none.

    Returns:
        slots (w,) and the offers (w,) that go there, both int64.
    """
    sources = np.flatnonzero(slots >= 0)
    wanted = slots[sources]
    if len(sources) < 2:
        return wanted, sources
    last = dict(zip(wanted.tolist(), sources.tolist(), strict=True))  # a later write replaces an earlier one
    return np.fromiter(last, np.int64, len(last)), np.fromiter(last.values(), np.int64, len(last))


class Reservoir(Policy):
    """A uniform sample of all offers (Vitter 1985, algorithm R); decisions are a function of the offers' indices.

    When a task is dropped, later offers first stand in for its offers (random pairing, Gemulla et al. 2006), so that
    the buffer stays a uniform sample of what the other tasks offered.
    """

    name = "reservoir"

    def __init__(self, capacity: int, seed: int = 0) -> None:
        super().__init__(capacity, seed)
        self.dropped = 0  # offers of dropped tasks
        self.gaps = 0  # those of them that were in the buffer and that no later offer stands in for yet
        self.ghosts = 0  # those that were not in the buffer, likewise
        self._block, self._block_start = NOTHING, 0

    def decide(self, offers: Offers, contents: Contents) -> Decision:
        """See :class:`Policy`."""
        self.ledger.add(offers.labels, offers.task_ids)
        slots, sources = last_writes(self.take(len(offers), len(contents)))
        return Decision(slots, sources)

    def take(self, count: int, filled: int = 0) -> Ints:
        """Slots of the next offers, -1 for those that are refused.

        Args:
            count: number of offers.
            filled: slots in use; of influence after a task was dropped only.

        Returns:
            (count,) int64; a slot may stand there twice, the later offer stays.
        """
        paired = self._pair(min(count, self.gaps + self.ghosts), filled)
        first, stop = self.offers, self.offers + count - len(paired)
        if first < self._block_start or stop > self._block_start + len(self._block):
            uniforms, _ = counter_uniforms(self.seed, np.arange(first, max(stop, first + BLOCK)))
            self._block, self._block_start = reservoir_slots(uniforms, first - self.dropped, self.capacity), first
        self.offers = stop
        rest = self._block[first - self._block_start : stop - self._block_start]
        return np.concatenate([paired, rest]) if len(paired) else rest

    def _pair(self, count: int, filled: int) -> Ints:
        """Let ``count`` offers stand in for dropped ones: into a gap as often as the dropped ones left gaps."""
        if not count:
            return NOTHING
        uniforms, _ = counter_uniforms(self.seed, np.arange(self.offers, self.offers + count))
        slots = np.full(count, -1, dtype=np.int64)
        for row, uniform in enumerate(uniforms.tolist()):
            if int(uniform * (self.gaps + self.ghosts)) < self.gaps:
                slots[row] = filled
                filled, self.gaps = filled + 1, self.gaps - 1
            else:
                self.ghosts -= 1
        self.offers += count
        return slots

    def drop_task(self, task_id: int, contents: Contents) -> None:
        """See :class:`Policy`."""
        offered, held = self.ledger.drop_task(task_id), int((contents.task_ids == task_id).sum())
        self.dropped += offered
        self.gaps += held
        self.ghosts += offered - held
        self._block = NOTHING

    def host_state(self) -> dict[str, Any]:
        """See :class:`Policy`."""
        pairing = {"dropped": self.dropped, "gaps": self.gaps, "ghosts": self.ghosts}
        return {**super().host_state(), **{name: np.int64(value) for name, value in pairing.items()}}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`Policy`."""
        super().load_host_state(state)
        self.dropped, self.gaps, self.ghosts = (int(state[name]) for name in ("dropped", "gaps", "ghosts"))
        self._block = NOTHING


class Ring(Policy):
    """The last ``per_task`` offers of each task (Lopez-Paz and Ranzato 2017).

    Offer ``k`` of a task overwrites its offer ``k - per_task``. Official GEM never resets its counter at a switch and
    cuts the batch that crosses the ring's end; neither happens here.

    Args:
        capacity: slots of all rings together.
        per_task: slots m of one ring.
    """

    name = "ring"
    shared = False

    def __init__(self, capacity: int, per_task: int) -> None:
        super().__init__(capacity)
        if not 1 <= per_task <= capacity:
            allowed = f"must be from 1 to the {capacity} slots of the buffer"
            raise UserError("buffer.per_task", per_task, allowed, "Change buffer.per_task or buffer.size")
        self.per_task = per_task

    def decide(self, offers: Offers, contents: Contents) -> Decision:
        """See :class:`Policy`."""
        offered = self.ledger.tasks
        before = occurrence(offers.task_ids)
        slots = np.empty(len(offers), dtype=np.int64)
        filled = len(contents)
        for task_id in dict.fromkeys(offers.task_ids.tolist()):
            own = offers.task_ids == task_id
            places = (before[own] + offered.get(task_id, 0)) % self.per_task
            ring = np.flatnonzero(contents.task_ids == task_id)  # ascending slots stand in the ring's order
            missing = max(0, min(self.per_task, offered.get(task_id, 0) + int(own.sum())) - len(ring))
            ring = np.r_[ring, np.arange(filled, filled + missing)]
            filled += missing
            slots[own] = ring[places]
        if filled > self.capacity:
            allowed = (
                f"the {self.capacity} slots hold rings of {self.per_task} for {self.capacity // self.per_task} tasks"
            )
            raise UserError("buffer.per_task", self.per_task, f"{allowed} only", "Lower buffer.per_task")
        self._count(offers)
        return Decision(*last_writes(slots))
