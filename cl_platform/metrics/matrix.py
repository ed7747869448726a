"""Matrix metrics 1.1 to 1.17: pure functions of integer counts, in float64.

``R[i][j]`` is the accuracy on position j after position i, T the number of trained positions. Means are over the tasks
that were not forgotten, and a mean over cells of which one was not evaluated is undefined, not a mean over the rest.
Sums use ``math.fsum``, so a value does not depend on the order of its terms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Concatenate, ParamSpec

from cl_platform.metrics.counts import AccuracyMatrix, Cell

REASONS = frozenset(
    {
        "needs_two_tasks",
        "not_evaluated",
        "empty",
        "space_excludes_future_classes",
        "no_baseline",
        "no_reference_run",
        "segment_shorter_than_beta",
        "incomplete_evaluation",
        "no_gap",
        "censored",
        "zero_norm",
        "zero_variance",
        "too_few_samples",
        "no_counter",
        "not_permitted",
        "evaluation_off",
        "joint_trains_once",
        "starts_afresh",
        "tasks_share_classes",
        "no_value",
        "failed",
    }
)
"""Why a metric has no value."""


@dataclass(frozen=True)
class Undefined:
    """A metric without a value.

    Attributes:
        reason: one of ``REASONS``.
        row_missing: whether it needs a row in which nothing at all was evaluated.
    """

    reason: str
    row_missing: bool = False

    def __post_init__(self) -> None:
        if self.reason not in REASONS:
            raise ValueError(f"reason {self.reason!r} is none of {', '.join(sorted(REASONS))}")


@dataclass(frozen=True)
class Result:
    """A metric's value.

    Attributes:
        value: a float64; a list (1.6) or a list of lists (1.12) where the definition is one.
        per_task: task id -> the term of that task, for the tasks that enter the mean.
        per_class: class id -> recall (1.17).
    """

    value: float | list[float | None] | list[list[float | None]]
    per_task: dict[int, float] | None = None
    per_class: dict[int, float] | None = None


Outcome = Result | Undefined
_P = ParamSpec("_P")


class _NoValue(Exception):
    def __init__(self, reason: str, row_missing: bool = False) -> None:
        super().__init__(reason)
        self.undefined = Undefined(reason, row_missing)


_Formula = Callable[Concatenate[AccuracyMatrix, _P], Result]
_Metric = Callable[Concatenate[AccuracyMatrix, _P], Outcome]


def _metric(min_tasks: int = 1) -> Callable[[_Formula[_P]], _Metric[_P]]:
    """Turn what is missing into ``Undefined``: no task, fewer than ``min_tasks``, or a cell met on the way."""

    def wrap(formula: _Formula[_P]) -> _Metric[_P]:
        @functools.wraps(formula)
        def outcome(matrix: AccuracyMatrix, /, *args: _P.args, **kwargs: _P.kwargs) -> Outcome:
            if not matrix.kept:
                return Undefined("empty")
            if matrix.num_trained < min_tasks:
                return Undefined("needs_two_tasks")
            try:
                return formula(matrix, *args, **kwargs)
            except _NoValue as missing:
                return missing.undefined

        return outcome

    return wrap


@_metric()
def acc(matrix: AccuracyMatrix) -> Result:
    """1.1, [0, 1]: mean over tasks of ``R[T-1][j]`` (Lopez-Paz and Ranzato 2017, ACC)."""
    last = matrix.num_trained - 1
    return _over_tasks(matrix, {j: _at(matrix, last, j) for j in matrix.kept})


@_metric()
def acc_samples(matrix: AccuracyMatrix) -> Result:
    """1.2, [0, 1]: all images after the last task pooled (the curve of iCaRL, Rebuffi et al. 2017, at its end)."""
    return Result(_pooled(matrix, matrix.num_trained - 1, matrix.kept))


@_metric()
def aia(matrix: AccuracyMatrix) -> Result:
    """1.3, [0, 1]: mean over task ends i of the mean over tasks j <= i of ``R[i][j]``."""
    return Result(_mean(_mean(_at(matrix, i, j) for j in seen) for i, seen in _task_ends(matrix)))


@_metric()
def aia_samples(matrix: AccuracyMatrix) -> Result:
    """1.4, [0, 1]: mean over task ends of the pooled accuracy (iCaRL, Rebuffi et al. 2017)."""
    return Result(_mean(_pooled(matrix, i, seen) for i, seen in _task_ends(matrix)))


@_metric(min_tasks=2)
def forgetting(matrix: AccuracyMatrix) -> Result:
    """1.5, [-1, 1]: mean over j < T-1 of ``max(R[l][j], l = j..T-2) - R[T-1][j]`` (Chaudhry et al. 2018).

    The maximum starts where the task was learnt, so zero-shot accuracies above it never enter.
    """
    return _over_tasks(matrix, _forgotten_by(matrix, matrix.num_trained - 1))


@_metric(min_tasks=2)
def forgetting_after(matrix: AccuracyMatrix) -> Result:
    """1.6, list of [-1, 1]: 1.5 as of each task end; ``None`` where no earlier task is averaged."""
    values: list[float | None] = []
    for last in range(matrix.num_trained):
        terms = _forgotten_by(matrix, last)
        values.append(_mean(terms.values()) if terms else None)
    return Result(values)


@_metric(min_tasks=2)
def bwt(matrix: AccuracyMatrix) -> Result:
    """1.7, [-1, 1]: mean over j < T-1 of ``R[T-1][j] - R[j][j]`` (Lopez-Paz and Ranzato 2017, equation 3).

    The released GEM code divides by T in place of T-1.
    """
    last = matrix.num_trained - 1
    return _over_tasks(matrix, {j: _at(matrix, last, j) - _at(matrix, j, j) for j in matrix.kept if j < last})


@_metric(min_tasks=2)
def fwt_init(matrix: AccuracyMatrix) -> Result:
    """1.8, [-1, 1]: mean over j >= 1 of ``R[j-1][j] - R[init][j]`` (Lopez-Paz and Ranzato 2017, equation 4)."""
    return _over_tasks(matrix, {j: before - _at_init(matrix, j) for j, before in _before_learning(matrix).items()})


@_metric(min_tasks=2)
def fwt_chance(matrix: AccuracyMatrix, candidates: int | Sequence[int] | None = None) -> Result:
    """1.9, [-1, 1]: 1.8 with the chance level ``1 / candidates`` as baseline.

    Args:
        matrix: the counts.
        candidates: number of classes to choose from, one for all or one per position.

    Raises:
        ValueError: fewer numbers than positions, or one below 1.
    """
    before = _before_learning(matrix)
    if candidates is None:
        raise _NoValue("no_baseline")
    counts = [candidates] * matrix.num_trained if isinstance(candidates, int) else candidates
    if len(counts) < matrix.num_trained or min(counts) < 1:
        raise ValueError(f"candidates {candidates}: needs a number >= 1 for each of {matrix.num_trained} positions")
    return _over_tasks(matrix, {j: accuracy - 1 / counts[j] for j, accuracy in before.items()})


@_metric()
def la(matrix: AccuracyMatrix) -> Result:
    """1.10, [0, 1]: learning accuracy, mean over j of ``R[j][j]``."""
    return _over_tasks(matrix, {j: _at(matrix, j, j) for j in matrix.kept})


@_metric()
def intransigence(matrix: AccuracyMatrix, joint_references: Sequence[float | None] | None = None) -> Result:
    """1.11, [-1, 1]: mean over k of ``R*[k][k] - R[k][k]`` (Chaudhry et al. 2018).

    Args:
        matrix: the counts.
        joint_references: entry k is the accuracy on task k of a joint training on tasks 0..k.
    """
    references = joint_references or []
    if any(k >= len(references) or references[k] is None for k in matrix.kept):
        raise _NoValue("no_reference_run")
    known = {k: reference for k, reference in enumerate(references) if reference is not None}
    return _over_tasks(matrix, {k: known[k] - _at(matrix, k, k) for k in matrix.kept})


@_metric()
def cumulative_acc(matrix: AccuracyMatrix) -> Result:
    """1.12, rows i of entries t <= i in [0, 1]: tasks 0..t pooled, answered among the classes of tasks 0..t.

    ``None`` where task t was forgotten or the pool held images of a task forgotten since.
    """
    kept = set(matrix.kept)
    rows: list[list[float | None]] = [
        [_cumulative(matrix, i, t) if t in kept and _comparable(matrix, i, t) else None for t in range(i + 1)]
        for i in range(matrix.num_trained)
    ]
    return Result(rows)


@_metric(min_tasks=2)
def cumulative_forgetting(matrix: AccuracyMatrix) -> Result:
    """1.13, [-1, 1]: mean over t < T-1 of ``B[t][t] - B[T-1][t]``, B = 1.12 (avalanche-lib, cumulative forgetting).

    A pool that held images of a task forgotten since is left out: its two ends are over different images.
    """
    last = matrix.num_trained - 1
    terms = {
        t: _cumulative(matrix, t, t) - _cumulative(matrix, last, t)
        for t in matrix.kept
        if t < last and _comparable(matrix, t, t) and _comparable(matrix, last, t)
    }
    return _over_tasks(matrix, terms, otherwise="needs_two_tasks" if not matrix.forgotten else "not_evaluated")


@_metric(min_tasks=2)
def bwt_all(matrix: AccuracyMatrix) -> Result:
    """1.14, [-1, 1]: mean over all i > j of ``R[i][j] - R[j][j]`` (Diaz-Rodriguez et al. 2018)."""
    return Result(_change_over_pairs(matrix))


@_metric(min_tasks=2)
def rem(matrix: AccuracyMatrix) -> Result:
    """1.14, [0, 1]: remembering, ``1 - |min(bwt_all, 0)|`` (Diaz-Rodriguez et al. 2018)."""
    return Result(1 - abs(min(_change_over_pairs(matrix), 0.0)))


@_metric(min_tasks=2)
def bwt_plus(matrix: AccuracyMatrix) -> Result:
    """1.14, [0, 1]: positive backward transfer, ``max(bwt_all, 0)`` (Diaz-Rodriguez et al. 2018)."""
    return Result(max(_change_over_pairs(matrix), 0.0))


@_metric(min_tasks=2)
def forgetting_clipped(matrix: AccuracyMatrix) -> Result:
    """1.15, [0, 1]: 1.5 with the maximum over l = j..T-1 (as the released code of L2P and Mammoth computes it)."""
    terms = {j: max(term, 0.0) for j, term in _forgotten_by(matrix, matrix.num_trained - 1).items()}
    return _over_tasks(matrix, terms)


@_metric(min_tasks=2)
def forgetting_step(matrix: AccuracyMatrix) -> Result:
    """1.16, [-1, 1]: mean over t >= 1 and then i < t of ``R[t-1][i] - R[t][i]`` (released code of CODA-Prompt)."""
    steps = [
        _mean(_at(matrix, t - 1, i) - _at(matrix, t, i) for i in matrix.kept if i < t)
        for t in range(1, matrix.num_trained)
        if any(i < t for i in matrix.kept)
    ]
    if not steps:
        raise _NoValue("needs_two_tasks")
    return Result(_mean(steps))


@_metric()
def acc_per_class(matrix: AccuracyMatrix) -> Result:
    """1.17, [0, 1]: recall of every seen class after the last task, and the mean over classes."""
    recalls = {c: right / all_ for c, (right, all_) in matrix.per_class.items() if all_}
    if not recalls:
        raise _NoValue("not_evaluated", matrix.row_is_missing(matrix.num_trained - 1))
    return Result(_mean(recalls.values()), per_class=recalls)


def average_curve(matrix: AccuracyMatrix) -> list[float | None]:
    """A_i after each position: mean over the kept tasks j <= i; ``None`` where undefined."""
    return _curve(matrix, lambda i, seen: _mean(_at(matrix, i, j) for j in seen))


def pooled_curve(matrix: AccuracyMatrix) -> list[float | None]:
    """S_i after each position: images of the kept tasks j <= i pooled; ``None`` where undefined."""
    return _curve(matrix, lambda i, seen: _pooled(matrix, i, seen))


def _curve(matrix: AccuracyMatrix, compute: Callable[[int, list[int]], float]) -> list[float | None]:
    values: list[float | None] = []
    for i in range(matrix.num_trained):
        try:
            values.append(compute(i, _seen(matrix, i)))
        except _NoValue:
            values.append(None)
    return values


def _mean(values: Iterable[float]) -> float:
    terms = list(values)
    if not terms:
        raise _NoValue("empty")
    return math.fsum(terms) / len(terms)


def _over_tasks(matrix: AccuracyMatrix, terms: dict[int, float], otherwise: str = "needs_two_tasks") -> Result:
    """Mean of terms keyed by position; ``otherwise`` is the reason when no averaged task has a term."""
    if not terms:
        raise _NoValue(otherwise)
    return Result(_mean(terms.values()), {matrix.task_ids[j]: term for j, term in terms.items()})


def _seen(matrix: AccuracyMatrix, row: int) -> list[int]:
    return [j for j in matrix.kept if j <= row]


def _task_ends(matrix: AccuracyMatrix) -> list[tuple[int, list[int]]]:
    """Rows with the averaged positions seen by then; rows without any are left out."""
    return [(i, _seen(matrix, i)) for i in range(matrix.num_trained) if _seen(matrix, i)]


def _cell(matrix: AccuracyMatrix, row: int, column: int) -> Cell:
    cell = matrix.rows[row][column]
    if cell is None:
        raise _NoValue("not_evaluated", matrix.row_is_missing(row))
    return cell


def _ratio(cell: Cell) -> float:
    if cell[1] == 0:
        raise _NoValue("empty")
    return cell[0] / cell[1]


def _at(matrix: AccuracyMatrix, row: int, column: int) -> float:
    return _ratio(_cell(matrix, row, column))


def _at_init(matrix: AccuracyMatrix, column: int) -> float:
    cell = matrix.init[column] if matrix.init is not None else None
    if cell is None:
        raise _NoValue("not_evaluated")
    return _ratio(cell)


def _pooled(matrix: AccuracyMatrix, row: int, columns: Sequence[int]) -> float:
    cells = [_cell(matrix, row, j) for j in columns]
    return _ratio((sum(cell[0] for cell in cells), sum(cell[1] for cell in cells)))


def _forgotten_by(matrix: AccuracyMatrix, last: int) -> dict[int, float]:
    """Position j < last -> best accuracy from its own row to the row before ``last``, minus the one of ``last``."""
    return {
        j: max(_at(matrix, row, j) for row in range(j, last)) - _at(matrix, last, j) for j in matrix.kept if j < last
    }


def _before_learning(matrix: AccuracyMatrix) -> dict[int, float]:
    """Position j >= 1 -> accuracy just before it was trained."""
    if matrix.space == "cil":
        raise _NoValue("space_excludes_future_classes")
    return {j: _at(matrix, j - 1, j) for j in matrix.kept if j >= 1}


def _change_over_pairs(matrix: AccuracyMatrix) -> float:
    pairs = [(i, j) for j in matrix.kept for i in range(j + 1, matrix.num_trained)]
    if not pairs:
        raise _NoValue("needs_two_tasks")
    return _mean(_at(matrix, i, j) - _at(matrix, j, j) for i, j in pairs)


def _cumulative(matrix: AccuracyMatrix, row: int, position: int) -> float:
    cell = matrix.cumulative[row][position]
    if cell is not None:
        return _ratio(cell)
    if matrix.space == "dil":  # one label set for all tasks: pooling the row's cells is the definition
        return _pooled(matrix, row, _seen(matrix, position))
    raise _NoValue("not_evaluated", matrix.row_is_missing(row))


def _comparable(matrix: AccuracyMatrix, row: int, position: int) -> bool:
    """Whether 1.12 at ``[row][position]`` is over tasks that are still averaged, or is pooled from their cells."""
    return matrix.cumulative[row][position] is None or matrix.pool_is_intact(row, position)
