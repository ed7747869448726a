"""The text of ``continual_eval.csv``: writing rows, reading them back with every bad row named, and one space's view.

Only text goes in and out; files are the caller's business.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from cl_platform.metrics.counts import SPACES, Cell

COLUMNS = (
    "global_step",
    "position",
    "task_id",
    "epoch",
    "event",
    "eval_task_id",
    "prediction_space",
    "correct",
    "total",
)
HEADER = ",".join(COLUMNS) + "\n"
EVENTS = ("end", "start", "step")
"""Kinds of evaluation: after, before and during the training of a task; in the order of rows within one step."""

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_IN_TIME = {"start": 0, "step": 1, "end": 2}


@dataclass(frozen=True)
class LogRow:
    """One line: right answers of one task in one evaluation.

    Attributes:
        global_step: optimizer updates so far over the whole run.
        position: stream position of the task being trained.
        task_id: id of the task being trained.
        epoch: epoch within that task.
        event: one of ``EVENTS``.
        eval_task_id: id of the task whose images were answered.
        prediction_space: one of ``SPACES``.
        correct: right answers.
        total: images.
    """

    global_step: int
    position: int
    task_id: int
    epoch: int
    event: str
    eval_task_id: int
    prediction_space: str
    correct: int
    total: int


@dataclass(frozen=True)
class BadRow:
    """A line that was skipped.

    Attributes:
        file: name given by the reader.
        line: number of the line, the header being line 1.
        reason: what is wrong with it.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}"


@dataclass(frozen=True)
class ContinualLog:
    """What a file holds.

    Attributes:
        rows: the good rows in the order of the file.
        bad_rows: the skipped lines.
        task_ids: id of the task at each stream position, as far as known.
    """

    rows: tuple[LogRow, ...]
    bad_rows: tuple[BadRow, ...]
    task_ids: tuple[int, ...]


def format_rows(rows: Iterable[LogRow]) -> str:
    """The lines of one evaluation, each ending in LF, ordered by step, event, evaluated task and space.

    Raises:
        ValueError: a row that :func:`parse` would not take back.
    """
    ordered = sorted(rows, key=_file_order)
    lines: list[str] = []
    for row in ordered:
        line = ",".join(str(getattr(row, column)) for column in COLUMNS)
        made = _read_row(line)
        if isinstance(made, str):
            raise ValueError(f"{line}: {made}")
        lines.append(line + "\n")
    return "".join(lines)


def parse(text: str, name: str = "continual_eval.csv", task_ids: Sequence[int] | None = None) -> ContinualLog:
    """Read the whole text of a file; bad rows are named and skipped, the rest is used.

    Args:
        text: content of the file, with its line ends as they are.
        name: what bad rows call the file.
        task_ids: ids of the tasks in stream order; without them, they are read from the rows.

    Raises:
        ValueError: the header is another one.
    """
    if not text.startswith(HEADER):
        raise ValueError(f"{name}: the first line is not {HEADER.rstrip()!r}")
    *lines, rest = text.split("\n")
    found: list[tuple[int, LogRow]] = []
    bad: list[BadRow] = []
    for number, line in enumerate(lines[1:], start=2):
        row = _read_row(line)
        if isinstance(row, str):
            bad.append(BadRow(name, number, row))
        else:
            found.append((number, row))
    if rest:
        bad.append(BadRow(name, len(lines) + 1, "truncated: does not end in a line feed"))
    ids = tuple(task_ids) if task_ids is not None else _ids_in(found)
    positions = {task_id: position for position, task_id in enumerate(ids)}
    kept: dict[tuple[int, int, str, int, str], tuple[int, LogRow]] = {}
    for number, row in found:
        fault = _contradiction(row, positions)
        if fault is not None:
            bad.append(BadRow(name, number, fault))
            continue
        key = (row.global_step, row.position, row.event, row.eval_task_id, row.prediction_space)
        earlier = kept.pop(key, None)
        if earlier is not None:
            bad.append(BadRow(name, earlier[0], f"replaced by line {number}, which is of the same evaluation and task"))
        kept[key] = (number, row)
    rows = tuple(row for _, row in sorted(kept.values(), key=lambda item: item[0]))
    return ContinualLog(rows, tuple(sorted(bad, key=lambda row: row.line)), ids)


