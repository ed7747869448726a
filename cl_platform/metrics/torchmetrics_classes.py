"""Matrix metrics as ``torchmetrics.Metric``: integer counts as state, values by the pure functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cl_platform.metrics import matrix as definitions_as_code
from cl_platform.metrics.counts import AccuracyMatrix
from cl_platform.metrics.matrix import Outcome, Result


class _MatrixMetric(Metric):
    """Counts of right answers per (row, column), summed over processes.

    Args:
        num_tasks: number of task positions, at least 1.
        space: prediction space the predictions were made in: ``cil``, ``til``, ``dil`` or ``all``.
        kwargs: arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    correct: Tensor
    total: Tensor

    def __init__(self, num_tasks: int, space: str = "cil", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.space = space
        for name in ("correct", "total"):
            zeros = torch.zeros(num_tasks, num_tasks, dtype=torch.int64)  # (T, T)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor, after_task: int, tasks: int | Tensor) -> None:
        """Count one batch.

        Args:
            predicted: predicted class ids (B,).
            labels: true class ids (B,).
            after_task: position of the task trained last.
            tasks: position of the images' task, one for all or one each (B,).
        """
        right = (predicted == labels).to(torch.int64)  # (B,)
        columns = torch.as_tensor(tasks, device=labels.device).expand(labels.shape).long()  # (B,)
        self.correct[after_task].index_add_(0, columns, right)
        self.total[after_task].index_add_(0, columns, torch.ones_like(right))

    def matrix(self) -> AccuracyMatrix:
        """The counts so far; a pair of positions without images counts as not evaluated."""
        right, all_ = self.correct.tolist(), self.total.tolist()
        counted = AccuracyMatrix(self.space, list(range(len(all_))))
        for row, totals in enumerate(all_):
            if any(totals):
                counted.append_row(row, {j: (right[row][j], n) for j, n in enumerate(totals) if n})
        return counted

    def compute(self) -> Tensor:
        """The metric as a float64 scalar; NaN while it is undefined."""
        outcome = self._outcome(self.matrix())
        value = outcome.value if isinstance(outcome, Result) else float("nan")
        return torch.tensor(value, dtype=torch.float64)

    def _outcome(self, counted: AccuracyMatrix) -> Outcome:
        raise NotImplementedError


class AverageAccuracy(_MatrixMetric):
    """1.1, [0, 1]: accuracy after the last task, mean over tasks."""

    higher_is_better = True

    def _outcome(self, counted: AccuracyMatrix) -> Outcome:
        return definitions_as_code.acc(counted)


class Forgetting(_MatrixMetric):
    """1.5, [-1, 1]: best accuracy before the last task minus the final one, mean over old tasks."""

    higher_is_better = False

    def _outcome(self, counted: AccuracyMatrix) -> Outcome:
        return definitions_as_code.forgetting(counted)


class BackwardTransfer(_MatrixMetric):
    """1.7, [-1, 1]: final accuracy minus the one right after learning, mean over old tasks."""

    higher_is_better = True

    def _outcome(self, counted: AccuracyMatrix) -> Outcome:
        return definitions_as_code.bwt(counted)
