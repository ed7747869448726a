"""Heat maps: the accuracy matrix, and what was taken for what after each task."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from cl_platform.report.drawing import WIDTH, plain, sheet, spread, style
from cl_platform.report.palette import CELL_DARK, CELL_LIGHT, MUTED, PAPER
from cl_platform.report.run_view import RunView

HEAT = LinearSegmentedColormap.from_list("heat", ["#F3F6FA", "#9CC3E0", "#3C83BB", "#08306B"])
"""From pale to dark, so that it keeps its order in grey print."""
MOST_CLASSES = 20
"""Beyond it a confusion matrix is shown by task."""

MOST_NUMBERS = 30
"""Beyond so many rows or columns cells are too small for numbers."""
MOST_PANELS = 20

Grid = Sequence[Sequence[float | None]]


def accuracy_matrix(view: RunView) -> Figure | None:
    """Accuracy on every task after every task, with the mean over the tasks seen; ``None`` before the first end."""
    rows = [(view.task_ids[i], row) for i, row in enumerate(view.matrix) if any(cell is not None for cell in row)]
    if not rows:
        return None
    wide = len(view.task_ids)
    with style():
        width = min(WIDTH, max(6.5, 2.0 + 0.85 * (wide + 1)))
        high = min(0.55, max(0.3 if wide <= MOST_NUMBERS else 0.12, (WIDTH - 2) / (wide + 1)))
        figure = sheet(1.35 + high * len(rows), f"Accuracy after each task (%): {view.name}", width)
        axes, means = figure.subplots(1, 2, width_ratios=(wide, 1), sharey=True)
        _heat(axes, [row for _, row in rows], numbers=wide <= MOST_NUMBERS)
        positions = {task_id: position for position, task_id in enumerate(view.task_ids)}
        _heat(means, [[_mean(row, positions[i], view)] for i, row in rows], numbers=len(rows) <= MOST_NUMBERS)
        _ticks(axes, [str(i) for i in view.task_ids], [f"after task {i}" for i, _ in rows])
        axes.set_xlabel("accuracy on task")
        means.set_xticks([0], ["mean"])
        means.tick_params(length=0)
    return figure


def confusion_last(view: RunView) -> Figure | None:
    """What was taken for what after the last task, in images; ``None`` without the file or with too many classes."""
    tables = _tables(view)
    if not tables:
        return None
    table, names, where = tables[-1]
    n = len(names)
    with style():
        width, high = (
            min(WIDTH, max(6.5, 2.4 + 0.7 * n)),
            min(0.5, max(0.3 if n <= MOST_NUMBERS else 0.12, (WIDTH - 3.2) / n)),
        )
        kind = "task" if _by_task(view) else "class"
        figure = sheet(1.9 + high * n, f"Confusion after {where}, by {kind}: {view.name}", width)
        axes = figure.add_subplot()
        _confusion(axes, table, numbers=True)
        _ticks(axes, names, names, rotate=0.085 * max(map(len, names)) > (width - 2.4) / n)
        axes.set(xlabel="predicted", ylabel="true")
        _task_edges(axes, view, len(tables) - 1)
    return figure


def confusion_grid(view: RunView) -> Figure | None:
    """What was taken for what after every task, in colours only; ``None`` with fewer than two tasks."""
    every = _tables(view)
    if len(every) < 2:
        return None
    chosen = spread(range(len(every)), MOST_PANELS)
    tables = [every[number] for number in chosen]
    columns = min(len(tables), 5)
    rows = -(-len(tables) // columns)
    with style():
        figure = sheet(
            0.6 + 2.25 * rows,
            f"Confusion after {'every task' if tables == every else 'some of the tasks'}: {view.name}",
        )
        grid = figure.subplots(rows, columns, squeeze=False)
        for number, axes in enumerate(grid.flat):
            if number >= len(tables):
                axes.set_visible(False)
                continue
            table, _, where = tables[number]
            _confusion(axes, table, numbers=False)
            axes.set_title(f"after {where}", fontsize=8.5)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_aspect("equal")
            _task_edges(axes, view, chosen[number])
        figure.supxlabel("predicted", fontsize=9)
        figure.supylabel("true", fontsize=9)
    return figure


def _heat(axes: Axes, values: Grid, numbers: bool, texts: Sequence[Sequence[str]] | None = None) -> None:
    """Cells of shares in [0, 1], the first row on top; ``None`` leaves the paper, texts are percentages by default."""
    high, wide = len(values), max(len(row) for row in values)
    data = [[float("nan") if cell is None else cell for cell in row] for row in values]
    if numbers:
        edges = [x - 0.5 for x in range(wide + 1)], [y - 0.5 for y in range(high + 1)]
        axes.pcolormesh(*edges, data, cmap=HEAT, vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.8)
    else:  # an image, where thousands of cells would make a large file
        axes.imshow(data, cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set(xlim=(-0.5, wide - 0.5), ylim=(high - 0.5, -0.5))
    for spine in axes.spines.values():
        spine.set_visible(False)
    size = 9 if wide <= 10 else 8 if wide <= 16 else 7
    for y, row in enumerate(values if numbers else ()):
        for x, cell in enumerate(row):
            if cell is not None:
                text = texts[y][x] if texts is not None else f"{100 * cell:.1f}" if wide <= 16 else f"{100 * cell:.0f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=size, color=_readable_on(cell))


def _readable_on(cell: float) -> str:
    """The text colour of the larger contrast, by relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in HEAT(cell)[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return CELL_LIGHT if luminance < 0.18 else CELL_DARK


def _ticks(axes: Axes, across: Sequence[str], down: Sequence[str], rotate: bool = False) -> None:
    size = 9 if len(across) <= 12 else 8
    apart_x, apart_y = -(-len(across) // 40), -(-len(down) // 40)
    turn: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if rotate else {}
    axes.set_xticks(range(0, len(across), apart_x), across[::apart_x], fontsize=size, **turn)
    axes.set_yticks(range(0, len(down), apart_y), down[::apart_y], fontsize=size)
    axes.tick_params(length=0)


def _mean(row: Sequence[float | None], position: int, view: RunView) -> float | None:
    """Mean over the tasks seen by then that are still averaged."""
    cells = [cell for j, cell in enumerate(row[: position + 1]) if view.task_ids[j] not in view.forgotten]
    known = [cell for cell in cells if cell is not None]
    return sum(known) / len(known) if known and len(known) == len(cells) else None


def _confusion(axes: Axes, table: Sequence[Sequence[int]], numbers: bool) -> None:
    shares = [[count / sum(row) if sum(row) else 0.0 for count in row] for row in table]
    texts = [[str(count) if count else "" for count in row] for row in table]
    _heat(axes, shares, numbers=numbers and len(table) <= MOST_NUMBERS, texts=texts)


def _task_edges(axes: Axes, view: RunView, number: int) -> None:
    """Lines between the classes of different tasks, where every class belongs to one task."""
    homes = _homes(view)
    if homes is None or _by_task(view):
        return
    classes = _records(view)[number]["classes"]
    for index, (left, right) in enumerate(itertools.pairwise(classes)):
        if homes.get(left) != homes.get(right):
            axes.axhline(index + 0.5, color=MUTED, linewidth=0.7)
            axes.axvline(index + 0.5, color=MUTED, linewidth=0.7)


def _tables(view: RunView) -> list[tuple[list[list[int]], list[str], str]]:
    """For each task end the counts, their names and 'task 3'; by task where there are too many classes."""
    found = []
    for after in _records(view):
        counts, names = after["counts"], [plain(name, 18) for name in after["class_names"]]
        if _by_task(view):
            counts, names = _summed(after, _homes(view) or {})
        if names:
            found.append((counts, names, f"task {after['task_id']}"))
    return found


def _records(view: RunView) -> list[Mapping[str, Any]]:
    """Well-formed entries of ``confusion.json``."""
    records = view.confusion.get("after")
    if not isinstance(records, list):
        return []
    return [record for record in records if isinstance(record, Mapping) and _well_formed(record)]


def _well_formed(record: Mapping[str, Any]) -> bool:
    parts = [record.get(name) for name in ("classes", "class_names", "counts")]
    if "task_id" not in record or not all(isinstance(part, list) for part in parts):
        return False
    classes, names, counts = parts
    square = all(isinstance(row, list) and len(row) == len(classes) for row in counts)  # type: ignore[arg-type, union-attr]
    return square and len(names) == len(counts) == len(classes)  # type: ignore[arg-type]


def _by_task(view: RunView) -> bool:
    return max((len(r["classes"]) for r in _records(view)), default=0) > MOST_CLASSES and _homes(view) is not None


def _homes(view: RunView) -> dict[int, int] | None:
    """Class id -> task id; ``None`` if it is not known, or tasks share classes."""
    dataset = view.environment.get("dataset")
    tasks = dataset.get("tasks") if isinstance(dataset, Mapping) else None
    homes: dict[int, int] = {}
    for task in (task for task in tasks if isinstance(task, Mapping)) if isinstance(tasks, list) else ():
        for class_id in task.get("classes", ()):
            if homes.setdefault(class_id, task["task_id"]) != task["task_id"]:
                return None
    return homes or None


def _summed(after: Mapping[str, Any], homes: Mapping[int, int]) -> tuple[list[list[int]], list[str]]:
    owners = [homes.get(class_id) for class_id in after["classes"]]
    ids = sorted({owner for owner in owners if owner is not None})
    table = [[0] * len(ids) for _ in ids]
    for true, row in zip(owners, after["counts"], strict=True):
        for predicted, count in zip(owners, row, strict=True):
            if true is not None and predicted is not None:
                table[ids.index(true)][ids.index(predicted)] += count
    return table, [f"task {task_id}" for task_id in ids]
