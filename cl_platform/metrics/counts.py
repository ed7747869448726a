"""The accuracy matrix as integer counts: what every matrix metric is computed from, and what a run stores of it."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

SPACES = ("cil", "til", "dil", "all")
"""Suffixes of the prediction spaces: class-, task-, domain-incremental, and every class of the stream."""

Cell = tuple[int, int]
"""(right answers, images) of one evaluation."""


@dataclass
class AccuracyMatrix:
    """Right answers and images of task position j (column) after training task position i (row), in one space.

    Rows are the positions trained so far; columns are all positions known so far. A cell that was not evaluated is
    ``None``, never 0. Forgotten tasks keep their position and their old counts; ``kept`` leaves them out.

    Attributes:
        space: prediction space, one of ``SPACES``.
        task_ids: identity of the task at each position, in stream order; grows when a new task is appended.
        rows: cells of each row, as wide as ``task_ids``.
        init: cells of the model before its first update, or ``None``.
        cumulative: entry ``[i][t]`` counts the images of tasks 0..t answered among the classes of tasks 0..t by the
            model after position i.
        per_class: class id -> cell, for the newest row only.
        forgotten: task id -> number of rows there were when it was forgotten.

    Raises:
        ValueError: unknown space, or a task id twice.
    """

    space: str
    task_ids: list[int] = field(default_factory=list)
    rows: list[list[Cell | None]] = field(default_factory=list)
    init: list[Cell | None] | None = None
    cumulative: list[list[Cell | None]] = field(default_factory=list)
    per_class: dict[int, Cell] = field(default_factory=dict)
    forgotten: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.task_ids = [operator.index(task_id) for task_id in self.task_ids]
        if self.space not in SPACES:
            raise ValueError(f"space {self.space!r} is none of {', '.join(SPACES)}")
        if len(set(self.task_ids)) != len(self.task_ids):
            raise ValueError(f"a task id stands twice in {self.task_ids}")

    @property
    def num_trained(self) -> int:
        """How many positions have been trained, T in the definitions."""
        return len(self.rows)

    @property
    def kept(self) -> list[int]:
        """Positions trained so far whose task was not forgotten: those that averages are over."""
        return [p for p in range(self.num_trained) if self.task_ids[p] not in self.forgotten]

    @property
    def correct(self) -> list[list[int | None]]:
        """Right answers ``[i][j]``, ``None`` where not evaluated."""
        return [_column(row, 0) for row in self.rows]

    @property
    def total(self) -> list[list[int | None]]:
        """Images ``[i][j]``, ``None`` where not evaluated."""
        return [_column(row, 1) for row in self.rows]

    def accuracy(self, row: int, column: int) -> float | None:
        """R[row][column] in [0, 1] as float64; ``None`` where not evaluated or without images."""
        cell = self.rows[row][column]
        return cell[0] / cell[1] if cell is not None and cell[1] else None

    def row_is_missing(self, row: int) -> bool:
        """Whether nothing at all was evaluated after this position."""
        return all(cell is None for cell in self.rows[row])

    def pool_is_intact(self, row: int, position: int) -> bool:
        """Whether the cumulative count ``[row][position]`` holds no image of a task forgotten by now."""
        pooled = self.task_ids[: position + 1]
        return all(self.forgotten.get(task_id, 0) <= row for task_id in pooled)

    def append_row(
        self,
        task_id: int,
        cells: Mapping[int, Cell],
        cumulative: Mapping[int, Cell] | None = None,
        per_class: Mapping[int, Cell] | None = None,
    ) -> None:
        """Add the evaluation after training ``task_id``.

        Positions between the last row and this one were not evaluated (a run that trains once on everything has only
        its last row): they become empty rows.

        Args:
            task_id: the task just trained; an id not known yet becomes the next position.
            cells: task id -> (right answers, images); tasks left out count as not evaluated.
            cumulative: task id of position t -> (right answers, images) over tasks 0..t among their classes.
            per_class: class id -> (right answers, images) over the same images.

        Raises:
            ValueError: a row for a position that already has one, an unknown task, counts outside 0 <= right <= all.
        """
        task_ids = self.task_ids if task_id in self.task_ids else [*self.task_ids, operator.index(task_id)]
        position = task_ids.index(task_id)
        if position < self.num_trained:
            raise ValueError(f"task {task_id} at position {position} already has its row")
        row = _spread(cells, task_ids)
        pools = _spread(cumulative or {}, task_ids)[: position + 1]
        classes = {operator.index(c): _checked(cell) for c, cell in sorted((per_class or {}).items())}
        self.task_ids = task_ids
        while self.num_trained < position:
            self.cumulative.append([None] * (self.num_trained + 1))
            self.rows.append([])
        self.rows.append(row)
        self.cumulative.append(pools)
        self.per_class = classes
        for short in [*self.rows, *([self.init] if self.init is not None else [])]:
            short.extend([None] * (len(task_ids) - len(short)))

    def set_init(self, cells: Mapping[int, Cell]) -> None:
        """Store the evaluation before the first update, task id -> (right answers, images).

        Raises:
            ValueError: an unknown task, counts outside 0 <= right <= all.
        """
        self.init = _spread(cells, self.task_ids)

    def forget(self, task_id: int, classes: Iterable[int] = ()) -> None:
        """Leave a task out of every average from now on; its past counts stay readable.

        Args:
            task_id: the forgotten task.
            classes: class ids that only this task had; their per-class counts are removed.

        Raises:
            ValueError: unknown task.
        """
        if task_id not in self.task_ids:
            raise ValueError(f"task {task_id} is none of {self.task_ids}")
        self.forgotten.setdefault(operator.index(task_id), self.num_trained)
        gone = set(classes)
        self.per_class = {c: cell for c, cell in self.per_class.items() if c not in gone}

    def only(self, task_ids: Collection[int]) -> AccuracyMatrix:
        """The matrix of a stream that leaves out all other tasks, none of which was trained yet.

        Raises:
            ValueError: one of them has a row.
        """
        gone = [task_id for task_id in self.task_ids if task_id not in task_ids]
        trained = set(gone) & set(self.task_ids[: self.num_trained])
        if trained:
            raise ValueError(f"tasks {sorted(trained)} were trained already")
        keep = [place for place, task_id in enumerate(self.task_ids) if task_id in task_ids]
        narrow = [[row[place] for place in keep] for row in self.rows]
        init = None if self.init is None else [self.init[place] for place in keep]
        ids = [self.task_ids[place] for place in keep]
        return replace(self, task_ids=ids, rows=narrow, init=init)

    def behind(self, task_ids: Sequence[int]) -> AccuracyMatrix:
        """The matrix with further tasks behind its own, none of which was evaluated yet."""
        new = [task_id for task_id in task_ids if task_id not in self.task_ids]
        wide = [[*row, *([None] * len(new))] for row in self.rows]
        init = None if self.init is None else [*self.init, *([None] * len(new))]
        return replace(self, task_ids=[*self.task_ids, *new], rows=wide, init=init)

    def to_csv(self) -> str:
        """The accuracies as CSV text: a line per row, ``init`` first if known, exact decimals, else ``NaN``."""
        lines = [",".join(["after_task", *(f"task_{task_id}" for task_id in self.task_ids)])]
        if self.init is not None:
            lines.append(",".join(["init", *map(_decimal, self.init)]))
        for task_id, row in zip(self.task_ids, self.rows, strict=False):
            lines.append(",".join([str(task_id), *map(_decimal, row)]))
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and integers for JSON; :meth:`from_dict` restores an equal matrix."""
        return {
            "space": self.space,
            "task_ids": list(self.task_ids),
            "correct": self.correct,
            "total": self.total,
            "init": None if self.init is None else [_column(self.init, 0), _column(self.init, 1)],
            "cumulative": [[None if cell is None else list(cell) for cell in row] for row in self.cumulative],
            "per_class": {str(c): list(cell) for c, cell in self.per_class.items()},
            "forgotten": {str(task_id): rows for task_id, rows in self.forgotten.items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> AccuracyMatrix:
        """The matrix that :meth:`to_dict` wrote, also after a trip through JSON.

        Raises:
            ValueError: lengths that do not fit together, counts outside 0 <= right <= all.
            KeyError: a part is missing.
        """
        matrix = cls(state["space"], list(state["task_ids"]))
        width = len(matrix.task_ids)
        for right, all_ in zip(state["correct"], state["total"], strict=True):
            matrix.rows.append(_joined(right, all_, width))
        if state["init"] is not None:
            right, all_ = state["init"]
            matrix.init = _joined(right, all_, width)
        matrix.cumulative = [[None if cell is None else _checked(cell) for cell in row] for row in state["cumulative"]]
        if [len(row) for row in matrix.cumulative] != list(range(1, matrix.num_trained + 1)):
            raise ValueError("cumulative counts do not have i + 1 entries in row i")
        if matrix.num_trained > width:
            raise ValueError(f"{matrix.num_trained} rows for {width} tasks")
        matrix.per_class = {int(c): _checked(cell) for c, cell in state["per_class"].items()}
        matrix.forgotten = {int(task_id): operator.index(rows) for task_id, rows in state["forgotten"].items()}
        return matrix


def _checked(cell: Sequence[int]) -> Cell:
    right, all_ = (operator.index(count) for count in cell)
    if not 0 <= right <= all_:
        raise ValueError(f"{right} right answers of {all_} images")
    return right, all_


def _spread(cells: Mapping[int, Cell], task_ids: Sequence[int]) -> list[Cell | None]:
    unknown = sorted(set(cells) - set(task_ids))
    if unknown:
        raise ValueError(f"counts for tasks {unknown}, known are {list(task_ids)}")
    return [_checked(cells[task_id]) if task_id in cells else None for task_id in task_ids]


def _column(cells: Sequence[Cell | None], part: int) -> list[int | None]:
    return [None if cell is None else cell[part] for cell in cells]


def _joined(right: Sequence[int | None], all_: Sequence[int | None], width: int) -> list[Cell | None]:
    if len(right) != width or len(all_) != width:
        raise ValueError(f"a row of {len(right)} and {len(all_)} counts for {width} tasks")
    cells: list[Cell | None] = []
    for c, n in zip(right, all_, strict=True):
        if (c is None) != (n is None):
            raise ValueError("right answers without images, or images without right answers")
        cells.append(None if c is None or n is None else _checked((c, n)))
    return cells


def _decimal(cell: Cell | None) -> str:
    return repr(cell[0] / cell[1]) if cell is not None and cell[1] else "NaN"