def cut_after(text: str, position: int) -> tuple[str, int]:
    """The text without what was written after a checkpoint, and how many lines were cut.

    The first row of a later task and all that follows goes, and so does a last line without a line feed. Steps would
    not do: a task's ``start`` has the step of the end of the task before.

    Args:
        text: content of the file.
        position: of the last task that the checkpoint holds.
    """
    lines = text.split("\n")
    whole, rest = lines[:-1], lines[-1]
    keep = len(whole)
    for index, line in enumerate(whole):
        fields = line.split(",")
        if index > 0 and len(fields) > 1 and _INTEGER.fullmatch(fields[1]) and int(fields[1]) > position:
            keep = index
            break
    return "".join(line + "\n" for line in whole[:keep]), len(whole) - keep + bool(rest)


@dataclass(frozen=True)
class Evaluation:
    """All rows of one evaluation in one space.

    Attributes:
        step: optimizer updates so far.
        position: stream position of the task being trained.
        event: one of ``EVENTS``.
        cells: position of the evaluated task -> (right answers, images).
        complete: whether every task seen by then, forgotten ones aside, has its row.
    """

    step: int
    position: int
    event: str
    cells: dict[int, Cell]
    complete: bool


@dataclass(frozen=True)
class Curves:
    """The log of one prediction space, by stream position; made by :meth:`of`.

    Attributes:
        task_ids: id of the task at each position.
        evaluations: in the order of time.
        kept: positions begun so far whose task was not forgotten: those that averages are over.
        begins: updates before the first one of each begun task.
        ends: updates at the end of each begun task; of an unfinished one at its last evaluation.
    """

    task_ids: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    kept: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    _index: dict[tuple[int, str], Evaluation] = field(repr=False)

    @classmethod
    def of(cls, log: ContinualLog, space: str, forgotten: Collection[int] = ()) -> Curves:
        """View one space of a log.

        Args:
            log: what :func:`parse` read.
            space: one of ``SPACES``.
            forgotten: ids of tasks that were forgotten on request; they leave every average.

        Raises:
            ValueError: unknown space.
        """
        if space not in SPACES:
            raise ValueError(f"space {space!r} is none of {', '.join(SPACES)}")
        positions = {task_id: position for position, task_id in enumerate(log.task_ids)}
        groups: dict[tuple[int, int, int, str], dict[int, Cell]] = {}
        for row in log.rows:
            if row.prediction_space == space:
                key = (row.position, row.global_step, _IN_TIME[row.event], row.event)
                groups.setdefault(key, {})[positions[row.eval_task_id]] = (row.correct, row.total)
        begun = 1 + max((key[0] for key in groups), default=-1)
        kept = tuple(p for p in range(begun) if log.task_ids[p] not in forgotten)
        evaluations = tuple(
            Evaluation(step, position, event, cells, all(j in cells for j in kept if j <= position))
            for (position, step, _, event), cells in sorted(groups.items())
        )
        index = {(e.position, e.event): e for e in evaluations if e.event != "step"}
        begins, ends = _bounds(begun, evaluations, index)
        return cls(log.task_ids, evaluations, kept, begins, ends, index)

    @property
    def begun(self) -> int:
        """Number of tasks with at least one evaluation, or followed by one."""
        return len(self.begins)

    def boundary(self, position: int, event: str) -> Evaluation | None:
        """The ``start`` or ``end`` evaluation of the task at a position."""
        return self._index.get((position, event))

    def visited(self, j: int) -> dict[int, Cell]:
        """Step -> cell of task j in all ``step`` and ``end`` evaluations, for the first task also its ``start``."""
        return self._cells(j, [e for e in self.evaluations if e.event != "start" or e.position == j == 0])

    def segment(self, k: int, j: int, complete_only: bool = False) -> dict[int, Cell]:
        """Step -> cell of task j in the ``step`` and ``end`` evaluations while task k trains."""
        chosen = [e for e in self.evaluations if e.position == k and e.event != "start"]
        return self._cells(j, [e for e in chosen if e.complete or not complete_only])

    def complete(self) -> list[Evaluation]:
        """Complete ``step`` and ``end`` evaluations, one per step; ``end`` wins."""
        chosen = {e.step: e for e in self.evaluations if e.complete and e.event != "start"}
        return [chosen[step] for step in sorted(chosen)]

    @staticmethod
    def _cells(j: int, evaluations: Iterable[Evaluation]) -> dict[int, Cell]:
        cells = {e.step: e.cells[j] for e in evaluations if j in e.cells}  # in time order: end overrides step
        return dict(sorted(cells.items()))


