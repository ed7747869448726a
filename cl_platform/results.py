"""The run's accuracy matrices, and what they become: a csv, curves, a line per task, ``metrics.json``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cl_platform import registry
from cl_platform.diagnostics import Diagnostics
from cl_platform.evaluation import Counts, spaces_of
from cl_platform.metrics import AccuracyMatrix, Cell, average_curve, summarise
from cl_platform.metrics.continual_log import ContinualLog
from cl_platform.metrics.continual_results import continual_entries, coverage, gap_table
from cl_platform.metrics.results import entry

if TYPE_CHECKING:
    from cl_platform.scenarios import Stream, Task

log = logging.getLogger("cl_platform")


@dataclass(frozen=True)
class Continual:
    """What continual evaluation left.

    Attributes:
        log: what was read from its file, or ``None``.
        facts: how it was done: the grid, images of a subset, evaluation's share of the work.
        window: updates after a switch in which a gap is looked for.
        tolerance: how far below the old accuracy counts as recovered.
        reason: why its metrics have no values, where that is so whatever the log holds.
        further: space -> entries of other onlookers.
        forgotten: ids of tasks that were forgotten on request; no average is over them.
    """

    log: ContinualLog | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    window: int | None = None
    tolerance: float = 0.02
    reason: str | None = "evaluation_off"
    further: Callable[[str], dict[str, dict[str, Any]]] = lambda space: {}
    forgotten: Collection[int] = ()

    def entries(self, spaces: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Entries of ``metrics.json`` under suffixed keys."""
        if self.reason is not None:
            made = continual_entries(None, spaces, reason=self.reason)
        else:
            made = continual_entries(
                self.log, spaces, window=self.window, tolerance=self.tolerance, forgotten=self.forgotten
            )
        return {**made, **self.further(spaces[0])}

    def tables(self, primary: str) -> dict[str, Any]:
        """The objects ``continual`` and ``gaps`` of ``metrics.json``."""
        if self.log is None:
            return {"continual": self.facts, "gaps": []}
        extent = coverage(self.log, primary)
        bad = [str(row) for row in self.log.bad_rows]
        gaps = [] if self.reason else gap_table(self.log, primary, self.window, self.tolerance, self.forgotten)
        return {"continual": {**self.facts, **extent, "bad_rows": bad}, "gaps": gaps}


