"""Small matrices for the tests of the matrix metrics."""

from __future__ import annotations

from collections.abc import Sequence

from cl_platform.metrics import AccuracyMatrix, Outcome, Result, Undefined


def matrix_of(
    rows: Sequence[Sequence[int | None]],
    totals: Sequence[int],
    space: str = "cil",
    init: Sequence[int] | None = None,
    task_ids: Sequence[int] | None = None,
) -> AccuracyMatrix:
    """A matrix with the given right answers; ``None`` stands for a cell that was not evaluated."""
    ids = list(range(len(totals))) if task_ids is None else list(task_ids)
    matrix = AccuracyMatrix(space, ids)
    if init is not None:
        matrix.set_init({ids[j]: (right, totals[j]) for j, right in enumerate(init)})
    for i, row in enumerate(rows):
        matrix.append_row(ids[i], {ids[j]: (right, totals[j]) for j, right in enumerate(row) if right is not None})
    return matrix


def four_tasks(task_ids: Sequence[int] | None = None) -> AccuracyMatrix:
    """Four tasks of unequal size whose values are known as exact fractions."""
    return matrix_of([[8], [9, 18], [7, 12, 8], [5, 19, 4, 36]], [10, 20, 10, 40], task_ids=task_ids)


def three_tasks(space: str) -> AccuracyMatrix:
    """Three tasks with all future accuracies and those of the untrained model."""
    return matrix_of([[80, 30, 20], [60, 90, 40], [50, 70, 85]], [100] * 3, space, init=[10, 12, 8])


def value(outcome: Outcome):
    """The value of a metric that must have one."""
    assert isinstance(outcome, Result), outcome
    return outcome.value


def reason(outcome: Outcome) -> str:
    """Why a metric that must not have a value has none."""
    assert isinstance(outcome, Undefined), outcome
    return outcome.reason
