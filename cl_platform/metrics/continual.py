"""Metrics 2.2 of continual evaluation: pure functions of the logged counts of one prediction space, in float64.

``A_j(s)`` is the accuracy on task j after update s; task k trains from ``b_k`` to ``e_k``. Extrema use the evaluated
points only, so a sparse grid can only raise ``min_acc`` and lower ``wf`` and ``wp``. Means over updates interpolate
linearly between evaluated points inside one task, never across a boundary.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cl_platform.metrics.continual_log import Curves
from cl_platform.metrics.counts import Cell
from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined

Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""

CONTINUAL_DEFINITIONS: tuple[Definition, ...] = (
    Definition("2.2.2", "min_acc", "Lowest accuracy since the end of a task, mean over old tasks.", "fraction", "up"),
    Definition("2.2.3", "wc_acc", "Current accuracy and min_acc (2.2.2) weighted by tasks.", "fraction", "up"),
    Definition("2.2.4", "wf", "Largest fall within D updates, mean over tasks.", "fraction", "down"),
    Definition("2.2.5", "wp", "Largest rise within D updates, mean over tasks.", "fraction", "up"),
    Definition("2.2.6", "lca", "Accuracy on the new task over its first B updates, mean.", "fraction", "up"),
    Definition("2.2.7", "aaa", "Mean accuracy over the seen tasks, mean over all updates.", "fraction", "up"),
    Definition("2.2.7s", "aaa_samples", "As aaa (2.2.7), the images of the seen tasks pooled.", "fraction", "up"),
)
"""The scalars of this module; keys of 2.2.4 to 2.2.6 get their parameter, such as ``wf_10``."""


@dataclass(frozen=True)
class CurvePoint:
    """One evaluated point.

    Attributes:
        step: optimizer updates so far.
        accuracy: share of right answers.
        low: lower end of the Wilson 95 % interval.
        high: upper end.
    """

    step: int
    accuracy: float
    low: float
    high: float


def wilson(correct: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson interval of a share.

    Raises:
        ValueError: no image, or counts outside 0 <= correct <= total.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} right answers of {total} images")
    p, squared = correct / total, z * z
    scale = 1 + squared / total
    centre = (p + squared / (2 * total)) / scale
    half = z * math.sqrt(p * (1 - p) / total + squared / (4 * total * total)) / scale
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)


def accuracy_curve(curves: Curves, position: int) -> list[CurvePoint]:
    """2.2.1: accuracy on one task at its evaluated steps, in ascending order."""
    return [CurvePoint(step, c / n, *wilson(c, n)) for step, (c, n) in curves.visited(position).items()]


def min_acc(curves: Curves) -> Outcome:
    """2.2.2, [0, 1]: mean over old tasks of the lowest accuracy strictly after the end of the task."""
    if not curves.begun:
        return Undefined("empty")
    old = _old(curves, curves.begun - 1)
    if not old:
        return Undefined("needs_two_tasks")
    lows: dict[int, float] = {}
    for j in old:
        after = [_share(cell) for step, cell in curves.visited(j).items() if step > curves.ends[j]]
        if not after:
            return Undefined("not_evaluated")
        lows[j] = min(after)
    return _over_tasks(curves, lows)


def min_acc_curve(curves: Curves) -> list[tuple[int, float]]:
    """2.2.8: 2.2.2 as of every complete evaluation after the first task; undefined points are left out."""
    return [(step, low) for step, low, _ in _worst_cases(curves) if low is not None]


def wc_acc(curves: Curves) -> Outcome:
    """2.2.3, [0, 1]: ``A_k / (k+1) + k / (k+1) * min_acc`` at the last ``end``; forgotten tasks do not count in k."""
    if not curves.begun:
        return Undefined("empty")
    ends = [evaluation for evaluation in curves.evaluations if evaluation.event == "end"]
    if not ends:
        return Undefined("not_evaluated")
    if not ends[-1].complete:
        return Undefined("incomplete_evaluation")
    value = {step: worst for step, _, worst in _worst_cases(curves)}.get(ends[-1].step)
    return Undefined("not_evaluated") if value is None else Result(value)


def wc_acc_curve(curves: Curves) -> list[tuple[int, float]]:
    """2.2.8: 2.2.3 at every complete evaluation after an update; undefined points are left out."""
    return [(step, worst) for step, _, worst in _worst_cases(curves) if worst is not None]


def wf(curves: Curves, window: int) -> Outcome:
    """2.2.4, [0, 1]: windowed forgetting, the largest fall between two evaluations less than ``window`` updates apart.

    Raises:
        ValueError: ``window`` is below 1.
    """
    return _windowed(curves, window, -1)


def wp(curves: Curves, window: int) -> Outcome:
    """2.2.5, [0, 1]: windowed plasticity, the largest rise between two evaluations less than ``window`` updates apart.

    Raises:
        ValueError: ``window`` is below 1.
    """
    return _windowed(curves, window, 1)


def lca(curves: Curves, updates: int = 10) -> Outcome:
    """2.2.6, [0, 1]: mean over tasks of the mean of ``A_k(b_k + q)``, q = 0..updates (Chaudhry et al. 2019).

    Raises:
        ValueError: ``updates`` is negative.
    """
    if updates < 0:
        raise ValueError(f"updates {updates} is negative")
    if not curves.kept:
        return Undefined("empty")
    terms: dict[int, float] = {}
    for k in curves.kept:
        if curves.ends[k] - curves.begins[k] < updates:
            return Undefined("segment_shorter_than_beta")
        values = interpolated([(step, _share(cell)) for step, cell in _segment(curves, k, k)])
        if len(values) <= updates:
            return Undefined("not_evaluated")
        terms[k] = _mean(values[: updates + 1])
    return _over_tasks(curves, terms)


def aaa(curves: Curves) -> Outcome:
    """2.2.7, [0, 1]: mean over all updates of the mean accuracy over the tasks seen (:func:`seen_mean`)."""
    return _over_updates(curves, seen_mean(curves))


def aaa_samples(curves: Curves) -> Outcome:
    """2.2.7s, [0, 1]: mean over all updates of the pooled accuracy (:func:`seen_pooled`)."""
    return _over_updates(curves, seen_pooled(curves))


def seen_mean(curves: Curves) -> dict[int, float]:
    """Update -> mean accuracy over the tasks seen, up to each task's last complete evaluation."""
    values: dict[int, float] = {}
    for k in range(curves.begun):
        series = [interpolated([(s, _share(cell)) for s, cell in points]) for points in _seen_segments(curves, k)]
        for offset, column in enumerate(zip(*series, strict=True)):
            if offset:
                values[curves.begins[k] + offset] = _mean(column)
    return values