def _bounds(
    begun: int, evaluations: Sequence[Evaluation], index: dict[tuple[int, str], Evaluation]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First and last step of every begun task; a lost row is replaced by its neighbour across the boundary."""
    last = {e.position: e.step for e in evaluations}
    begins: list[int] = []
    ends: list[int] = []
    for k in range(begun):
        start, end, following = index.get((k, "start")), index.get((k, "end")), index.get((k + 1, "start"))
        begins.append(start.step if start is not None else ends[-1] if ends else 0)
        known = end or following
        ends.append(known.step if known is not None else last.get(k, begins[-1]))
    return tuple(begins), tuple(ends)


def _file_order(row: LogRow) -> tuple[int, int, int, int]:
    event = EVENTS.index(row.event) if row.event in EVENTS else len(EVENTS)
    space = SPACES.index(row.prediction_space) if row.prediction_space in SPACES else len(SPACES)
    return row.global_step, event, row.eval_task_id, space


def _read_row(line: str) -> LogRow | str:
    """The row of a line without its line feed, or what is wrong with it."""
    fields = line.split(",")
    if len(fields) != len(COLUMNS):
        return f"{len(fields)} columns in place of {len(COLUMNS)}"
    values = dict(zip(COLUMNS, fields, strict=True))
    event, space = values.pop("event"), values.pop("prediction_space")
    for column, text in values.items():
        if not _INTEGER.fullmatch(text):
            return f"{column} {text!r} is not an integer"
    number = {column: int(text) for column, text in values.items()}
    if event not in EVENTS:
        return f"unknown event {event!r}"
    if space not in SPACES:
        return f"unknown prediction_space {space!r}"
    if number["total"] <= 0:
        return f"total {number['total']} is not above 0"
    if not 0 <= number["correct"] <= number["total"]:
        return f"correct {number['correct']} is not within 0 and total {number['total']}"
    if number["global_step"] < 0 or number["position"] < 0:
        return "global_step or position is negative"
    return LogRow(event=event, prediction_space=space, **number)


def _ids_in(found: Iterable[tuple[int, LogRow]]) -> tuple[int, ...]:
    """Task ids by position, as far as the rows name them without a hole; the first row of a position decides."""
    named: dict[int, int] = {}
    for _, row in found:
        if row.position not in named and row.task_id not in named.values():
            named[row.position] = row.task_id
    ids: list[int] = []
    while len(ids) in named:
        ids.append(named[len(ids)])
    return tuple(ids)


def _contradiction(row: LogRow, positions: dict[int, int]) -> str | None:
    if positions.get(row.task_id) != row.position:
        return f"task_id {row.task_id} is not the task at position {row.position}"
    if positions.get(row.eval_task_id, row.position + 1) > row.position:
        return f"eval_task_id {row.eval_task_id} was not yet seen at position {row.position}"
    return None