class Results:
    """Counts of every evaluation so far, one matrix per prediction space.

    Args:
        stream: the tasks.
        trains_once: all tasks are trained on together, so that only the last row of a matrix is filled.
    """

    def __init__(self, stream: Stream, trains_once: bool = False) -> None:
        self._tasks = stream.tasks
        self._spaces = spaces_of(stream.setting)
        self._row_reason = "joint_trains_once" if trains_once else None
        ids = [task.task_id for task in stream.tasks]
        self._matrices = {space: AccuracyMatrix(space, list(ids)) for space in self._spaces}
        self.diagnostics = Diagnostics(stream, self._spaces[0])

    @property
    def primary(self) -> AccuracyMatrix:
        """The matrix of the scenario's own prediction space."""
        return self._matrices[self._spaces[0]]

    @property
    def forgotten(self) -> frozenset[int]:
        """Ids of tasks that were learnt and then forgotten on request."""
        return frozenset(self.primary.forgotten)

    def kept(self, tasks: Sequence[Task]) -> list[Task]:
        """Those of some tasks that were not forgotten."""
        return [task for task in tasks if task.task_id not in self.primary.forgotten]

    def forget(self, task_id: int) -> None:
        """Leave a task out of all that follows, and of every average; its counts by class and image go."""
        others = {c for task in self.kept(self._tasks) if task.task_id != task_id for c in task.classes}
        classes = [c for task in self._tasks if task.task_id == task_id for c in task.classes if c not in others]
        for matrix in self._matrices.values():
            matrix.forget(task_id, classes)
        self.diagnostics.forget(task_id, classes)

    def add(self, position: int, counts: Counts) -> None:
        """Add the evaluation after the task at ``position``; columns beyond it are tasks not learnt yet."""
        tasks = self.kept(self._tasks)[: len(counts.total)]
        ids = [task.task_id for task in tasks]
        learnt = [task.task_id for task in tasks if task.position <= position]
        self.diagnostics.add(position, counts, self.kept(self._tasks[: position + 1]))
        for space, matrix in self._matrices.items():
            cells = dict(zip(ids, zip(counts.correct[space], counts.total, strict=True), strict=True))
            pooled = dict(zip(learnt, counts.cumulative, strict=False)) if space == "cil" else None
            per_class = counts.per_class if space == self._spaces[0] else None
            matrix.append_row(self._tasks[position].task_id, cells, pooled, per_class)

    def take_back(self) -> None:
        """Remove the newest evaluation, to be followed by another one at its place."""
        for matrix in self._matrices.values():
            matrix.rows.pop()
            matrix.cumulative.pop()
        self.diagnostics.take_back()

    def newest(self) -> dict[str, dict[int, Cell]]:
        """The newest row by prediction space: task id -> (right answers, images) of what is not forgotten by now."""
        found = {}
        for space, matrix in self._matrices.items():
            cells = zip(matrix.task_ids, matrix.rows[-1] if matrix.rows else [], strict=False)
            found[space] = {t: cell for t, cell in cells if cell is not None and t not in matrix.forgotten}
        return found

    def csv(self) -> str:
        """Text of ``accuracy_matrix.csv`` in the primary space."""
        return self.primary.to_csv()

    def curves(self, position: int) -> dict[str, float]:
        """Scalars for the loggers after the task at ``position``: per-task accuracies and their mean."""
        values = {}
        for column in range(position + 1):
            value = self.primary.accuracy(position, column)
            if value is not None:
                values[f"test_accuracy/task_{self.primary.task_ids[column]:02d}"] = value
        if values:
            values["test_accuracy/seen_mean"] = sum(values.values()) / len(values)
        return values

    def line(self, position: int) -> str:
        """One line about the tasks seen so far."""
        shown = [self.primary.accuracy(position, j) for j in range(position + 1)]
        cells = " ".join("-" if value is None else f"{100 * value:.1f}" for value in shown)
        known = [value for value in shown if value is not None]
        mean = 100 * sum(known) / len(known) if known else float("nan")
        task = f"task {self._tasks[position].task_id} ({position + 1} of {len(self._tasks)})"
        return f"after {task}: mean {mean:.1f} %, per task {cells}"

    def metrics(self, strategy_facts: dict[str, Any], continual: Continual) -> dict[str, Any]:
        """Content of ``metrics.json``.

        Args:
            strategy_facts: what strategies say about themselves; stands under ``strategy``.
            continual: what continual evaluation left; its extent stands under ``continual``, its gaps under ``gaps``.
        """
        candidates = {space: self._candidates(space) for space in self._spaces}
        summary = summarise(
            self._matrices,
            self._spaces[0],
            row_reason=self._row_reason,
            candidates=candidates,
            extra={
                **self._plugin_entries(),
                **self._curve_entries(),
                **continual.entries(self._spaces),
                **self.diagnostics.entries(),
            },
        )
        tables = continual.tables(self._spaces[0])
        return {**summary, **tables, "forgotten": self._forgotten_cells(), "strategy": strategy_facts}

    def _forgotten_cells(self) -> list[dict[str, Any]]:
        """Why cells of the matrix are empty from some row on."""
        ids, rows = self.primary.task_ids, self.primary.forgotten
        return [{"task_id": t, "after_task": ids[rows[t] - 1], "reason": "forgotten"} for t in sorted(rows)]

    def _candidates(self, space: str) -> list[int]:
        sizes, seen = [], set()
        for task in self._tasks:
            seen |= set(task.classes)
            sizes.append(len(task.classes) if space == "til" else len(seen))
        return sizes

    def _curve_entries(self) -> dict[str, dict[str, Any]]:
        return {
            f"acc_curve_{space}": entry("1.1", list(average_curve(matrix)), space)
            for space, matrix in self._matrices.items()
        }

    def _plugin_entries(self) -> dict[str, dict[str, Any]]:
        """Registered metrics: of a function's matrix in each space, under the function's name."""
        return {
            f"{name}_{space}": _plugin_entry(name, matrix)
            for name in registry.metrics.names()
            for space, matrix in self._matrices.items()
        }

    def to_json(self) -> dict[str, Any]:
        """State for a checkpoint."""
        matrices = {space: matrix.to_dict() for space, matrix in self._matrices.items()}
        return {"matrices": matrices, "diagnostics": self.diagnostics.to_json()}

    def load_json(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`to_json` gave."""
        matrices = state["matrices"]
        ids = [task.task_id for task in self._tasks]
        stored = {space: AccuracyMatrix.from_dict(matrices[space]).only(ids) for space in self._spaces}
        self._matrices = {space: matrix.behind(ids) for space, matrix in stored.items()}  # of tasks added since
        self.diagnostics.load_json(state["diagnostics"])


def _plugin_entry(name: str, matrix: AccuracyMatrix) -> dict[str, Any]:
    """A plug-in's metric; one that fails costs its own value and nothing else."""
    function = registry.metrics.get(name)
    try:
        found = function(matrix)
        value = None if found is None else float(found)
        made = entry("plug-in", value, matrix.space, reason="no_value" if value is None else None)
    except Exception:
        log.warning("the metric %s of a plug-in failed", name, exc_info=True)
        made = entry("plug-in", None, matrix.space, reason="failed")
    return {**made, "text": next(iter((function.__doc__ or "").strip().splitlines()), "")}
