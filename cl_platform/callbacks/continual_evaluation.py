"""Evaluation while training: at the updates that the grid chooses, the counts of every seen task go into a file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from cl_platform.evaluation import spaces_of
from cl_platform.files import AppendedFile, write_atomically
from cl_platform.metrics.continual_log import HEADER, Curves, LogRow, cut_after, format_rows, parse
from cl_platform.metrics.grid import Grid, Plan, build_grid, images_per_task
from cl_platform.subset_evaluation import (
    Resident,
    Subset,
    count_subsets,
    image_weight,
    resident,
    subset_of,
    training_weight,
)

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.metrics import Cell
    from cl_platform.scenarios import Stream
    from cl_platform.strategies.phases import Phase

log = logging.getLogger("cl_platform")
FILE = "continual_eval.csv"


@dataclass(frozen=True)
class GridSettings:
    """What of the configuration decides when and how much is evaluated.

    Attributes:
        name: ``adaptive``, ``every_step``, ``every``, ``boundaries`` or ``off``.
        k: updates between two evaluations of ``every``.
        images_per_task: images of a subset, or ``auto``.
        max_overhead: bound on evaluation's forwards over three times training's.
        max_rate: bound on the evaluated share of a task's updates.
        min_per_task: least evaluations of a task.
        reserve: share of the evaluations kept for following new lows.
        updates: planned optimizer updates of each task, in stream order.
        images_per_update: training images of an update.
        loss: loggers also get each task's mean cross-entropy.
    """

    name: str
    k: int
    images_per_task: int | str
    max_overhead: float
    max_rate: float
    min_per_task: int
    reserve: float
    updates: tuple[int, ...]
    images_per_update: int
    loss: bool = False


@dataclass
class Tally:
    """What evaluation has cost so far.

    Attributes:
        evaluations: evaluations at updates, those at the bounds of tasks left out.
        forwards: forward passes of all evaluations, kept ones at their real share.
        forwards_at_updates: those of evaluations at updates: what the grid's budget is about.
    """

    evaluations: int = 0
    forwards_at_updates: Fraction = field(default_factory=Fraction)
    forwards: Fraction = field(default_factory=Fraction)


class ContinualEvaluation(L.Callback):
    """Looks at the subsets of all seen tasks and appends right answers as integers; training does not notice.

    Args:
        stream: the tasks.
        seed: the run's seed; subsets are drawn from it.
        settings: see :class:`GridSettings`.
        folder: the run's; the counts go into ``continual_eval.csv``.
        publish: called with (step, values by name) after each evaluation, for loggers.
        timed: opens a stopwatch around an evaluation.
    """

    def __init__(
        self,
        stream: Stream,
        seed: int,
        settings: GridSettings,
        folder: Path,
        publish: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
        timed: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.stream, self.seed, self.settings = stream, seed, settings
        self.path, self.publish, self.timed = folder / FILE, publish, timed
        self.tally = Tally()
        self.images: int | None = None  # of a subset; chosen before the first task
        self._plan: dict[str, Any] = {}
        self._grid: Grid | None = None
        self._grid_state: dict[str, Any] | None = None
        self._file: AppendedFile | None = None
        self._subsets: dict[int, Subset] = {}
        self._ready: Resident | None = None
        self._weight = Fraction(1)
        self._position, self._task_id = 0, 0
        self._begin = 0
        self._seen_step = 0
        self._low: dict[int, int] = {}  # position -> fewest right answers from the end of its task on
        self._worst: dict[int, int] = {}  # the same without that end: what min_acc is about
        self._forgotten: set[int] = set()  # positions of tasks that are not looked at any more
        self._primary = spaces_of(stream.setting)[0]

    # -- life of a run ----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Start the file of a new run."""
        write_atomically(self.path, HEADER)
        self._file = AppendedFile(self.path)

    def reopen(self, position: int, state: Mapping[str, Any]) -> None:
        """Go on behind the task at ``position``: what was written about later tasks is cut off.

        Args:
            position: of the last task that a checkpoint holds.
            state: what :meth:`state` gave for that checkpoint.
        """
        text = self.path.read_text() if self.path.exists() else ""
        if not text.startswith(HEADER):
            log.warning("%s is not there or not readable; it starts anew", self.path.name)
            text = HEADER
        text, lines = cut_after(text, position)
        if lines:
            log.info("%s: %d lines written after task %d were cut off", self.path.name, lines, position)
        write_atomically(self.path, text)
        self._file = AppendedFile(self.path)
        self.images, self._plan = state["images"], dict(state["plan"])
        forwards, at_updates = Fraction(state["forwards"]), Fraction(state["forwards_at_updates"])
        self.tally = Tally(state["evaluations"], at_updates, forwards)
        self._grid_state = state["grid"]
        if self._grid_state is not None and len(self._grid_state["updates"]) != len(self.settings.updates):
            self._grid_state = {**self._grid_state, "updates": list(self.settings.updates)}  # the stream is another
        ids = [task.task_id for task in self.stream.tasks]
        curves = Curves.of(parse(text, task_ids=ids), self._primary)
        for j in (j for j in range(curves.begun) if j not in self._forgotten):
            cells = [cell for step, cell in curves.visited(j).items() if step >= curves.ends[j]]
            if cells:
                self._low[j] = min(right for right, _ in cells)
            later = [cell[0] for step, cell in curves.visited(j).items() if step > curves.ends[j]]
            if later:
                self._worst[j] = min(later)

    def state(self) -> dict[str, Any]:
        """What :meth:`reopen` needs beside the file, as plain JSON."""
        grid = self._grid.to_dict() if self._grid is not None else self._grid_state  # none has begun a task since
        return {
            "images": self.images,
            "plan": self._plan,
            "evaluations": self.tally.evaluations,
            "forwards": str(self.tally.forwards),
            "forwards_at_updates": str(self.tally.forwards_at_updates),
            "grid": grid,
        }

    def forget(self, position: int) -> None:
        """Look no more at the task of a position, which was forgotten on request."""
        self._forgotten.add(position)
        for known in (self._subsets, self._low, self._worst):
            known.pop(position, None)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()

    # -- life of a task ---------------------------------------------------------------------------------------------

    def begin_task(self, learner: ContinualLearner, phase: Phase, step: int) -> None:
        """Evaluate before the first update of a task, after all work that its start needs."""
        self._position, self._task_id = phase.position, phase.task.task_id
        self._begin = self._seen_step = step
        if self._grid is None:
            self._choose(learner)
        assert self._grid is not None
        self._ready = resident(learner, [self._subset(p) for p in range(phase.position + 1) if self._kept(p)])
        self._weight = image_weight(learner, self._ready.columns)
        updates = self.settings.updates[phase.position]
        self._grid.begin_task(phase.position, updates, {j: c for j, c in self._low.items() if j < phase.position})
        for line in self._grid.notes():
            log.info("task %d: %s", phase.task.task_id, line)
        self._evaluate(learner, phase.task.task_id, step, "start", 0)

    def on_train_batch_end(self, trainer: L.Trainer, learner: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Evaluate after an optimizer update if the grid says so; batches that only accumulate are none."""
        if learner.steps != self._seen_step:
            self.after_update(learner, learner.steps)

    def after_update(self, learner: ContinualLearner, step: int) -> None:
        """Evaluate after update ``step`` of the run, in Lightning's loop or outside, if the grid says so."""
        assert self._grid is not None
        self._seen_step = step
        if self._ready is None:  # between two tasks
            return
        offset = step - self._begin
        if self._grid.due(offset):
            epoch = min(
                learner.epoch_in_task, max(0, learner.epochs - 1)
            )  # behind the last batch it stands at the next
            cells = self._evaluate(learner, self._task_id, step, "step", epoch)
            self._grid.record(offset, {p: cells[p][0] for p in cells})
            self.tally.evaluations += 1

    def end_task(self, learner: ContinualLearner, phase: Phase, step: int) -> None:
        """Evaluate after all work that the end of a task needs."""
        assert self._grid is not None
        cells = self._evaluate(learner, phase.task.task_id, step, "end", max(0, learner.epochs - 1))
        self._low.setdefault(phase.position, cells[phase.position][0])
        self._grid.end_task()
        self._ready = None
        if self._file is not None:
            self._file.sync()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _choose(self, learner: ContinualLearner) -> None:
        """The grid, and the size of the subsets, from what one evaluated image costs this learner."""
        settings = self.settings
        if not self._plan:
            self._plan = {"evaluation": str(image_weight(learner)), "training": str(training_weight(learner))}
        plan = Plan(
            updates=settings.updates,
            forwards_per_update=settings.images_per_update * Fraction(self._plan["training"]),
            weight=Fraction(self._plan["evaluation"]),
            max_overhead=settings.max_overhead,
            max_rate=settings.max_rate,
            min_per_task=settings.min_per_task,
            reserve=settings.reserve,
        )
        if self.images is None:
            chosen = settings.images_per_task
            self.images = chosen if isinstance(chosen, int) else images_per_task(plan)
        self._grid = build_grid(settings.name, plan, self.images, settings.k)
        if self._grid_state is not None:
            self._grid.load_dict(self._grid_state)

    def _kept(self, position: int) -> bool:
        return position not in self._forgotten

    def _subset(self, position: int) -> Subset:
        if position not in self._subsets:
            assert self.images is not None
            task = self.stream.tasks[position]
            self._subsets[position] = subset = subset_of(task, self.images, self.seed)
            first = next((t for t in self.stream.tasks if len(t.test) < self.images), None)
            if self.settings.images_per_task == self.images and task is first:
                log.info(
                    "evaluation.images_per_task=%d: task %d has %d test images, all of which are used",
                    self.images, task.task_id, len(subset),
                )  # fmt: skip
        return self._subsets[position]

    def _evaluate(self, learner: ContinualLearner, task_id: int, step: int, event: str, epoch: int) -> dict[int, Cell]:
        """Count, write, publish; the primary space's cells by position."""
        assert self._ready is not None
        with self.timed():
            losses: dict[int, float] | None = {} if self.settings.loss else None
            counts = count_subsets(learner, self._ready, losses)
            rows = [
                LogRow(step, self._position, task_id, epoch, event, seen_id, space, right, total)
                for seen_id, by_space in counts.items()
                for space, (right, total) in by_space.items()
            ]
            if self._file is not None:
                self._file.append(format_rows(rows))
        passes = self._weight * len(self._ready.labels)
        self.tally.forwards += passes
        if event == "step":
            self.tally.forwards_at_updates += passes
        place = {task.task_id: position for position, task in enumerate(self.stream.tasks)}
        cells = {place[seen_id]: by_space[self._primary] for seen_id, by_space in counts.items()}
        if event != "start":
            for j in (j for j in cells if j < self._position):
                self._low[j] = min(self._low.get(j, cells[j][1]), cells[j][0])
                self._worst[j] = min(self._worst.get(j, cells[j][1]), cells[j][0])
        self._publish(step, event, cells, losses or {})
        return cells

    def _publish(self, step: int, event: str, cells: Mapping[int, Cell], losses: Mapping[int, float]) -> None:
        if event == "start" and self._position > 0:
            return  # the end of the task before stands at the same step
        shares = {position: right / total for position, (right, total) in cells.items()}
        values = {f"accuracy/task_{self._tag(p)}": share for p, share in shares.items()}
        values["accuracy/seen_mean"] = sum(shares.values()) / len(shares)
        tags = {task.task_id: self._tag(p) for p, task in enumerate(self.stream.tasks[: len(cells)])}
        values |= {f"loss/task_{tags[task_id]}": loss for task_id, loss in losses.items()}
        values["switch/task"] = float(self._position)
        old = [j for j in cells if j < self._position]
        if old and event == "step":
            lows = [self._worst[j] / cells[j][1] for j in old]
            worst = sum(lows) / len(lows)
            values["continual/min_acc"] = worst
            values["continual/wc_acc"] = (shares[self._position] + len(old) * worst) / (len(old) + 1)
        self.publish(step, values)

    def _tag(self, position: int) -> str:
        ids: Sequence[int] = [task.task_id for task in self.stream.tasks]
        return f"{ids[position]:0{3 if len(ids) > 100 else 2}d}"
