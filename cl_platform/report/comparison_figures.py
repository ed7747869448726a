"""Figures of a comparison over updates: accuracy, worst case and lost accuracy, a line and a band for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from cl_platform.metrics.seeds import OverSeeds
from cl_platform.report.comparison_curves import GroupCurves, Strand, place_on
from cl_platform.report.comparison_tables import wrapped
from cl_platform.report.curve_figures import mark_switches
from cl_platform.report.drawing import plain, sheet, style, thinned
from cl_platform.report.palette import LINES, MARKERS, MUTED, OKABE_ITO

FEW_SEEDS = 3
"""Up to so many runs, each is drawn as a thin line: their 95 % band says little about where they are."""


@dataclass(frozen=True)
class Look:
    """How one group is drawn everywhere; differs from its neighbours in colour, line and marker at once.

    Attributes:
        label: its name, broken into lines.
        color: one of ``OKABE_ITO``.
        marker: matplotlib's name of it.
        line: matplotlib's line style.
    """

    label: str
    color: str
    marker: str
    line: Any


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """A look for each group, by its place; colour, line and marker together repeat only after 88 groups."""
    return {
        label: Look(
            in_lines(label), OKABE_ITO[i % len(OKABE_ITO)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]
        )
        for i, label in enumerate(labels)
    }  # fmt: skip


def in_lines(label: str, width: int = 28) -> str:
    """A group's label for a legend: at most three lines."""
    lines = wrapped(plain(label, 200), width)
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], f"{lines[2][: width - 2]} …"])


def while_learning(curves: Sequence[GroupCurves], look: dict[str, Look], title: str) -> Figure | None:
    """Mean accuracy over the tasks seen, and min-ACC below it; ``None`` without curves."""
    if not curves:
        return None
    with_lowest = any(group.lowest for group in curves)
    with style():
        figure = sheet(6.6 if with_lowest else 4.0, f"While learning: {title}")
        rows: list[Axes] = list(figure.subplots(2 if with_lowest else 1, 1, sharex=True, squeeze=False)[:, 0])
        _overlay(rows[0], curves, [group.seen for group in curves], look)
        rows[0].set(ylabel="mean accuracy of seen tasks (%)", ylim=(-2, 102))
        if with_lowest:
            _overlay(rows[1], curves, [group.lowest for group in curves], look)
            rows[1].set(ylabel="min-ACC so far (%)", ylim=(-2, 102))
        _axis(rows, curves)
        legend(figure, rows[0])
    return figure


def lost_after_switches(curves: Sequence[GroupCurves], look: dict[str, Look], title: str) -> Figure | None:
    """What old tasks lost since the switch, over updates; below, depth and what was won back, by switch."""
    known = [group for group in curves if group.lost or group.depth]
    if not known:
        return None
    with style():
        figure = sheet(6.6, f"Stability gap: {title}")
        parts = figure.subplot_mosaic([["lost", "lost"], ["depth", "transient"]], height_ratios=(1.2, 1))
        _overlay(parts["lost"], known, [group.lost for group in known], look)
        parts["lost"].set_ylabel("lost since the switch (points)")
        points_axis(parts["lost"])
        _axis([parts["lost"]], known)
        ids = known[0].curves.task_ids
        for name, label in (("depth", "gap depth (points)"), ("transient", "of it, won back (points)")):
            values = {group.label: getattr(group, name) for group in known}
            by_place(parts[name], values, look, lines=False)
            places = sorted({k for found in values.values() for k in found})
            parts[name].set_xticks(places, [f"to {ids[k]}" for k in places])
            parts[name].set(xlabel="switch to task", ylabel=label)
        parts["transient"].sharey(parts["depth"])
        points_axis(parts["depth"])
        legend(figure, parts["lost"])
    return figure


