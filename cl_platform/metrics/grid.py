"""Evaluation grids: after which updates of a task the evaluation subsets are answered.

A grid decides from the configuration and the right answers so far alone, in integers and fractions, so that a run, its
replay and its resumption decide alike. It neither evaluates nor reads a clock.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from cl_platform.metrics.evaluation_budget import (
    UNKNOWN_UPDATES,
    Plan,
    Quota,
    exact,
    images_per_task,
    next_base,
    quota_of,
)

__all__ = ["Adaptive", "Boundaries", "Every", "EveryStep", "Grid", "Plan", "build_grid", "images_per_task"]


class Grid(ABC):
    """A state machine that is asked after every update and told of every evaluation it asked for.

    The order of calls is ``begin_task``, then for offsets 1, 2, .. ``due`` and, where evaluated, ``record``, then
    ``end_task``. An offset counts the updates since the start of the task. The evaluations before the first update and
    after the end of a task are none of its business, and no part of its overhead.

    Args:
        plan: what the run will train and what an evaluation costs; without it there is no overhead to tell.
        images: evaluation images per task.

    Raises:
        ValueError: ``images`` is below 1.
    """

    def __init__(self, plan: Plan | None = None, images: int = 1) -> None:
        if images < 1:
            raise ValueError(f"images {images} is below 1")
        self.plan, self.images = plan, images
        self.evaluations = 0
        self.last = 0  # last evaluated offset of the current task, 0 before the first
        self.position = 0
        self._passes = 0  # evaluated tasks, summed over evaluations
        self._updates: list[int | None] = [] if plan is None or plan.updates is None else list(plan.updates)
        self._open_ended = plan is None or plan.updates is None

    def begin_task(self, position: int, updates: int | None, low: Mapping[int, int]) -> None:
        """Start a task.

        Args:
            position: its place in the stream.
            updates: planned optimizer updates, ``None`` if unknown.
            low: position of an old task -> its right answers at the ``end`` of the task before, or the fewest since its
                own. Tasks that are left out, forgotten ones say, steer nothing.
        """
        self.position, self.last = position, 0
        self._updates += [None] * (position + 1 - len(self._updates))
        self._updates[position] = updates

    @abstractmethod
    def due(self, offset: int) -> bool:
        """Whether to evaluate after update ``offset`` (1, 2, ..) of the task; asking changes nothing."""

    def record(self, offset: int, correct: Mapping[int, int]) -> None:
        """Take note of an evaluation.

        Args:
            offset: updates since the task's start.
            correct: position of every evaluated task -> right answers; the current task's steer nothing.

        Raises:
            ValueError: ``offset`` is not after the last one.
        """
        if offset <= self.last:
            raise ValueError(f"offset {offset} is not after {self.last}")
        self.last = offset
        self.evaluations += 1
        self._passes += self.position + 1

    def end_task(self) -> None:  # noqa: B027 (most grids keep nothing)
        """Close the current task."""

    def notes(self) -> list[str]:
        """What the user should read now that the current task has begun, a line each."""
        return []

    @property
    def overhead(self) -> Fraction | None:
        """Forwards of the evaluations so far over three times training's planned ones; ``None`` if unknown."""
        planned = self._planned()
        if self.plan is None or planned is None:
            return None
        return self.plan.overhead(self._passes * self.images, sum(planned))

    def to_dict(self) -> dict[str, Any]:
        """The state as plain JSON, at any moment; the configuration is not part of it."""
        return {
            "grid": type(self).__name__,
            "evaluations": self.evaluations,
            "last": self.last,
            "position": self.position,
            "passes": self._passes,
            "updates": list(self._updates),
        }

    def load_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`to_dict` of a grid of the same configuration gave.

        Raises:
            ValueError: the state of another kind of grid.
        """
        if state["grid"] != type(self).__name__:
            raise ValueError(f"the state of grid {state['grid']} does not fit {type(self).__name__}")
        self.evaluations, self.last, self.position = state["evaluations"], state["last"], state["position"]
        self._passes, self._updates = state["passes"], list(state["updates"])

    def _planned(self) -> list[int] | None:
        """Updates of every task of the stream, ``None`` if any is unknown."""
        known = [n for n in self._updates if n is not None]
        return None if self._open_ended or len(known) < len(self._updates) else known


class Boundaries(Grid):
    """Nothing between the start and the end of a task; also stands for no evaluation at all."""

    def due(self, offset: int) -> bool:
        """Never."""
        return False


class Every(Grid):
    """Every k-th update of a task and its last one, whatever it costs.

    Args:
        k: updates between two evaluations.
        plan: see :class:`Grid`.
        images: see :class:`Grid`.

    Raises:
        ValueError: ``k`` or ``images`` is below 1.
    """

    def __init__(self, k: int, plan: Plan | None = None, images: int = 1) -> None:
        if k < 1:
            raise ValueError(f"k {k} is below 1")
        super().__init__(plan, images)
        self.k = k

    def due(self, offset: int) -> bool:
        """At multiples of k; at the last update if it is known which that is."""
        return offset > self.last and (offset % self.k == 0 or offset == self._updates[self.position])

    def notes(self) -> list[str]:
        """What all evaluations will cost, before the first of them, if the lengths of all tasks are known."""
        planned = self._planned()
        if self.plan is None or planned is None or self.evaluations:
            return []
        passes = sum(-(-n // self.k) * (position + 1) for position, n in enumerate(planned))
        overhead = self.plan.overhead(passes * self.images, sum(planned))
        if overhead is None:
            return []
        when = "every update" if self.k == 1 else f"every {self.k} updates"
        return [f"evaluation after {when} has an overhead of {_decimal(overhead)}; evaluation.max_overhead is ignored"]


class EveryStep(Every):
    """Every update of a task, whatever it costs; arguments as of :class:`Grid`."""

    def __init__(self, plan: Plan | None = None, images: int = 1) -> None:
        super().__init__(1, plan, images)


class Adaptive(Grid):
    """Spends a budget of evaluations where old tasks reach new lows.

    A task starts with evaluations in a burst whose distances grow by a constant ratio. A new low of an old task is
    followed every two updates until there is none, paid from a reserve; what remains of the reserve densifies the rest.

    Args:
        plan: costs and bounds.
        images: evaluation images per task.

    Raises:
        ValueError: ``images`` is below 1.
    """

    def __init__(self, plan: Plan, images: int) -> None:
        super().__init__(plan, images)
        self._costs = plan
        self.quota = Quota(0, 0, 0, False, None)  # of the current task, of the last one between tasks
        self.carry = 0  # evaluations that earlier tasks left over
        self.used = 0  # evaluations of the current task
        self.low: dict[int, int] = {}  # old position -> fewest right answers since its end
        self._follow: int | None = None  # offset from which the last new low is followed
        self._next = 0  # the next planned offset
        self._paid = 0  # ``_passes`` before the current task
        self._excess_at: int | None = None  # position at which the user is told of the excess

    def begin_task(self, position: int, updates: int | None, low: Mapping[int, int]) -> None:
        """Start a task with its quota; see :meth:`Grid.begin_task`."""
        super().begin_task(position, updates, low)
        self.low = {j: min(right, self.low.get(j, right)) for j, right in low.items() if j < position}
        self.used, self._follow, self._paid = 0, None, self._passes
        self.quota = self._quota(UNKNOWN_UPDATES if updates is None else updates)
        self._next = self._base(self.quota)
        if self.quota.excess is not None and self._excess_at is None:
            self._excess_at = position

    def due(self, offset: int) -> bool:
        """At the planned offsets, at the last one, and while a new low is followed."""
        if offset <= self.last:
            return False
        quota, base = self.quota, self._next
        if offset > quota.updates:  # the task goes on beyond what was planned
            quota = self._quota(_doubled(quota.updates, offset))
            base = self._base(quota)
        follows = self._follow is not None and offset >= self._follow and quota.evaluations - self.used > 1
        return offset == quota.updates or offset >= base or follows

    def record(self, offset: int, correct: Mapping[int, int]) -> None:
        """Take note of an evaluation and plan what remains; see :meth:`Grid.record`."""
        super().record(offset, correct)
        self.used += 1
        fell = [j for j, right in correct.items() if j in self.low and right < self.low[j]]
        self.low |= {j: correct[j] for j in fell}
        self._follow = offset + 2 if fell else None
        if offset > self.quota.updates:
            self.quota = self._quota(_doubled(self.quota.updates, offset))
        self._next = self._base(self.quota)

    def end_task(self) -> None:
        """Close the current task; what it left over goes to the next ones, at most a task's own allowance."""
        allowance = self.quota.allowance
        self.carry = max(0, min(allowance, allowance + self.carry - self.used))
        planned = self._updates[self.position]
        if planned is not None:  # a task that went on has trained, and paid, for at least this long
            self._updates[self.position] = max(planned, self.last)

    def notes(self) -> list[str]:
        """That the budget thins the task out; once, that ``min_per_task`` does not fit into the budget."""
        quota, lines = self.quota, []
        if quota.thinned and quota.evaluations < quota.updates:
            first = "the first " if self._updates[self.position] is None else ""
            of = f"{quota.evaluations} of {first}{quota.updates}"
            lines.append(f"evaluation thinned to {of} updates (evaluation.max_overhead)")
        if quota.excess is not None and self._excess_at == self.position:
            lines.append(
                f"evaluation.min_per_task={self._costs.min_per_task} takes the overhead to {_decimal(quota.excess)}, "
                f"{_decimal(quota.excess - exact(self._costs.max_overhead))} above evaluation.max_overhead"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The state as plain JSON; see :meth:`Grid.to_dict`."""
        return super().to_dict() | {
            "carry": self.carry,
            "used": self.used,
            "low": {str(j): right for j, right in self.low.items()},
            "follow": self._follow,
            "quota": asdict(self.quota) | {"excess": None if self.quota.excess is None else str(self.quota.excess)},
            "paid": self._paid,
            "excess_at": self._excess_at,
        }

    def load_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; see :meth:`Grid.load_dict`."""
        super().load_dict(state)
        self.carry, self.used, self._follow = state["carry"], state["used"], state["follow"]
        self.low = {int(j): right for j, right in state["low"].items()}
        quota = dict(state["quota"])
        self.quota = Quota(**quota | {"excess": None if quota["excess"] is None else Fraction(quota["excess"])})
        self._paid, self._excess_at = state["paid"], state["excess_at"]
        self._next = self._base(self.quota)

    def _quota(self, updates: int) -> Quota:
        """The current task's quota if it has so many updates; its own evaluations so far are not taken off."""
        return quota_of(self._costs, self.images, self.position, updates, self._planned(), self._paid, self.carry)

    def _base(self, quota: Quota) -> int:
        """The next planned offset; a task's first evaluation is after its first update, however large the reserve."""
        left = quota.evaluations - self.used
        planned = math.ceil(left * (1 - exact(self._costs.reserve))) if self.position else left
        return next_base(self.last, quota.updates, planned if self.used else max(planned, min(left, 2)))


def build_grid(name: str, plan: Plan, images: int, k: int = 10) -> Grid:
    """The grid of a configuration.

    Args:
        name: ``adaptive``, ``every_step``, ``every``, ``boundaries`` or ``off``.
        plan: what the run will train, what evaluations cost and may cost.
        images: evaluation images per task.
        k: updates between two evaluations of ``every``.

    Raises:
        ValueError: another name, or ``images`` or ``k`` below 1.
    """
    if name == "adaptive":
        return Adaptive(plan, images)
    if name == "every":
        return Every(k, plan, images)
    if name == "every_step":
        return EveryStep(plan, images)
    if name in ("boundaries", "off"):
        return Boundaries(plan, images)
    raise ValueError(f"grid {name!r} is none of adaptive, every_step, every, boundaries, off")


def _doubled(updates: int, offset: int) -> int:
    """A number of updates that the offset lies within."""
    while offset > updates:
        updates = 2 * updates or UNKNOWN_UPDATES
    return updates


def _decimal(share: Fraction) -> str:
    return f"{float(share):.4g}"
