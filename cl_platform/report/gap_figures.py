"""Figures of the stability gap: the old tasks around a switch, with what was lost and what came back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cl_platform.metrics.continual_log import Curves
from cl_platform.metrics.gap import GapPair, deepest
from cl_platform.report.drawing import sheet, style, thinned, whole_updates
from cl_platform.report.palette import INK, MUTED, PAPER, task_style
from cl_platform.report.run_view import RunView

PRE = -1
"""Where the accuracy before the switch stands on the axis of updates since the switch; 0 is before any update."""


MOST_PANELS = 20


def gap_zoom(view: RunView, position: int | None = None) -> Figure | None:
    """One switch close up, with depth, transient and residual of its deepest gap; ``None`` if nothing was evaluated.

    Args:
        view: the run.
        position: of the task that starts; ``None`` for the switch with the deepest gap of the run.
    """
    curves, pairs = view.curves(), view.pairs()
    if curves is None:
        return None
    switch = _switch(curves, _deepest_switch(pairs) if position is None else position, pairs, view.gap_window)
    if switch is None:
        return None
    with style():
        task = curves.task_ids[switch.k]
        figure = sheet(4.9, f"Switch to task {task} at update {switch.begin}: {view.name}")
        axes = figure.add_subplot()
        _old_tasks(axes, switch, large=True)
        lowest = min(value for line in switch.lines for _, value in line.points)
        highest = max(value for line in switch.lines for _, value in line.points)
        margin = 0.06 * max(highest - lowest, 10)
        axes.set_ylim(max(lowest - margin, -2), min(highest + margin, 102))
        axes.set(xlabel=_axis_name(switch), ylabel="accuracy (%)")
        _axis(axes, switch, switch.logarithmic, before=True)
        if switch.deep is not None and switch.deep.depth:
            _noise(axes, switch.deep)
            _brackets(axes, switch.deep, curves.task_ids[switch.deep.j])
        handles, labels = axes.get_legend_handles_labels()
        handles += [axes.plot([], [], linestyle="", marker=m, color=MUTED, markerfacecolor=f)[0] for m, f in _MARKS]
        labels += ["before", "lowest", "last"]
        figure.legend(handles, labels, loc="outside right upper", ncols=1 + (len(labels) - 1) // 22, handlelength=3.2)
    return figure


def gap_grid(view: RunView) -> Figure | None:
    """All switches beside each other, the depth of the deepest gap drawn in each; ``None`` without a switch."""
    curves, pairs = view.curves(), view.pairs()
    if curves is None:
        return None
    found = [_switch(curves, k, pairs, view.gap_window) for k in range(1, curves.begun)]
    known = [switch for switch in found if switch is not None]
    if not known:
        return None
    switches = sorted(sorted(known, key=_depth, reverse=True)[:MOST_PANELS], key=lambda switch: switch.k)
    which = "Old tasks at every switch"
    if len(switches) < len(known):
        which = f"Old tasks at the {len(switches)} of {len(known)} switches with the deepest gaps"
    columns = {1: 1, 2: 2, 4: 2}.get(len(switches), 3 if len(switches) <= 9 else 4)
    rows = -(-len(switches) // columns)
    with style():
        figure = sheet(0.75 + (2.6 if columns < 4 else 2.15) * rows, f"{which}: {view.name}")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        logarithmic = any(switch.logarithmic for switch in switches)
        for axes, switch in zip(grid.flat, switches, strict=False):
            _panel(axes, switch, curves, logarithmic)
        for axes in grid.flat[len(switches) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("accuracy (%)", fontsize=8.5)
        kept = [p for p in curves.kept if p < switches[-1].k]
        handles = [_handle(grid.flat[0], position) for position in kept]
        labels = [f"task {curves.task_ids[position]}" for position in kept]
        columns_of_legend = 1 + (len(labels) - 1) // (4 * rows + 8)
        figure.legend(handles, labels, loc="outside right upper", ncols=columns_of_legend, handlelength=3.2)
        spread = ", closer together beyond 10" if logarithmic else ""
        figure.supxlabel(f"updates since the switch{spread}; -1: before it", fontsize=9)
    return figure


@dataclass(frozen=True)
class _Line:
    """One old task: (updates since the switch, accuracy in percent) from ``PRE`` on, and its gap."""

    pair: GapPair
    task_id: int
    points: list[tuple[int, float]]


@dataclass(frozen=True)
class _Switch:
    k: int
    begin: int
    last: int
    lines: list[_Line]
    deep: GapPair | None

    @property
    def logarithmic(self) -> bool:
        """Whether the deepest gap is so early that a plain axis would hide it."""
        low = self.deep.low_offset if self.deep is not None else None
        return self.last > 60 and low is not None and low < self.last / 12


def _depth(switch: _Switch) -> float:
    return 0.0 if switch.deep is None or switch.deep.depth is None else switch.deep.depth


def _deepest_switch(pairs: Sequence[GapPair]) -> int | None:
    known = [pair for pair in pairs if pair.depth is not None]
    pair = deepest(known)
    return None if pair is None else pair.k


def _switch(curves: Curves, k: int | None, pairs: Sequence[GapPair], window: int | None) -> _Switch | None:
    """What is known about the switch to position k; ``None`` if no old task was evaluated in its window."""
    known = [pair for pair in pairs if pair.k == k and pair.depth is not None]
    if k is None or not known:
        return None
    begin, end = curves.begins[k], curves.ends[k] if window is None else curves.begins[k] + window
    before, start = curves.boundary(k - 1, "end"), curves.boundary(k, "start")
    lines = []
    for pair in known:
        cells = {PRE: before.cells[pair.j]} if before is not None else {}
        if start is not None and pair.j in start.cells:
            cells[0] = start.cells[pair.j]
        cells |= {s - begin: cell for s, cell in curves.segment(k, pair.j).items() if begin < s <= end}
        points = [(offset, 100 * right / images) for offset, (right, images) in cells.items()]
        lines.append(_Line(pair, curves.task_ids[pair.j], points))
    last = max(offset for line in lines for offset, _ in line.points)
    return _Switch(k, begin, last, lines, deepest(known))


_MARKS = (("o", PAPER), ("v", MUTED), ("s", MUTED))


def _old_tasks(axes: Axes, switch: _Switch, large: bool) -> None:
    for line in switch.lines:
        look, deep = task_style(line.pair.j), line.pair == switch.deep
        kept = [line.points[i] for i in thinned([p[0] for p in line.points], [p[1] for p in line.points])]
        axes.plot(
            [p[0] for p in kept], [p[1] for p in kept], color=look.color, linestyle=look.line,
            linewidth=2.2 if deep and large else 1.5 if deep else 1.1, alpha=1 if deep else 0.75,
            label=f"task {line.task_id}", zorder=3 if deep else 2,
        )  # fmt: skip
    sizes = (49, 16) if large else (20, 5)
    for number, (marker, _) in enumerate(_MARKS):
        marked = [(line, place) for line in switch.lines if (place := _marked(line)[number]) is not None]
        colors = [task_style(line.pair.j).color for line, _ in marked]
        axes.scatter(
            [place[0] for _, place in marked], [place[1] for _, place in marked],
            s=[sizes[0] if line.pair == switch.deep else sizes[1] for line, _ in marked],
            marker=marker, zorder=4, clip_on=False, linewidths=0.8,
            facecolors=[PAPER] * len(marked) if marker == "o" else colors, edgecolors=colors,
        )  # fmt: skip
    axes.axvline(0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def _marked(line: _Line) -> list[tuple[int, float] | None]:
    """Places of ``pre``, ``low`` and ``last``."""
    pair = line.pair
    if pair.pre is None or pair.low is None or pair.low_offset is None:
        return [None, None, None]
    return [(PRE, 100 * pair.pre), (pair.low_offset, 100 * pair.low), line.points[-1]]


def _axis(axes: Axes, switch: _Switch, logarithmic: bool, before: bool) -> None:
    if logarithmic:
        axes.set_xscale("symlog", linthresh=10, linscale=1.1)
        ticks = [*([PRE] if before else []), 0, 5, *(m * 10**e for e in range(1, 7) for m in (1, 2, 5))]
        shown = [tick for tick in ticks if tick <= switch.last]
        axes.set_xticks(shown, [str(tick).replace("-", "\u2212") for tick in shown])
        axes.set_xticks([], minor=True)
        axes.set_xlim(-2, switch.last * 1.06)
    else:
        whole_updates(axes)
        axes.set_xlim(-max(2, 0.03 * switch.last), switch.last * 1.02 + 0.3)


def _axis_name(switch: _Switch) -> str:
    spread = ", closer together beyond 10" if switch.logarithmic else ""
    return f"updates since the switch{spread}; -1: before it, 0: new head in place, nothing learnt yet"


def _noise(axes: Axes, pair: GapPair) -> None:
    """The depth that chance alone could show, as a band below the accuracy before the switch."""
    if pair.pre is None or pair.noise_floor is None:
        return
    floor = max(100 * (pair.pre - pair.noise_floor), axes.get_ylim()[0])
    axes.axhspan(floor, 100 * pair.pre, color=MUTED, alpha=0.1, linewidth=0, zorder=0)
    axes.text(
        0.995, floor, "could be chance", transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=8,
        color=MUTED,
    )  # fmt: skip


def _brackets(axes: Axes, pair: GapPair, task_id: int) -> None:
    """Depth, and what of it came back and what did not, right of the axes at the heights they have."""
    if pair.pre is None or pair.low is None or pair.residual is None or pair.transient is None or pair.depth is None:
        return
    pre, low = 100 * pair.pre, 100 * pair.low
    turn = low + 100 * pair.transient
    for height in {pre, low, turn}:
        axes.axhline(height, color=MUTED, linewidth=0.6, linestyle=(0, (1, 2)), zorder=1)
    _arrow(axes, 1.02, low, pre)
    _label(axes, 1.03, (low + pre) / 2, f"depth\nof task {task_id}\n{100 * pair.depth:.1f}")
    back = ("came back\n(transient)", pair.transient, low, turn)
    lost = ("still lost\n(residual)", pair.residual, turn, pre)
    bottom, top = axes.get_ylim()
    previous = bottom - (top - bottom)
    for name, value, lower, upper in (back, lost):
        if value > 0:
            _arrow(axes, 1.115, lower, upper)
            previous = max((lower + upper) / 2, previous + 0.15 * (top - bottom))  # no label covers another
            _label(axes, 1.125, previous, f"{name}\n{100 * value:.1f}")


def _arrow(axes: Axes, x: float, bottom: float, top: float) -> None:
    """A line with two heads, or with two bars where heads would not fit; axes units across, data units up."""
    low, high = axes.get_ylim()
    heads = "<|-|>" if top - bottom > 0.06 * (high - low) else "|-|, widthA=0.25, widthB=0.25"
    axes.annotate(
        "", xy=(x, top), xytext=(x, bottom), xycoords=axes.get_yaxis_transform(), annotation_clip=False,
        arrowprops={"arrowstyle": heads, "color": INK, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9, "lw": 1},
    )  # fmt: skip


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, transform=axes.get_yaxis_transform(), color=INK, fontsize=8.5, va="center", clip_on=False)


def _panel(axes: Axes, switch: _Switch, curves: Curves, logarithmic: bool) -> None:
    _old_tasks(axes, switch, large=False)
    axes.set_ylim(-2, 102)
    _axis(axes, switch, logarithmic, before=False)
    axes.tick_params(labelsize=7.5, labelleft=True)
    pair = switch.deep
    where = f"to task {curves.task_ids[switch.k]}, update {switch.begin}"
    if pair is None or not pair.depth or pair.pre is None or pair.low is None or pair.low_offset is None:
        axes.set_title(f"{where}\nno old task fell", fontsize=8.5)
        return
    words = f"task {curves.task_ids[pair.j]} fell {100 * pair.depth:.1f}, {100 * (pair.transient or 0):.1f} came back"
    axes.set_title(f"{where}\n{words}", fontsize=8.5)
    axes.annotate(
        "", xy=(pair.low_offset, 100 * pair.low), xytext=(pair.low_offset, 100 * pair.pre), zorder=5,
        arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 2, "mutation_scale": 8, "lw": 0.9},
    )  # fmt: skip


def _handle(axes: Axes, position: int) -> Line2D:
    look = task_style(position)
    return axes.plot([], [], color=look.color, linestyle=look.line)[0]
