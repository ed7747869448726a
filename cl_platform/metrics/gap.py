"""Scalars 3.1 to 3.9 of the stability gap: how far an old task falls when a new one starts, and whether it recovers.

For the switch to task k and an old task j: ``pre`` is the accuracy at the end of task k-1, ``low`` the lowest one
among the evaluations of the window, ``last`` the one at its end. Comparisons are exact, on the integer counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Literal

from cl_platform.metrics.continual import interpolated
from cl_platform.metrics.continual_log import Curves
from cl_platform.metrics.counts import Cell
from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined

Status = Literal["no_gap", "recovered", "censored", "not_evaluated"]

GAP_DEFINITIONS: tuple[Definition, ...] = (
    Definition("3.1", "gap_depth", "Accuracy before the switch minus the lowest after it, mean.", "fraction", "down"),
    Definition("3.1", "gap_depth_max", "Deepest gap (3.1) of all switches and old tasks.", "fraction", "down"),
    Definition("3.2", "gap_residual", "Part of the gap still lost at the end of the window, mean.", "fraction", "down"),
    Definition("3.3", "gap_transient", "Part of the gap that was won back, mean.", "fraction", "down"),
    Definition("3.3", "gap_transient_share", "Share of all gap depth that was won back.", "fraction", "up"),
    Definition("3.4", "gap_gain", "Accuracy won beyond the one before the switch, mean.", "fraction", "up"),
    Definition("3.5", "gap_recovery_time", "Updates until the old accuracy is back, median.", "updates", "down"),
    Definition("3.6", "gap_recovered_share", "Share of the gaps that recovered in their window.", "fraction", "up"),
    Definition("3.7", "gap_area", "Lost accuracy summed over the updates of the window, mean.", "updates", "down"),
    Definition("3.7m", "gap_area_mean", "Lost accuracy averaged over the window's updates, mean.", "fraction", "down"),
    Definition(
        "3.8", "gap_boundary_drop", "Accuracy lost before any update of the new task, mean.", "fraction", "down"
    ),
)
"""The run-level scalars in the order of their numbers."""


@dataclass(frozen=True)
class GapPair:
    """The gap of one old task at one switch; without any evaluation in the window, all numbers are ``None``.

    Attributes:
        k: position of the task that starts.
        j: position of the old task.
        status: whether there is a gap, and whether it recovered.
        pre: accuracy at the end of the task before.
        low: lowest accuracy in the window.
        low_offset: updates after the switch where ``low`` first was.
        depth: 3.1.
        residual: 3.2.
        transient: 3.3.
        gain: 3.4.
        recovery_time: 3.5 in updates; 0 without a gap.
        lower: last evaluated offset before the recovery; the true time lies in (lower, recovery_time].
        censored_at: last evaluated offset of a gap that did not recover.
        area: 3.7.
        area_mean: 3.7m.
        boundary_drop: 3.8.
        noise_floor: 3.9, the depth that chance alone exceeds in one pair of twenty.
        depth_significant: whether the depth is above the noise floor.
        window_cut: whether the task ended before its window did.
    """

    k: int
    j: int
    status: Status = "not_evaluated"
    pre: float | None = None
    low: float | None = None
    low_offset: int | None = None
    depth: float | None = None
    residual: float | None = None
    transient: float | None = None
    gain: float | None = None
    recovery_time: int | None = None
    lower: int | None = None
    censored_at: int | None = None
    area: float | None = None
    area_mean: float | None = None
    boundary_drop: float | None = None
    noise_floor: float | None = None
    depth_significant: bool | None = None
    window_cut: bool = False


def gap_pairs(curves: Curves, window: int | None = None, tolerance: float = 0.02) -> list[GapPair]:
    """Every switch and old task, ordered by switch, then old task; forgotten tasks are left out.

    Args:
        curves: the log of one prediction space.
        window: updates after the switch that count, ``None`` for the whole task.
        tolerance: an accuracy this far below the one before the switch counts as recovered.

    Raises:
        ValueError: ``window`` is below 1 or ``tolerance`` is not within 0 and 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window {window} is below 1")
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance {tolerance} is not within 0 and 1")
    slack = Fraction(str(tolerance))
    return [_pair(curves, k, j, window, slack) for k in range(1, curves.begun) for j in curves.kept if j < k]