def by_place(
    axes: Axes, values: dict[str, dict[int, OverSeeds]], look: dict[str, Look], lines: bool, scale: float = 100
) -> None:
    """Means with their bands at whole numbers, groups side by side.

    Args:
        axes: to draw on.
        values: label -> place -> over the seeds.
        look: label -> its look.
        lines: whether the means of a group are joined.
        scale: factor on all values.
    """
    room = min(0.7, 0.14 * (len(values) - 1))
    for number, (label, found) in enumerate(values.items()):
        shift = room * (number / (len(values) - 1) - 0.5) if len(values) > 1 else 0.0
        known = {place: value for place, value in found.items() if value.mean is not None}
        shown = look[label]
        places = [place + shift for place in known]
        means = [scale * (value.mean or 0.0) for value in known.values()]
        halves = [scale * (value.half or 0.0) for value in known.values()]
        axes.errorbar(
            places, means, yerr=halves, color=shown.color, marker=shown.marker, label=shown.label,
            linestyle=shown.line if lines else "none", markersize=5, capsize=2.5, elinewidth=1.1, linewidth=1.2,
        )  # fmt: skip


def points_axis(axes: Axes, least: float = -1) -> None:
    """The axis of a difference of accuracies, no further than such a difference goes."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(least, low), min(102, max(high, 1)))


def legend(figure: Figure, axes: Axes) -> None:
    """The groups of ``axes`` at the right of the figure."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 1 + (len(labels) - 1) // 24
    figure.legend(handles, labels, loc="outside right upper", ncols=columns, handlelength=3.4, labelspacing=0.7)


def same_updates(curves: Sequence[GroupCurves]) -> bool:
    """Whether tasks begin and end at the same updates in all groups."""
    return len({group.edges for group in curves}) == 1


def _overlay(axes: Axes, curves: Sequence[GroupCurves], drawn: Sequence[Strand], look: dict[str, Look]) -> None:
    """A line with its band for each group, broken at every switch."""
    shared = same_updates(curves)
    for number, (group, strand) in enumerate(zip(curves, drawn, strict=True)):
        place, shown = place_on(group.curves, shared), look[group.label]
        label: str | None = f"{shown.label}\n{group.n} seed{'s' if group.n != 1 else ''}"
        for k, band in enumerate(strand.bands):
            kept = thinned([step for step, _ in band], [value.mean or 0.0 for _, value in band]) if band else []
            xs = [place(k, band[i][0]) for i in kept]
            if group.n > 1:
                low, high = ([100 * (getattr(band[i][1], end) or 0.0) for i in kept] for end in ("low", "high"))
                faint = 0.16 if group.n > 2 else 0.08  # of two runs it covers most of the axes
                axes.fill_between(xs, low, high, color=shown.color, alpha=faint, linewidth=0)
            for run in strand.runs if 1 < group.n <= FEW_SEEDS else ():
                axes.plot(xs, [100 * run[k][i] for i in kept], color=shown.color, linewidth=0.7, alpha=0.6)
            marks = range(number % 3, len(xs), max(1, len(xs) // 4)) if len(xs) > 3 else range(len(xs))
            axes.plot(
                xs, [100 * (band[i][1].mean or 0.0) for i in kept], color=shown.color, linestyle=shown.line,
                linewidth=1.9, marker=shown.marker, markevery=list(marks), markersize=4.4, label=label,
            )  # fmt: skip
            label = None


def _axis(rows: Sequence[Axes], curves: Sequence[GroupCurves]) -> None:
    """Updates if all groups share them, else tasks of one width each; switches are marked either way."""
    if same_updates(curves):
        for number, axes in enumerate(rows):
            mark_switches(axes, curves[0].curves)
            if number:
                for text in list(axes.texts):
                    text.remove()
        rows[-1].set_xlabel("update")
        return
    longest = max(curves, key=lambda group: group.curves.begun).curves
    for axes in rows:
        for k in range(1, longest.begun):
            axes.axvline(k, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xlim(-0.02, longest.begun + 0.02)
        axes.grid(axis="x", visible=False)
        axes.xaxis.set_major_locator(FixedLocator([]))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.xaxis.set_minor_formatter(NullFormatter())
    ids = [str(longest.task_ids[k]) for k in range(longest.begun)]
    rows[-1].set_xticks(
        [k + 0.5 for k in range(longest.begun)], [f"task {i}" if longest.begun < 12 else i for i in ids]
    )
    rows[-1].tick_params(axis="x", length=0)
    rows[-1].set_xlabel("share of each task's updates")