def seen_pooled(curves: Curves) -> dict[int, float]:
    """Update -> accuracy on all images of the tasks seen, up to each task's last complete evaluation."""
    values: dict[int, float] = {}
    for k in range(curves.begun):
        segments = _seen_segments(curves, k)
        right = [interpolated([(s, float(cell[0])) for s, cell in points]) for points in segments]
        images = [interpolated([(s, float(cell[1])) for s, cell in points]) for points in segments]
        columns = zip(zip(*right, strict=True), zip(*images, strict=True), strict=True)
        for offset, (counts, totals) in enumerate(columns):
            if offset:
                values[curves.begins[k] + offset] = math.fsum(counts) / math.fsum(totals)
    return values


def coverage(curves: Curves) -> Outcome:
    """Share of the updates after the first task after which something was evaluated; shown beside ``min_acc``."""
    if not curves.begun:
        return Undefined("empty")
    if curves.begun == 1:
        return Undefined("needs_two_tasks")
    first, last = curves.ends[0], curves.ends[-1]
    steps = {e.step for e in curves.evaluations if e.event != "start" and e.step > first}
    return Result(len(steps) / (last - first)) if last > first else Undefined("not_evaluated")


def interpolated(points: Sequence[tuple[int, float]]) -> list[float]:
    """Values at every integer step from the first point to the last one, linear in between.

    Args:
        points: (step, value) with ascending steps.
    """
    values = [value for _, value in points[:1]]
    for (left, a), (right, b) in itertools.pairwise(points):
        width = right - left
        values += [a + (b - a) * offset / width for offset in range(1, width)]
        values.append(b)
    return values