def run_level(curves: Curves, pairs: Sequence[GapPair]) -> dict[str, Outcome]:
    """All scalars of the run under the keys of ``GAP_DEFINITIONS``; a mean over pairs needs every pair evaluated.

    Args:
        curves: the log of one prediction space.
        pairs: what :func:`gap_pairs` made of it.
    """
    reason = "empty" if not curves.begun else "needs_two_tasks" if not pairs else None
    if reason is not None:
        return {definition.key: Undefined(reason) for definition in GAP_DEFINITIONS}
    deep = deepest(pairs)
    return {
        "gap_depth": _mean_of(pairs, lambda pair: pair.depth),
        "gap_depth_max": Undefined("not_evaluated") if deep is None or deep.depth is None else Result(deep.depth),
        "gap_residual": _mean_of(pairs, lambda pair: pair.residual),
        "gap_transient": _mean_of(pairs, lambda pair: pair.transient),
        "gap_transient_share": _transient_share(pairs),
        "gap_gain": _mean_of(pairs, lambda pair: pair.gain),
        "gap_recovery_time": _recovery_time(pairs),
        "gap_recovered_share": _recovered_share(pairs),
        "gap_area": _mean_of(pairs, lambda pair: pair.area),
        "gap_area_mean": _mean_of(pairs, lambda pair: pair.area_mean),
        "gap_boundary_drop": _mean_of(pairs, lambda pair: pair.boundary_drop),
    }


def by_switch(pairs: Iterable[GapPair]) -> dict[int, dict[str, float | None]]:
    """Position of the new task -> mean over old tasks of each averaged scalar, ``None`` where one is missing."""
    groups: dict[int, list[GapPair]] = {}
    for pair in pairs:
        groups.setdefault(pair.k, []).append(pair)
    names = ("depth", "residual", "transient", "gain", "area", "area_mean", "boundary_drop")
    return {
        k: {f"gap_{name}": _mean([getattr(p, name) for p in group]) for name in names} for k, group in groups.items()
    }


def deepest(pairs: Sequence[GapPair]) -> GapPair | None:
    """The pair of the deepest gap, of equal ones that of the lowest k, then j; ``None`` if one was not evaluated."""
    depths = [(-pair.depth, pair.k, pair.j, pair) for pair in pairs if pair.depth is not None]
    return min(depths, key=lambda item: item[:3])[3] if depths and len(depths) == len(pairs) else None


def survival(events: Iterable[int], censored: Iterable[int] = ()) -> list[tuple[int, Fraction]]:
    """Kaplan-Meier curve: the share not yet recovered after each event time.

    Args:
        events: times of the recoveries.
        censored: times up to which the others were watched.
    """
    seen = list(events)
    times = [*seen, *censored]
    left, curve = Fraction(1), []
    for time in sorted(set(seen)):
        left *= 1 - Fraction(seen.count(time), sum(other >= time for other in times))
        curve.append((time, left))
    return curve


def kaplan_meier_median(events: Iterable[int], censored: Iterable[int] = ()) -> int | None:
    """First event time at which at most half is not yet recovered; ``None`` if there is none."""
    return next((time for time, left in survival(events, censored) if left <= Fraction(1, 2)), None)


def noise_floor(pre: float, low: float, images: int, evaluations: int) -> float:
    """3.9: the fall that the lowest of several noisy accuracies shows by chance, at 5 % (Bonferroni, unpaired)."""
    q = (pre + low) / 2
    return NormalDist().inv_cdf(1 - 0.05 / (2 * evaluations)) * math.sqrt(2 * q * (1 - q) / images)


