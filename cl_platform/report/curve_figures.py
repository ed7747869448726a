"""Figures over the update axis: accuracy of every task, worst cases, gradients after each switch."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cl_platform.metrics import continual
from cl_platform.metrics.continual_log import Curves
from cl_platform.report.drawing import WIDTH, sheet, spread, style, thinned, whole_updates
from cl_platform.report.palette import INK, MUTED, OKABE_ITO, task_style
from cl_platform.report.run_view import RunView

MOST_STRIPS = 40


def stability_curves(view: RunView) -> Figure | None:
    """Accuracy of every task over the updates with its Wilson 95 % band; ``None`` without a log."""
    curves = view.curves()
    if curves is None:
        return None
    with style():
        figure = sheet(5.4, f"Accuracy of every task while learning: {view.name}")
        axes = figure.add_subplot()
        crowded = len(curves.kept) > 8
        for position in curves.kept:
            _task_curve(axes, curves, position, band=0.04 if crowded else 0.14)
        _accuracy_axis(axes)
        axes.set_xlabel("update")
        mark_switches(axes, curves)
        _legend(figure, axes)
    return figure


def task_strips(view: RunView) -> Figure | None:
    """The curves of :func:`stability_curves`, one strip for each task; ``None`` without a log."""
    curves = view.curves()
    if curves is None or not curves.kept:
        return None
    shown = spread(curves.kept, MOST_STRIPS)
    rows = len(shown)
    with style():
        which = f"{rows} of {len(curves.kept)} tasks" if rows < len(curves.kept) else "One strip for each task"
        figure = sheet(1.1 + 0.56 * rows, f"{which}: {view.name}")
        strips = figure.subplots(rows, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        figure.get_layout_engine().set(h_pad=0.03, hspace=0)  # type: ignore[union-attr, call-arg]
        for axes, position in zip(strips, shown, strict=True):
            _task_curve(axes, curves, position, band=0.2, most=25 if rows < 12 else 12)
            axes.spines["bottom"].set_visible(axes is strips[-1])
            axes.tick_params(axis="x", length=3.5 if axes is strips[-1] else 0)
            axes.set(ylim=(-4, 104), yticks=(0, 50, 100))
            axes.tick_params(labelsize=7)
            axes.set_ylabel(f"task {curves.task_ids[position]}", rotation=0, ha="right", va="center", fontsize=8.5)
            for begin in curves.begins[1:]:
                axes.axvline(begin, color=MUTED, linewidth=0.6, linestyle=(0, (4, 3)))
        mark_switches(strips[0], curves, lines=False)
        strips[-1].set_xlabel("update")
        whole_updates(strips[-1])
    return figure


def worst_cases(view: RunView) -> Figure | None:
    """min-ACC and WC-ACC at every evaluation, under the mean accuracy; ``None`` without a second task."""
    curves = view.curves()
    if curves is None or not continual.min_acc_curve(curves):
        return None
    mean = continual.seen_mean(curves)
    lines: list[tuple[str, Sequence[tuple[int, float]], str, Any, str]] = [
        ("mean of seen", sorted(mean.items()), MUTED, "-", ""),
        ("WC-ACC", continual.wc_acc_curve(curves), OKABE_ITO[0], "-", "o"),
        ("min-ACC", continual.min_acc_curve(curves), OKABE_ITO[1], (0, (5, 1.6)), "s"),
    ]
    with style():
        figure = sheet(3.7, f"Worst case so far: {view.name}")
        axes = figure.add_subplot()
        for label, points, color, line, marker in lines:
            steps, values = [p[0] for p in points], [100 * p[1] for p in points]
            kept = thinned(steps, values)
            axes.plot(
                [steps[i] for i in kept], [values[i] for i in kept], color=color, linestyle=line, label=label,
                marker=marker or None, markevery=_every(len(kept)),
            )  # fmt: skip
        _accuracy_axis(axes)
        axes.set_xlabel("update")
        mark_switches(axes, curves)
        _legend(figure, axes)
    return figure


@dataclass(frozen=True)
class GradientRow:
    """One line of ``gradients.csv``; an undefined cosine is ``None``."""

    step: int
    position: int
    task_id: int
    plasticity: float
    stability: float
    cosine: float | None


def read_gradients(view: RunView) -> list[GradientRow]:
    """The gradient norms after each switch, empty without the file; lines that cannot be read are left out."""
    try:
        text = (view.path / "gradients.csv").read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    rows = []
    for line in csv.DictReader(io.StringIO(text)):
        try:
            place = int(line["global_step"]), int(line["position"]), int(line["task_id"])
            norms = float(line["plasticity_norm"]), float(line["stability_norm"])
            rows.append(GradientRow(*place, *norms, float(line["cosine"]) if line["cosine"] else None))
        except (KeyError, TypeError, ValueError):
            continue
    return rows


def gradients(view: RunView) -> Figure | None:
    """Norms of what learns and what protects, and their angle, in the first updates of each task; or ``None``."""
    rows = read_gradients(view)
    if not rows:
        return None
    with style():
        figure = sheet(4.6, f"Gradients after each switch: {view.name}")
        norms, angle = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
        places = range(len(rows))
        firsts = [i for i in places if i == 0 or rows[i].position != rows[i - 1].position]
        for number, first in enumerate(firsts):
            part = list(places)[first : firsts[number + 1] if number + 1 < len(firsts) else None]
            _gradient_part(norms, angle, rows, part, labelled=number == 0)
            if number:
                for axes in (norms, angle):
                    axes.axvline(first - 0.5, color=MUTED, linewidth=0.7, linestyle=(0, (4, 3)))
        edges = [*firsts, len(rows)]
        ids = [str(rows[first].task_id) for first in firsts]
        _name_segments(norms, ids, [edge - 0.5 for edge in edges])
        norms.set_yscale("log")
        for axis_ticks in (norms.yaxis.set_major_formatter, norms.yaxis.set_minor_formatter):
            axis_ticks(_plain_decimal)
        norms.set_ylabel("L2 norm")
        angle.axhline(0, color=INK, linewidth=0.7)
        angle.set(ylim=(-1.08, 1.08), ylabel="cosine", xlabel="first updates of each task, side by side")
        angle.set_xlim(-0.5, len(rows) - 0.5)
        angle.set_xticks([])
        _legend(figure, norms)
    return figure


def _gradient_part(norms: Axes, angle: Axes, rows: list[GradientRow], part: list[int], labelled: bool) -> None:
    drawn: list[tuple[str, list[float], str, Any]] = [
        ("plasticity", [rows[i].plasticity for i in part], OKABE_ITO[1], "-"),
        ("stability", [rows[i].stability for i in part], OKABE_ITO[0], (0, (5, 1.6))),
    ]
    for label, values, color, line in drawn:
        shown = [value if value > 0 else float("nan") for value in values]  # a log axis has no 0
        norms.plot(part, shown, color=color, linestyle=line, label=label if labelled else None)
    cosines = [float("nan") if (cosine := rows[i].cosine) is None else cosine for i in part]
    angle.plot(part, cosines, color=OKABE_ITO[2])


def _task_curve(axes: Axes, curves: Curves, position: int, band: float, most: int = 45) -> None:
    points = continual.accuracy_curve(curves, position)
    fine = max(40, min(400, 4000 // len(curves.kept)))
    kept = [points[i] for i in thinned([p.step for p in points], [p.accuracy for p in points], fine)]
    steps = [p.step for p in kept]
    look = task_style(position)
    axes.fill_between(
        steps, [100 * p.low for p in kept], [100 * p.high for p in kept], color=look.color, alpha=band, linewidth=0
    )
    axes.plot(
        steps, [100 * p.accuracy for p in kept], color=look.color, marker=look.marker, linestyle=look.line,
        markevery=_every(len(kept), most), markersize=3.6, label=f"task {curves.task_ids[position]}",
    )  # fmt: skip


def mark_switches(axes: Axes, curves: Curves, lines: bool = True) -> None:
    """A line where each task starts, and above the axes the id of each task over its updates."""
    edges = [*curves.begins, curves.ends[-1]]
    if lines:
        for begin in curves.begins[1:]:
            axes.axvline(begin, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(edges[0] - 0.005 * (edges[-1] or 1), edges[-1] * 1.005 + 0.5)
    _name_segments(axes, [str(curves.task_ids[p]) for p in range(curves.begun)], edges)
    whole_updates(axes)


def _name_segments(axes: Axes, names: Sequence[str], edges: Sequence[float]) -> None:
    """Names above the parts of an axis, as many as there is room for."""
    total = edges[-1] - edges[0] or 1
    share = total / max(1, len(names)) / total
    room = share * WIDTH * 0.8  # inches of one part
    prefix = "task " if room > 0.62 else ""
    skip = max(1, -(-28 // max(1, int(100 * room))))
    for number, name in enumerate(names):
        if number % skip == 0:
            axes.text(
                (edges[number] + edges[number + 1]) / 2, 1.012, f"{prefix}{name}", transform=axes.get_xaxis_transform(),
                ha="center", va="bottom", fontsize=8, color=MUTED,
            )  # fmt: skip
    if not prefix:
        axes.text(-0.008, 1.012, "task", transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color=MUTED)


def _accuracy_axis(axes: Axes) -> None:
    axes.set_ylim(-2, 102)
    axes.set_ylabel("accuracy (%)")


def _plain_decimal(value: float, _: object = None) -> str:
    """The ticks of a log axis that are not too many: 1, 2 and 5 times a power of ten, written out."""
    return f"{value:.3g}" if f"{value:e}"[0] in "125" else ""


def _every(points: int, most: int = 45) -> int:
    return max(1, points // most)


def _legend(figure: Figure, axes: Axes) -> None:
    both = list(zip(*axes.get_legend_handles_labels(), strict=True))
    shown = both if len(both) <= 48 else spread(both, 24)  # colours go on in their order, so the rest can be told
    handles, labels = [handle for handle, _ in shown], [label for _, label in shown]
    figure.legend(handles, labels, loc="outside right upper", ncols=1 + (len(labels) - 1) // 24, handlelength=3.2)
