"""Policies that hold classes in balance: reservoirs per class, BFP's balanced reservoir, GDumb's greedy sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cl_platform.errors import UserError
from cl_platform.memory.grouping import occurrence, shares
from cl_platform.memory.policies import Contents, Decision, Offers, Policy, last_writes
from cl_platform.memory.uniforms import Floats, Ints, counter_uniforms


def top_keys(labels: Ints, keys: Floats, quotas: Ints) -> NDArray[np.bool_]:
    """The examples with the largest keys of each class, as many as the class's quota.

    Args:
        labels: (n,) class ids below ``len(quotas)``.
        keys: (n,) one number per example.
        quotas: (C,) places of each class id.

    Returns:
        (n,) bool.
    """
    order = np.lexsort((-keys, labels))
    kept = np.empty(len(labels), dtype=np.bool_)
    kept[order] = occurrence(labels[order]) < quotas[labels[order]]
    return kept


class ClassBalanced(Policy):
    """For each class a uniform sample of its offers; quotas as equal as the numbers of offers allow.

    An offer's key is a function of its class, its task and its place among their offers; a class holds the offers with
    the largest keys. What leaves never had to come back: quotas of classes with more offers than places do not rise,
    until a task is dropped. Then a class refuses offers below the largest key that it ever let go, which keeps its
    rows a uniform sample, and may leave some of its quota empty.

    Args:
        fixed_classes: K; every class has ``capacity // K`` places, whatever the other classes offer.
    """

    name = "class_balanced"
    keyed = True

    def __init__(self, capacity: int, seed: int = 0, fixed_classes: int | None = None) -> None:
        super().__init__(capacity, seed)
        self.fixed_classes = fixed_classes
        self.fixed_quota = None if fixed_classes is None else fixed_quota(capacity, fixed_classes)
        self.shared = self.fixed_quota is None
        self.floors: dict[int, float] = {}  # the largest key that a class let go

    def decide(self, offers: Offers, contents: Contents) -> Decision:
        """See :class:`Policy`."""
        assert contents.keys is not None
        before = self.ledger.add(offers.labels, offers.task_ids)
        self.offers += len(offers)
        keys, _ = counter_uniforms(self.seed, before, offers.labels, offers.task_ids)
        size = 1 + max(self.ledger.classes, default=-1)
        quotas, floors = self._quotas(size), self._floors(size)
        entering = np.flatnonzero(keys > floors[offers.labels])
        touched = np.bincount(contents.labels, minlength=size) > quotas
        touched[offers.labels[entering]] = True
        held = np.flatnonzero(touched[contents.labels])
        labels = np.r_[contents.labels[held], offers.labels[entering]]
        all_keys = np.r_[contents.keys[held], keys[entering]]
        kept = top_keys(labels, all_keys, quotas)
        for label, key in zip(labels[~kept].tolist(), all_keys[~kept].tolist(), strict=True):
            self.floors[label] = max(self.floors.get(label, 0.0), key)
        leaving, sources = held[~kept[: len(held)]], entering[kept[len(held) :]]
        return self._placed(leaving, sources, keys, len(contents))

    def _placed(self, leaving: Ints, sources: Ints, keys: Floats, filled: int) -> Decision:
        keep = None
        if len(leaving) > len(sources):
            keep = np.setdiff1d(np.arange(filled), leaving[len(sources) :])
            leaving = leaving[: len(sources)]
            leaving = np.searchsorted(keep, leaving)
            filled = len(keep)
        slots = np.r_[leaving, np.arange(filled, filled + len(sources) - len(leaving))]
        return Decision(slots, sources, keep, keys[sources])

    def _quotas(self, size: int) -> Ints:
        offered = self.ledger.classes
        quotas = np.zeros(size, dtype=np.int64)
        ids = np.fromiter(offered, np.int64, len(offered))
        if self.fixed_quota is None:
            quotas[ids] = shares(np.fromiter(offered.values(), np.int64, len(offered)), self.capacity)
            return quotas
        refuse_more_classes(len(offered), self.fixed_classes)
        quotas[ids] = self.fixed_quota
        return quotas

    def _floors(self, size: int) -> Floats:
        floors = np.full(size, -1.0)
        for label, floor in self.floors.items():
            floors[label] = floor
        return floors

    def drop_task(self, task_id: int, contents: Contents) -> None:
        """See :class:`Policy`."""
        super().drop_task(task_id, contents)
        self.floors = {label: floor for label, floor in self.floors.items() if label in self.ledger.classes}

    def host_state(self) -> dict[str, Any]:
        """See :class:`Policy`."""
        floors = {
            "floor_classes": np.array(list(self.floors), dtype=np.int64),
            "floor_keys": np.array(list(self.floors.values()), dtype=np.float64),
        }
        return {**super().host_state(), **floors}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`Policy`."""
        super().load_host_state(state)
        self.floors = dict(zip(state["floor_classes"].tolist(), state["floor_keys"].tolist(), strict=True))


