"""Where a task of the scenario ends inside a training that is not told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L


class Passage(L.Callback):
    """Calls ``passed(position)`` after the batch that brought a task's last image; not for the last task.

    Args:
        ends: batches after which each task has come.
        passed: what is to be done then.
    """

    def __init__(self, ends: Sequence[int], passed: Callable[[int], None]) -> None:
        self.ends, self.passed = list(ends), passed
        self._next = 0

    def on_train_batch_end(self, trainer: L.Trainer, learner: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look whether a task, or several small ones, ended with the batch."""
        while self._next < len(self.ends) - 1 and batch_idx + 1 >= self.ends[self._next]:
            self._next += 1
            self.passed(self._next - 1)
