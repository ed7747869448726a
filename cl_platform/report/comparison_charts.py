"""Figures of a comparison over tasks and metrics: means as points, an error bar wherever there are seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cl_platform.metrics.matrix import Undefined
from cl_platform.metrics.seeds import OverSeeds, over_seeds
from cl_platform.report import words
from cl_platform.report.comparison_figures import Look, by_place, in_lines, legend, points_axis
from cl_platform.report.comparison_groups import Group
from cl_platform.report.comparison_numbers import Numbers, accuracy_after, definition, direction
from cl_platform.report.comparison_tables import short_count
from cl_platform.report.drawing import WIDTH, sheet, style
from cl_platform.report.palette import MUTED, PAPER
from cl_platform.report.run_view import RunView

TITLES = {
    **words.LABELS,
    "intransigence": "intransigence",
    "seconds_total": "seconds",
    "params_trainable": "parameters",
}
"""What a panel of the key numbers is called."""


def accuracy_after_tasks(numbers: Numbers, look: dict[str, Look], title: str) -> Figure | None:
    """Mean accuracy over the tasks seen after each task; ``None`` if no run has a row of its matrix."""
    values = {group.label: _after_tasks(group) for group in numbers.groups}
    values = {label: found for label, found in values.items() if found}
    if not values:
        return None
    ids = _task_ids(numbers.groups)
    with style():
        figure = sheet(4.4, f"After each task, whole test sets: {title}")
        axes = figure.add_subplot()
        by_place(axes, values, look, lines=True)
        axes.set(ylabel="mean accuracy of seen tasks (%)", ylim=(-2, 102), xlabel="after task")
        _places(axes, ids)
        legend(figure, axes)
    return figure


def forgetting_by_task(numbers: Numbers, look: dict[str, Look], title: str) -> Figure | None:
    """Forgetting of every old task (1.5); ``None`` where no run has any."""
    values = {group.label: _forgotten(group) for group in numbers.groups}
    values = {label: found for label, found in values.items() if found}
    if not values:
        return None
    ids = _task_ids(numbers.groups)
    with style():
        figure = sheet(4.0, f"Forgetting of each task: {title}")
        axes = figure.add_subplot()
        by_place(axes, values, look, lines=False)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.set(ylabel="forgetting (points)", xlabel="task")
        points_axis(axes, least=-102)
        _places(axes, ids[: 1 + max(max(found) for found in values.values())])
        legend(figure, axes)
    return figure


def key_numbers(numbers: Numbers, look: dict[str, Look], title: str) -> Figure:
    """A panel for each metric of the table, a row for each group; rings are the single runs."""
    keys = [key for key in numbers.columns if any(numbers.values[g.label, key].n for g in numbers.groups)]
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    labels = [group.label for group in numbers.groups]
    written = [in_lines(label, 27) for label in labels]
    row = max(0.3, 0.06 + 0.15 * max(1 + text.count("\n") for text in written))
    with style():
        figure = sheet(0.7 + rows * (0.75 + row * len(labels)), f"Key numbers: {title}", WIDTH)
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
        for place, axes in enumerate(panels.flat):
            if place >= len(keys):
                axes.set_visible(False)
                continue
            _panel(axes, keys[place], numbers, look)
            axes.set_yticks(range(len(labels)), written)
            axes.set_ylim(len(labels) - 0.45, -0.55)
            axes.tick_params(axis="y", length=0, labelsize=8.5)
    return figure


def _panel(axes: Axes, key: str, numbers: Numbers, look: dict[str, Look]) -> None:
    known = definition(key)
    unit, scale = _unit(key)
    span: list[float] = []
    for row, group in enumerate(numbers.groups):
        shown, value = look[group.label], numbers.values[group.label, key]
        if value.mean is None:
            axes.annotate(
                "no value", (0, row), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", fontsize=8, color=MUTED,
            )  # fmt: skip
            continue
        single = [scale * v for v in numbers.outcomes[group.label, key] if not isinstance(v, Undefined)]
        if len(single) > 1:
            axes.plot(
                single, [row] * len(single), linestyle="none", marker="o", markersize=3.4, markerfacecolor=PAPER,
                markeredgecolor=shown.color, markeredgewidth=0.8, zorder=2,
            )  # fmt: skip
        mean, half = scale * value.mean, scale * (value.half or 0.0)
        axes.errorbar(
            [mean], [row], xerr=[half], color=shown.color, marker=shown.marker, markersize=6, capsize=3, elinewidth=1.3,
            zorder=3,
        )  # fmt: skip
        span += [*single, mean - half, mean + half]
    arrow = {"up": ", higher is better", "down": ", lower is better", None: ""}[direction(key)]
    axes.set_title(f"{TITLES.get(key, key)}{f' ({known.id})' if known else ''}", fontsize=9)
    axes.set_xlabel(f"{unit}{arrow}", fontsize=8, color=MUTED)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="y", visible=False)
    _limits(axes, key, span)


def _limits(axes: Axes, key: str, span: Sequence[float]) -> None:
    """Room for all bars, but no further than the metric's values go."""
    low, high = min(span), max(span)
    room = 0.08 * (high - low) or max(0.05 * abs(high), 1.0)
    known = definition(key)
    least, most = float("-inf"), float("inf")
    if known is not None and known.unit == "fraction":
        least, most = (-103.0, 103.0) if key in words.DIFFERENCES else (-3.0, 103.0)
    elif low - room < 0 <= high:
        least = -0.03 * (high + room)
    axes.set_xlim(max(least, low - room), min(most, high + room))
    axes.locator_params(axis="x", nbins=4)
    if key == "params_trainable":
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))


def _unit(key: str) -> tuple[str, float]:
    known = definition(key)
    if known is None or known.unit != "fraction":
        return (known.unit if known else ""), 1.0
    return ("points" if key in words.DIFFERENCES else "%"), 100.0


def _after_tasks(group: Group) -> dict[int, OverSeeds]:
    width = max(len(run.matrix) for run in group.runs)
    found = {}
    for position in range(width):
        values = [accuracy_after(run, position) for run in group.runs]
        known = [value for value in values if value is not None]
        if known:
            found[position] = over_seeds(known)
    return found


def _forgotten(group: Group) -> dict[int, OverSeeds]:
    """Position of a task -> its forgetting over the seeds."""
    values: dict[int, list[float]] = {}
    for run in group.runs:
        for position, value in _terms(run, "forgetting").items():
            values.setdefault(position, []).append(value)
    return {position: over_seeds(found) for position, found in sorted(values.items())}


def _terms(run: RunView, key: str) -> dict[int, float]:
    entry: Any = run.metrics.get(key)
    terms = entry.get("per_task") if isinstance(entry, Mapping) else None
    averaged = run.metrics.get("tasks")
    if not isinstance(terms, list) or not isinstance(averaged, list) or len(terms) != len(averaged):
        return {}
    places = {task_id: position for position, task_id in enumerate(run.task_ids)}
    return {places[i]: term for i, term in zip(averaged, terms, strict=True) if term is not None and i in places}


def _task_ids(groups: Sequence[Group]) -> tuple[int, ...]:
    return max((run.task_ids for group in groups for run in group.runs), key=len)


def _places(axes: Axes, ids: Sequence[int]) -> None:
    skip = 1 + (len(ids) - 1) // 25
    axes.set_xticks(range(0, len(ids), skip), [str(i) for i in ids[::skip]])
    axes.set_xlim(-0.5, len(ids) - 0.5)
    axes.grid(axis="x", visible=False)
