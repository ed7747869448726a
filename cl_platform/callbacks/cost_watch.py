"""What of a run's cost only the training loop can see: its first update, and that time passes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import lightning as L

if TYPE_CHECKING:
    from cl_platform.cost import Cost


class CostWatch(L.Callback):
    """Times the run's first update, warm-up included, and has the energy counters read while a long task trains.

    Its place is before the callbacks that work after an update, whose time would count otherwise.

    Args:
        cost: what is kept.
    """

    def __init__(self, cost: Cost) -> None:
        self.cost = cost
        self._start: float | None = None
        self._step = 0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """The first batch of the run starts its first update."""
        if self.cost.first_update_seconds is None and self._start is None:
            self._start, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """An update is over unless the batch only accumulated."""
        if self._start is not None and trainer.global_step > self._step:
            self.cost.first_update_seconds = time.perf_counter() - self._start
            self._start = None
        self.cost.tick()

    def after_update(self, learner: Any, step: int) -> None:
        """Time passes outside Lightning's loop as well."""
        self.cost.tick()
