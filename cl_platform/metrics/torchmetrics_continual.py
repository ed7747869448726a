"""Metrics of continual evaluation and of the stability gap as ``torchmetrics.Metric``, values by the pure functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cl_platform.metrics import continual
from cl_platform.metrics.continual_log import EVENTS, ContinualLog, Curves, LogRow
from cl_platform.metrics.gap import gap_pairs, run_level
from cl_platform.metrics.matrix import Outcome, Result


class _LogMetric(Metric):
    """The evaluations of one prediction space, as integer rows.

    Counts of the same task in the same evaluation add up, so an evaluation may be given in batches and over several
    processes. The rows are part of ``state_dict``.

    Args:
        kwargs: arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False
    is_differentiable = False
    rows: list[Tensor] | Tensor
    """(1, 6) int64 each: step, event, training position, evaluated position, right answers, images."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", default=[], dist_reduce_fx="cat", persistent=True)

    def update(
        self,
        correct: int | Tensor,
        total: int | Tensor,
        step: int,
        event: str,
        training_position: int,
        evaluated_position: int,
    ) -> None:
        """Count answers of one task in one evaluation.

        Args:
            correct: right answers.
            total: images, at least 1.
            step: optimizer updates so far over the whole run.
            event: ``start``, ``step`` or ``end``: before, during or after the training of a task.
            training_position: stream position of the task being trained.
            evaluated_position: stream position of the images' task, at most that of the task being trained.

        Raises:
            ValueError: an unknown event, counts outside 0 <= correct <= total, a task not seen yet, a negative step.
        """
        right, images = int(correct), int(total)
        if event not in EVENTS:
            raise ValueError(f"event {event!r} is none of {', '.join(EVENTS)}")
        if not 0 <= right <= images or images == 0:
            raise ValueError(f"{right} right answers of {images} images")
        if not 0 <= evaluated_position <= training_position or step < 0:
            raise ValueError(f"position {evaluated_position} evaluated at {training_position}, step {step}")
        row = [step, EVENTS.index(event), training_position, evaluated_position, right, images]
        if isinstance(self.rows, Tensor):  # a synchronised state is one tensor
            self.rows = [self.rows]
        self.rows.append(torch.tensor([row], dtype=torch.int64, device=self.device))

    def curves(self) -> Curves:
        """The evaluations so far; task ids are stream positions."""
        found = [self.rows] if isinstance(self.rows, Tensor) else self.rows
        counts: dict[tuple[int, int, int, int], tuple[int, int]] = {}
        for step, event, position, evaluated, right, images in (row for part in found for row in part.tolist()):
            key = (step, event, position, evaluated)
            before = counts.get(key, (0, 0))
            counts[key] = (before[0] + right, before[1] + images)
        rows = tuple(
            LogRow(step, position, position, 0, EVENTS[event], evaluated, "all", *cell)
            for (step, event, position, evaluated), cell in counts.items()
        )
        positions = range(1 + max((row.position for row in rows), default=-1))
        return Curves.of(ContinualLog(rows, (), tuple(positions)), "all")

    def compute(self) -> Tensor:
        """The metric as a float64 scalar; NaN while it is undefined."""
        outcome = self._outcome(self.curves())
        value = outcome.value if isinstance(outcome, Result) else float("nan")
        return torch.tensor(value, dtype=torch.float64)

    def _outcome(self, curves: Curves) -> Outcome:
        raise NotImplementedError

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.rows, list) and not self.rows:
            # a process without a row would otherwise contribute an empty vector of floats, of another dimension
            self.rows = [torch.empty((0, 6), dtype=torch.int64, device=self.device)]
        super()._sync_dist(*args, **kwargs)


class MinAccuracy(_LogMetric):
    """2.2.2, [0, 1]: lowest accuracy since the end of a task, mean over old tasks."""

    higher_is_better = True

    def _outcome(self, curves: Curves) -> Outcome:
        return continual.min_acc(curves)


class WorstCaseAccuracy(_LogMetric):
    """2.2.3, [0, 1]: current accuracy and the minimum accuracy weighted by tasks, at the last ``end``."""

    higher_is_better = True

    def _outcome(self, curves: Curves) -> Outcome:
        return continual.wc_acc(curves)


class AverageAnytimeAccuracy(_LogMetric):
    """2.2.7, [0, 1]: mean accuracy over the seen tasks, mean over all updates."""

    higher_is_better = True

    def _outcome(self, curves: Curves) -> Outcome:
        return continual.aaa(curves)


class _WindowedMetric(_LogMetric):
    """A change within a window.

    Args:
        window: evaluations less than this many updates apart are compared, at least 1.
        kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``window`` is below 1.
    """

    def __init__(self, window: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if window < 1:
            raise ValueError(f"window {window} is below 1")
        self.window = window


class WindowedForgetting(_WindowedMetric):
    """2.2.4, [0, 1]: largest fall within ``window`` updates, mean over tasks."""

    higher_is_better = False

    def _outcome(self, curves: Curves) -> Outcome:
        return continual.wf(curves, self.window)


class WindowedPlasticity(_WindowedMetric):
    """2.2.5, [0, 1]: largest rise within ``window`` updates, mean over tasks."""

    higher_is_better = True

    def _outcome(self, curves: Curves) -> Outcome:
        return continual.wp(curves, self.window)


class LearningCurveArea(_LogMetric):
    """2.2.6, [0, 1]: accuracy on the new task over its first updates, mean.

    Args:
        updates: how many updates after the start of each task, at least 0.
        kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``updates`` is negative.
    """

    higher_is_better = True

    def __init__(self, updates: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if updates < 0:
            raise ValueError(f"updates {updates} is negative")
        self.updates = updates

    def _outcome(self, curves: Curves) -> Outcome:
        return continual.lca(curves, self.updates)


class _GapMetric(_LogMetric):
    """A scalar over all switches and old tasks.

    Args:
        window: updates after a switch that count, at least 1; ``None`` for the whole task.
        tolerance: an accuracy this far below the one before the switch counts as recovered, in [0, 1].
        kwargs: arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``window`` or ``tolerance`` out of range.
    """

    _key: str

    def __init__(self, window: int | None = None, tolerance: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window, self.tolerance = window, tolerance
        gap_pairs(self.curves(), window, tolerance)  # refuses what is out of range

    def _outcome(self, curves: Curves) -> Outcome:
        return run_level(curves, gap_pairs(curves, self.window, self.tolerance))[self._key]


class GapDepth(_GapMetric):
    """3.1, [0, 1]: accuracy before a switch minus the lowest one after it, mean."""

    higher_is_better = False
    _key = "gap_depth"


class GapResidual(_GapMetric):
    """3.2, [0, 1]: part of the gap that is still lost at the end of the window, mean."""

    higher_is_better = False
    _key = "gap_residual"


class GapTransient(_GapMetric):
    """3.3, [0, 1]: part of the gap that was won back, mean."""

    higher_is_better = False
    _key = "gap_transient"


class GapRecoveryTime(_GapMetric):
    """3.5, updates: how long until the accuracy before the switch is back, Kaplan-Meier median."""

    higher_is_better = False
    _key = "gap_recovery_time"


class GapArea(_GapMetric):
    """3.7, updates: lost accuracy summed over the updates of the window, mean."""

    higher_is_better = False
    _key = "gap_area"