def _segment(curves: Curves, k: int, j: int, complete_only: bool = False) -> list[tuple[int, Cell]]:
    """Points of task j while task k trains, from ``b_k`` on; its value there may stem from the task before."""
    begin = curves.begins[k]
    cells = curves.segment(k, j, complete_only)
    sources = [curves.boundary(k, "start"), curves.boundary(k - 1, "end") if j < k else None]
    for source in sources:
        if source is not None and j in source.cells and (source.complete or not complete_only):
            return [(begin, source.cells[j]), *((s, cell) for s, cell in cells.items() if s > begin)]
    if not cells:
        return []
    first = next(iter(cells.values()))
    return [(begin, first), *((s, cell) for s, cell in cells.items() if s > begin)]


def _seen_segments(curves: Curves, k: int) -> list[list[tuple[int, Cell]]]:
    """Segments of the averaged tasks seen in task k, all from the same complete evaluations; empty without any."""
    segments = [_segment(curves, k, j, complete_only=True) for j in curves.kept if j <= k]
    return segments if all(segments) else []


def _worst_cases(curves: Curves) -> list[tuple[int, float | None, float | None]]:
    """(step, 2.2.2, 2.2.3) at every complete evaluation, each from what was evaluated by then."""
    pending = {
        j: deque((s, _share(c)) for s, c in curves.visited(j).items() if s > curves.ends[j]) for j in curves.kept
    }
    lows: dict[int, float] = {}
    found: list[tuple[int, float | None, float | None]] = []
    for evaluation in curves.complete():
        k = evaluation.position
        old = _old(curves, k)
        for j in old:
            while pending[j] and pending[j][0][0] <= evaluation.step:
                value = pending[j].popleft()[1]
                lows[j] = min(value, lows.get(j, value))
        low = _mean(lows[j] for j in old) if old and all(j in lows for j in old) else None
        worst: float | None = None
        if k in curves.kept:
            now = _share(evaluation.cells[k])
            if not old:
                worst = now
            elif low is not None:
                worst = (now + len(old) * low) / (len(old) + 1)
        found.append((evaluation.step, low, worst))
    return found


def _windowed(curves: Curves, window: int, sign: int) -> Outcome:
    if window < 1:
        raise ValueError(f"window {window} is below 1")
    if not curves.kept:
        return Undefined("empty")
    terms: dict[int, float] = {}
    for j in curves.kept:
        largest = 0.0
        candidates: deque[tuple[int, float]] = deque()  # signed values rise: the first is the lowest of the window
        for step, cell in curves.visited(j).items():
            value = sign * _share(cell)
            while candidates and step - candidates[0][0] >= window:
                candidates.popleft()
            if candidates:
                largest = max(largest, value - candidates[0][1])
            while candidates and candidates[-1][1] >= value:
                candidates.pop()
            candidates.append((step, value))
        terms[j] = largest
    return _over_tasks(curves, terms)


def _over_updates(curves: Curves, values: dict[int, float]) -> Outcome:
    if not curves.kept:
        return Undefined("empty")
    return Result(_mean(values.values())) if values else Undefined("not_evaluated")


def _over_tasks(curves: Curves, terms: dict[int, float]) -> Result:
    return Result(_mean(terms.values()), {curves.task_ids[j]: term for j, term in terms.items()})


def _old(curves: Curves, k: int) -> list[int]:
    return [j for j in curves.kept if j < k]


def _share(cell: Cell) -> float:
    return cell[0] / cell[1]


def _mean(values: Iterable[float]) -> float:
    terms = list(values)
    return math.fsum(terms) / len(terms)
