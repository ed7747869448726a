"""What evaluation may cost: the plan of a run, the size of its subsets, a task's quota and the spacing within it.

Costs are image forwards: one image through the whole trunk once is 1. Shares are exact fractions of the decimals that
were configured, so that no decision hangs on rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

Number = int | float | str | Decimal | Fraction

UNKNOWN_UPDATES = 1024
"""Updates assumed of a task of unknown length; doubled whenever they have passed."""
EVALUATIONS_PER_TASK = 12
"""Evaluations per task that subsets of automatic size leave room for."""
SMALLEST, LARGEST = 25, 100
"""Bounds of the automatic number of images per task."""


def exact(value: Number) -> Fraction:
    """The decimal as it is written: 0.1 is one tenth."""
    return Fraction(str(value))


@dataclass(frozen=True)
class Plan:
    """What a run will train, what its evaluations cost, and what they may cost.

    Attributes:
        updates: planned optimizer updates of each task, ``None`` for a task of unknown length; ``None`` for an unknown
            stream.
        forwards_per_update: training's image forwards in one update, replayed images and second passes included.
        weight: image forwards of one evaluated image, below 1 where activations are kept.
        max_overhead: bound on evaluation's forwards over three times training's (backward counts as two forwards).
        max_rate: bound on the evaluated share of a task's updates, in (0, 1].
        min_per_task: evaluations of a task that even an exhausted budget allows.
        reserve: share of a task's evaluations kept for following new lows, in [0, 1).

    Raises:
        ValueError: a value outside its range.
    """

    updates: Sequence[int | None] | None
    forwards_per_update: Number
    weight: Number = 1
    max_overhead: Number = 0.25
    max_rate: Number = 0.1
    min_per_task: int = 3
    reserve: Number = 0.2

    def __post_init__(self) -> None:
        for name, allowed in (
            ("updates", all(n is None or n >= 0 for n in self.updates or ())),
            ("forwards_per_update", exact(self.forwards_per_update) > 0),
            ("weight", exact(self.weight) > 0),
            ("max_overhead", exact(self.max_overhead) > 0),
            ("max_rate", 0 < exact(self.max_rate) <= 1),
            ("min_per_task", self.min_per_task >= 1),
            ("reserve", 0 <= exact(self.reserve) < 1),
        ):
            if not allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is out of range")

    def budget(self, updates: int) -> Fraction:
        """Image forwards that evaluation may spend on so many updates."""
        return exact(self.max_overhead) * 3 * exact(self.forwards_per_update) * updates

    def overhead(self, images: int, updates: int) -> Fraction | None:
        """Evaluated images' forwards over three times those of so many updates; ``None`` without an update."""
        if not updates:
            return None
        return images * exact(self.weight) / (3 * exact(self.forwards_per_update) * updates)


def images_per_task(plan: Plan) -> int:
    """Evaluation images per task that leave room for twelve evaluations of each task: 25 to 100.

    An unknown stream counts as one task, a task of unknown length as ``UNKNOWN_UPDATES`` updates.
    """
    known = [None] if plan.updates is None else plan.updates
    updates = [UNKNOWN_UPDATES if n is None else n for n in known]
    seen = sum(k + 1 for k, n in enumerate(updates) if n)
    if not seen:
        return SMALLEST
    fitting = plan.budget(sum(updates)) / (EVALUATIONS_PER_TASK * seen * exact(plan.weight))
    return max(SMALLEST, min(LARGEST, math.floor(fitting)))


@dataclass(frozen=True)
class Quota:
    """How often a task may be evaluated.

    Attributes:
        updates: the task's updates that the quota is for.
        evaluations: the quota.
        allowance: what ``max_rate`` gives the task by itself, earlier tasks' rest left aside.
        thinned: whether ``max_overhead`` allows less than ``max_rate``.
        excess: planned overhead, if ``min_per_task`` takes it above ``max_overhead``.
    """

    updates: int
    evaluations: int
    allowance: int
    thinned: bool
    excess: Fraction | None


def quota_of(
    plan: Plan, images: int, position: int, own: int, planned: Sequence[int] | None, passes: int, carry: int
) -> Quota:
    """The quota of the task at a position; the first task, where nothing can be forgotten yet, gets half.

    Args:
        plan: costs and bounds.
        images: evaluation images per task.
        position: of the task.
        own: its updates, planned or assumed.
        planned: updates of every task of the stream; ``None`` judges the task as if it were the only one.
        passes: evaluated tasks, summed over the evaluations of earlier tasks.
        carry: evaluations that earlier tasks left over.
    """
    trained, spent, later = own, 0, {position: own}
    if planned is not None:
        trained, spent = sum(planned) - planned[position] + own, passes
        later |= {i: n for i, n in enumerate(planned) if i > position}
    cost = images * exact(plan.weight)
    allowance = math.floor(exact(plan.max_rate) * own)
    load = cost * sum(n * (i + 1) for i, n in later.items())
    left = max(Fraction(0), plan.budget(trained) - spent * cost)
    affordable = math.floor(left * own / load) if load else 0
    wanted = min(allowance + carry, affordable)
    if position == 0:
        wanted = math.ceil(Fraction(wanted, 2))
    evaluations = max(min(plan.min_per_task, own), min(own, wanted))
    excess = None
    if evaluations > wanted:
        fewest = sum(min(plan.min_per_task, n) * (i + 1) for i, n in later.items())
        overhead = plan.overhead(images * (spent + fewest), trained)
        excess = overhead if overhead is not None and overhead > exact(plan.max_overhead) else None
    return Quota(own, evaluations, allowance, affordable < allowance + carry, excess)


def next_base(last: int, updates: int, left: int) -> int:
    """The offset to evaluate next if nothing happens, so that the ratio of neighbouring offsets stays the same.

    Args:
        last: last evaluated offset, 0 before the first.
        updates: of the task; its last offset is always evaluated.
        left: evaluations left, that of the last offset included.
    """
    if left <= 1:
        return updates
    if last == 0:
        return 1
    target = updates * last ** (left - 1)
    bound = max(last + 1, updates - left + 1)
    below, found, stride = last, last + 1, 1
    while found < bound and found**left < target:  # the gap is mostly small: stride out, then halve
        below, stride = found, 2 * stride
        found = min(bound, found + stride)
    while found - below > 1:
        middle = (below + found) // 2
        if middle**left < target:
            below = middle
        else:
            found = middle
    return found
