"""Curves of a group over its seeds: interpolated inside a task between evaluated updates, never across a switch."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cl_platform.metrics.continual import interpolated, min_acc_curve, seen_mean
from cl_platform.metrics.continual_log import Curves
from cl_platform.metrics.gap import GapPair, by_switch
from cl_platform.metrics.seeds import OverSeeds, curve_over_seeds, over_seeds
from cl_platform.report import words
from cl_platform.report.comparison_groups import Group

Series = Mapping[int, float]
"""Update -> value of one run."""


@dataclass(frozen=True)
class Strand:
    """One quantity over the updates.

    Attributes:
        bands: for each task in turn, (update, over the seeds).
        runs: for each run and task, its own values at those updates.
    """

    bands: tuple[tuple[tuple[int, OverSeeds], ...], ...]
    runs: tuple[tuple[tuple[float, ...], ...], ...]

    def __bool__(self) -> bool:
        return any(self.bands)


@dataclass(frozen=True)
class GroupCurves:
    """What a group's runs logged while learning.

    Attributes:
        label: the group's.
        n: runs whose curves are averaged.
        curves: those of one of them, for the updates at which tasks begin and end.
        seen: mean accuracy over the tasks seen.
        lowest: min-ACC as of each update (2.2.8).
        lost: accuracy that old tasks have lost since the switch, as 3.7 sums it up; empty for the first task.
        depth: position of the new task -> gap depth (3.1), mean over its old tasks.
        transient: the same for what was won back (3.3).
    """

    label: str
    n: int
    curves: Curves
    seen: Strand
    lowest: Strand
    lost: Strand
    depth: Mapping[int, OverSeeds]
    transient: Mapping[int, OverSeeds]

    @property
    def edges(self) -> tuple[int, ...]:
        """Updates at which tasks begin, and the last one."""
        return (*self.curves.begins, self.curves.ends[-1])


def curves_of(groups: Sequence[Group]) -> tuple[list[GroupCurves], list[str]]:
    """The groups that have curves over updates, and a line for every group or run that has none."""
    found: list[GroupCurves] = []
    lines: list[str] = []
    for group in groups:
        made = _of_group(group, lines)
        if made is not None:
            found.append(made)
    return found, lines


def _of_group(group: Group, lines: list[str]) -> GroupCurves | None:
    reason = next((run.no_switches for run in group.runs if run.no_switches is not None), None)
    if reason is not None:
        lines.append(f"{group.label} has no curves over tasks: {words.REASONS[reason]}")
        return None
    known = [(run, curves) for run in group.runs if (curves := run.curves()) is not None]
    if not known:
        lines.append(f"{group.label} has no curves: nothing was evaluated while it learnt")
        return None
    extent = known[0][1]
    if extent.ends[-1] == 0:
        lines.append(f"{group.label} has no curves over updates: it makes none")
        return None
    same = [(run, curves) for run, curves in known if _extent(curves) == _extent(extent)]
    if len(same) < len(group.runs):
        lines.append(
            f"{group.label}: curves of {len(same)} of {len(group.runs)} runs; the others have no log, or tasks of "
            "other lengths"
        )
    views, logs = [run for run, _ in same], [curves for _, curves in same]
    pairs = [run.pairs() for run in views]
    return GroupCurves(
        group.label,
        len(same),
        extent,
        seen=_strand([_seen(curves) for curves in logs], logs),
        lowest=_strand([_lowest(curves) for curves in logs], logs),
        lost=_strand([_lost(curves) for curves in logs], logs),
        depth=_per_switch(pairs, "gap_depth"),
        transient=_per_switch(pairs, "gap_transient"),
    )


def _extent(curves: Curves) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return curves.begins, curves.ends, curves.kept


def _strand(runs: Sequence[Sequence[Series]], logs: Sequence[Curves]) -> Strand:
    """The band over the runs at every update that one of them evaluated and all have a value for, task by task."""
    bands = []
    for k in range(logs[0].begun):
        looked = {e.step for curves in logs for e in curves.evaluations if e.position == k}
        bands.append(tuple(curve_over_seeds([series[k] for series in runs], looked)))
    single = tuple(tuple(tuple(run[k][s] for s, _ in band) for k, band in enumerate(bands)) for run in runs)
    return Strand(tuple(bands), single)


def _seen(curves: Curves) -> list[Series]:
    """Mean accuracy over the tasks seen, by task; at its first update as the ``start`` evaluation has it."""
    values = seen_mean(curves)
    segments: list[Series] = []
    for k in range(curves.begun):
        segment = {s: values[s] for s in range(curves.begins[k] + 1, curves.ends[k] + 1) if s in values}
        start = curves.boundary(k, "start")
        if start is not None and start.complete:
            cells = [start.cells[j] for j in curves.kept if j <= k]
            if cells:
                segment[curves.begins[k]] = math.fsum(c / n for c, n in cells) / len(cells)
        segments.append(segment)
    return segments


def _lowest(curves: Curves) -> list[Series]:
    """min-ACC so far, by task."""
    points = min_acc_curve(curves)
    steps = [step for step, _ in points]
    segments: list[Series] = []
    for begin, end in zip(curves.begins, curves.ends, strict=True):
        inside = points[bisect.bisect_right(steps, begin) : bisect.bisect_right(steps, end)]
        segments.append(_every_update(inside))
    return segments


def _lost(curves: Curves) -> list[Series]:
    """Mean over old tasks of ``max(0, pre - A_j(s))``, by task; nothing where an old task was not evaluated."""
    segments: list[Series] = []
    for k in range(curves.begun):
        losses = [_loss_of(curves, k, j) for j in curves.kept if j < k]
        shared = set.intersection(*map(set, losses)) if losses else set()
        segments.append({s: math.fsum(loss[s] for loss in losses) / len(losses) for s in sorted(shared)})
    return segments


def _loss_of(curves: Curves, k: int, j: int) -> Series:
    begin, before = curves.begins[k], curves.boundary(k - 1, "end")
    if before is None or j not in before.cells:
        return {}
    pre = before.cells[j][0] / before.cells[j][1]
    points = [(s, c / n) for s, (c, n) in curves.segment(k, j).items() if s > begin]
    return {s: max(0.0, pre - value) for s, value in _every_update([(begin, pre), *points]).items()}


def _every_update(points: Sequence[tuple[int, float]]) -> Series:
    return dict(enumerate(interpolated(points), start=points[0][0])) if points else {}


def _per_switch(runs: Iterable[Sequence[GapPair]], key: str) -> dict[int, OverSeeds]:
    """A mean over the old tasks of each switch, over the runs that have it."""
    values: dict[int, list[float]] = {}
    for pairs in runs:
        for k, means in by_switch(pairs).items():
            value = means[key]
            if value is not None:
                values.setdefault(k, []).append(value)
    return {k: over_seeds(found) for k, found in sorted(values.items())}


def place_on(curves: Curves, shared: bool) -> Callable[[int, int], float]:
    """From (position of a task, update) to a place on the axis: the update itself, or task and share of its updates."""
    if shared:
        return lambda k, step: float(step)

    def place(k: int, step: int) -> float:
        begin, end = curves.begins[k], curves.ends[k]
        return k + (step - begin) / max(1, end - begin)

    return place
