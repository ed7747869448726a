"""Ctrl-C and SIGTERM end the run after the running step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The user or the system asked the run to end; carries the exit code 128 + signal number, and the run folder."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number
        self.folder: Path | None = None


class Interruption(L.Callback):
    """The first signal ends the run after the running step, a second one at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take over the signals; restored by :meth:`remove`."""
        for number in SIGNALS:
            self._before.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._receive)

    def remove(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    def on_train_start(self, trainer: L.Trainer, learner: L.LightningModule) -> None:
        """Lightning sets handlers of its own when a fit starts; ours come last."""
        self.install()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """The running step is over."""
        self.check()

    def after_update(self, learner: Any, step: int) -> None:
        """So is one outside Lightning's loop."""
        self.check()