def _pair(curves: Curves, k: int, j: int, window: int | None, slack: Fraction) -> GapPair:
    begin, end = curves.begins[k], curves.ends[k]
    cut = window is not None and begin + window > end
    until = end if window is None else min(begin + window, end)
    points = {s: cell for s, cell in curves.segment(k, j).items() if begin < s <= until}
    before = curves.boundary(k - 1, "end")
    if not points or before is None or j not in before.cells:
        return GapPair(k, j, window_cut=cut)
    pre = _exact(before.cells[j])
    values = {step - begin: _exact(cell) for step, cell in points.items()}
    low_offset = min(values, key=lambda offset: (values[offset], offset))
    low, final = values[low_offset], max(values)
    depth = max(Fraction(0), pre - low)
    residual = min(max(Fraction(0), pre - values[final]), depth)
    status, recovery, lower = _recovery(values, pre - slack, low_offset)
    losses = [max(0.0, float(pre) - value) for value in interpolated([(0, float(pre)), *_floats(values)])[1:]]
    start = curves.boundary(k, "start")
    floor = noise_floor(float(pre), float(low), points[begin + low_offset][1], len(points))
    return GapPair(
        k,
        j,
        status,
        pre=float(pre),
        low=float(low),
        low_offset=low_offset,
        depth=float(depth),
        residual=float(residual),
        transient=float(depth - residual),
        gain=float(max(Fraction(0), values[final] - pre)),
        recovery_time=recovery,
        lower=lower,
        censored_at=final if status == "censored" else None,
        area=math.fsum(losses),
        area_mean=math.fsum(losses) / len(losses),
        boundary_drop=float(pre - _exact(start.cells[j])) if start is not None and j in start.cells else None,
        noise_floor=floor,
        depth_significant=float(depth) > floor,
        window_cut=cut,
    )


def _recovery(
    values: dict[int, Fraction], threshold: Fraction, low_offset: int
) -> tuple[Status, int | None, int | None]:
    """Status, 3.5 and the last offset before it: the first passage of the threshold after the lowest point."""
    if values[low_offset] >= threshold:
        return "no_gap", 0, None
    for earlier, offset in zip(values, list(values)[1:], strict=False):
        if offset > low_offset and values[offset] >= threshold:
            return "recovered", offset, earlier
    return "censored", None, None


def _recovery_time(pairs: Sequence[GapPair]) -> Outcome:
    gaps = _gaps(pairs)
    if isinstance(gaps, Undefined):
        return gaps
    events = [pair.recovery_time for pair in gaps if pair.status == "recovered" and pair.recovery_time is not None]
    median = kaplan_meier_median(events, [pair.censored_at for pair in gaps if pair.censored_at is not None])
    return Undefined("censored") if median is None else Result(float(median))


def _recovered_share(pairs: Sequence[GapPair]) -> Outcome:
    gaps = _gaps(pairs)
    if isinstance(gaps, Undefined):
        return gaps
    return Result(sum(pair.status == "recovered" for pair in gaps) / len(gaps))


def _transient_share(pairs: Sequence[GapPair]) -> Outcome:
    parts = [(pair.transient, pair.depth) for pair in pairs if pair.transient is not None and pair.depth is not None]
    if len(parts) < len(pairs):
        return Undefined("not_evaluated")
    depth = math.fsum(whole for _, whole in parts)
    return Result(math.fsum(part for part, _ in parts) / depth) if depth > 0 else Undefined("no_gap")


def _gaps(pairs: Sequence[GapPair]) -> list[GapPair] | Undefined:
    if any(pair.status == "not_evaluated" for pair in pairs):
        return Undefined("not_evaluated")
    return [pair for pair in pairs if pair.status != "no_gap"] or Undefined("no_gap")


def _mean_of(pairs: Sequence[GapPair], read: Callable[[GapPair], float | None]) -> Outcome:
    value = _mean([read(pair) for pair in pairs])
    return Undefined("not_evaluated") if value is None else Result(value)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def _floats(values: dict[int, Fraction]) -> list[tuple[int, float]]:
    return [(offset, float(value)) for offset, value in values.items()]


def _exact(cell: Cell) -> Fraction:
    return Fraction(cell[0], cell[1])
