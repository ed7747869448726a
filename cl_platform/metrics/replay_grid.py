"""What a grid would have seen of a run whose every update was evaluated."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from cl_platform.metrics.continual import min_acc
from cl_platform.metrics.continual_log import ContinualLog, Curves, Evaluation
from cl_platform.metrics.grid import Grid
from cl_platform.metrics.matrix import Outcome


@dataclass(frozen=True)
class Replay:
    """A grid's view of a run beside the whole.

    Attributes:
        min_acc: 2.2.2 of the updates that the grid chose, and of the ends of the tasks.
        min_acc_every_step: 2.2.2 of the whole log.
        share: chosen updates of all updates of the run.
        chosen: position of each task -> its evaluated offsets.
        log: what the run would have logged.
    """

    min_acc: Outcome
    min_acc_every_step: Outcome
    share: Fraction
    chosen: dict[int, tuple[int, ...]]
    log: ContinualLog


def replay(log: ContinualLog, space: str, grid: Grid, forgotten: Collection[int] = ()) -> Replay:
    """Let a fresh grid choose from a log of every update.

    Args:
        log: of a run with ``evaluation=every_step``.
        space: prediction space whose right answers steer, as a run's primary one does.
        grid: in its first state; its plan should be that of the run.
        forgotten: ids of tasks that were forgotten on request.

    Raises:
        ValueError: unknown space, or no evaluation of all tasks at an update that the grid chose.
    """
    curves = Curves.of(log, space, forgotten)
    chosen = {k: _choose(curves, k, grid) for k in range(curves.begun)}
    steps = {(k, curves.begins[k] + offset) for k, offsets in chosen.items() for offset in offsets}
    rows = tuple(row for row in log.rows if row.event != "step" or (row.position, row.global_step) in steps)
    thin = ContinualLog(rows, log.bad_rows, log.task_ids)
    updates = curves.ends[-1] if curves.begun else 0
    share = Fraction(len(steps), updates) if updates else Fraction(0)
    return Replay(min_acc(Curves.of(thin, space, forgotten)), min_acc(curves), share, chosen, thin)


def _choose(curves: Curves, k: int, grid: Grid) -> tuple[int, ...]:
    begin, updates = curves.begins[k], curves.ends[k] - curves.begins[k]
    found = {e.step - begin: e for e in curves.evaluations if e.position == k and e.event == "step" and e.complete}
    end = curves.boundary(k, "end")
    if end is not None and end.complete:
        found.setdefault(updates, end)
    before = curves.boundary(k - 1, "end") or curves.boundary(k, "start")
    grid.begin_task(k, updates, _right(curves, before, k))
    offsets: list[int] = []
    for offset in range(1, updates + 1):
        if grid.due(offset):
            if offset not in found:
                raise ValueError(f"update {offset} of the task at position {k} was not evaluated")
            grid.record(offset, _right(curves, found[offset], k + 1))
            offsets.append(offset)
    grid.end_task()
    return tuple(offsets)


def _right(curves: Curves, evaluation: Evaluation | None, below: int) -> dict[int, int]:
    """Right answers by position, of the tasks before one and not forgotten."""
    cells = {} if evaluation is None else evaluation.cells
    return {j: correct for j, (correct, _) in cells.items() if j < below and j in curves.kept}
