"""One progress bar over the whole stream, or a line per task where there is no terminal."""

from __future__ import annotations

from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SHOW_EVERY = 5
"""Updates between two refreshes: reading the loss waits for the device."""


class StreamProgress(L.Callback):
    """Shows task, epoch, loss and the remaining time.

    Args:
        total_updates: updates of the whole run.
        num_tasks: phases of the run.
        done: updates that a resumed run has behind it.
        console: where to draw.
    """

    def __init__(self, total_updates: int, num_tasks: int, done: int = 0, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._num_tasks = num_tasks
        self._label = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._bar_id = self._bar.add_task("starting", total=total_updates, completed=done, loss="-")

    def start(self) -> None:
        """Draw the bar."""
        self._bar.start()

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def begin_task(self, position: int, name: str, task_id: int | None = None) -> None:
        """Name the task that comes next, by its id and its place among all.

        Args:
            position: row of the accuracy matrix that the task fills, from 0; the last one where all train together.
            name: what it holds.
            task_id: ``None`` where no task was left out, so that ids are positions.
        """
        place = min(position + 1, self._num_tasks)
        self._label = f"task {position if task_id is None else task_id} ({place} of {self._num_tasks}) {name}"
        self._bar.update(self._bar_id, description=self._label)

    def end_task(self, line: str) -> None:
        """Print one line about a finished task above the bar; it wraps nowhere but at the edge of a terminal."""
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=not self._console.is_terminal)

    def on_train_batch_end(self, trainer: L.Trainer, learner: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar."""
        if learner.steps % SHOW_EVERY == 0 and self._console.is_terminal:
            loss = float(outputs["loss"]) if isinstance(outputs, dict) else float("nan")
            description = f"{self._label} epoch {learner.epoch_in_task + 1}/{learner.epochs}"
            self._bar.update(self._bar_id, completed=learner.steps, loss=f"{loss:.3f}", description=description)

    def after_update(self, learner: Any, step: int) -> None:
        """Move the bar for an update outside Lightning's loop."""
        if step % SHOW_EVERY == 0 and self._console.is_terminal:
            self._bar.update(self._bar_id, completed=step)