def fixed_quota(capacity: int, classes: int) -> int:
    """Places of each class when ``capacity`` is divided once for all among ``classes``.

    Raises:
        UserError: there is no place for each class.
    """
    if not 1 <= classes <= capacity:
        allowed = f"must be from 1 to the {capacity} slots of the buffer"
        raise UserError("buffer.fixed_classes", classes, allowed, "Change buffer.fixed_classes or buffer.size")
    return capacity // classes


def refuse_more_classes(seen: int, fixed_classes: int | None) -> None:
    """Raise ``UserError`` where more classes were seen than places were divided among."""
    if fixed_classes is not None and seen > fixed_classes:
        allowed = f"the stream has more classes ({seen} so far)"
        raise UserError("buffer.fixed_classes", fixed_classes, allowed, "Raise buffer.fixed_classes")


class Occupants:
    """Classes of the filled slots while a batch is decided, and draws from the classes that hold most of them."""

    def __init__(self, contents: Contents, offers: Offers, capacity: int) -> None:
        self.filled, self.capacity = len(contents), capacity
        self.labels = np.full(capacity, -1, dtype=np.int64)
        self.labels[: self.filled] = contents.labels
        size = 1 + int(max(contents.labels.max(initial=0), offers.labels.max()))
        self.counts = np.bincount(contents.labels, minlength=size)

    def place(self, label: int, uniform: float) -> int:
        """The slot that an accepted example of class ``label`` gets: a free one, or one of a largest class."""
        if self.filled < self.capacity:
            slot = self.filled
            self.filled += 1
        else:
            slot = self.of_largest_class(uniform)
            self.counts[self.labels[slot]] -= 1
        self.labels[slot] = label
        self.counts[label] += 1
        return slot

    def of_largest_class(self, uniform: float) -> int:
        """A slot among those of the classes that hold the most, each equally likely."""
        most = int(self.counts.max())
        largest = np.flatnonzero(self.counts == most)
        place, member = divmod(int(uniform * (len(largest) * most)), most)
        return int(np.flatnonzero(self.labels == largest[place])[member])


class ReservoirBalanced(Policy):
    """Reservoir acceptance, and eviction from the largest classes (the buffer of Gu et al., CVPR 2023).

    Offer ``i`` is accepted with probability ``min(1, capacity / (i + 1))``; in a full buffer it replaces a random one
    of the examples of the classes that hold the most at that moment.
    """

    name = "reservoir_balanced"

    def decide(self, offers: Offers, contents: Contents) -> Decision:
        """See :class:`Policy`."""
        first = self.ledger.total  # offers of dropped tasks do not count
        accept, evict = counter_uniforms(self.seed, self._count(offers))
        index = np.arange(first, self.ledger.total)
        accepted = np.flatnonzero(np.floor(accept * (index + 1)) < self.capacity)
        if not len(accepted):
            return Decision()
        slots = np.full(len(offers), -1, dtype=np.int64)
        now = Occupants(contents, offers, self.capacity)
        for row in accepted.tolist():
            slots[row] = now.place(int(offers.labels[row]), float(evict[row]))
        return Decision(*last_writes(slots))


class Greedy(Policy):
    """GDumb's greedy balancing sampler (Prabhu et al., ECCV 2020).

    ``paper``: an example is stored while its class holds fewer than ``capacity // classes seen``; in a full buffer it
    replaces a random one of the examples of the largest classes. ``first_k``, as the released code: the first
    ``capacity // fixed_classes`` examples of each class.

    Args:
        fixed_classes: classes of the whole scenario, needed by ``first_k``.
    """

    name = "greedy"

    def __init__(
        self,
        capacity: int,
        seed: int = 0,
        mode: Literal["paper", "first_k"] = "paper",
        fixed_classes: int | None = None,
    ) -> None:
        super().__init__(capacity, seed)
        if mode == "first_k" and fixed_classes is None:
            allowed = "is needed by the mode first_k"
            raise UserError(
                "buffer.fixed_classes", fixed_classes, allowed, "Set it to the scenario's number of classes"
            )
        self.mode, self.fixed_classes = mode, fixed_classes
        self.quota = fixed_quota(capacity, fixed_classes or 1) if mode == "first_k" else None
        self.shared = self.quota is None

    def decide(self, offers: Offers, contents: Contents) -> Decision:
        """See :class:`Policy`."""
        seen = set(self.ledger.classes)
        _, evict = counter_uniforms(self.seed, self._count(offers))
        if self.mode == "first_k":
            refuse_more_classes(len(self.ledger.classes), self.fixed_classes)
        now = Occupants(contents, offers, self.capacity)
        slots = np.full(len(offers), -1, dtype=np.int64)
        for row, label in enumerate(offers.labels.tolist()):
            new = label not in seen
            seen.add(label)
            target = self.capacity // len(seen) if self.quota is None else self.quota
            if now.counts[label] >= target and not (new and self.quota is None):
                continue
            slots[row] = now.place(label, float(evict[row]))
        return Decision(*last_writes(slots))
