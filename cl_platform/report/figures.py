"""All figures of a run in the order of the report, and the one about cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure

from cl_platform.report.curve_figures import gradients, stability_curves, task_strips, worst_cases
from cl_platform.report.drawing import sheet, style
from cl_platform.report.gap_figures import gap_grid, gap_zoom
from cl_platform.report.matrix_figures import accuracy_matrix, confusion_grid, confusion_last
from cl_platform.report.palette import INK, OKABE_ITO
from cl_platform.report.run_view import RunView

PHASES = {
    "setup": "setup",
    "data": "reading data",
    "train": "training",
    "boundary": "start and end of tasks",
    "eval_continual": "continual evaluation",
    "eval_boundary": "test sets after tasks",
    "checkpoint": "checkpoints",
    "report": "metrics and report",
}
"""Phases of ``cost.json`` in words."""


def cost_bars(view: RunView) -> Figure | None:
    """Seconds of each phase; ``None`` without ``cost.json``."""
    seconds = view.cost.get("seconds")
    if not isinstance(seconds, Mapping):
        return None
    known = [(str(name), float(value)) for name, value in seconds.items() if isinstance(value, int | float)]
    total = sum(value for _, value in known)
    if total <= 0:
        return None
    with style():
        figure = sheet(0.9 + 0.3 * len(known), f"Where the time went: {view.name}", 8.5)
        axes = figure.add_subplot()
        axes.barh([PHASES.get(name, name) for name, _ in known], [value for _, value in known], color=OKABE_ITO[0])
        for row, (_, value) in enumerate(known):
            share = f"{value:.1f} s, {100 * value / total:.0f} %"
            axes.annotate(share, (value, row), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="seconds", xlim=(0, 1.16 * max(value for _, value in known)))
    return figure


def _strips_if_crowded(view: RunView) -> Figure | None:
    curves = view.curves()
    return task_strips(view) if curves is not None and len(curves.kept) > 5 else None


@dataclass(frozen=True)
class Drawn:
    """One figure of a run.

    Attributes:
        name: its file name without ending.
        caption: what to see in it, one or two sentences.
        figure: to be saved.
    """

    name: str
    caption: str
    figure: Figure


FIGURES: dict[str, tuple[Callable[[RunView], Figure | None], str]] = {
    "stability_curves": (
        stability_curves,
        "Accuracy on the evaluation subset of every task after the updates that were evaluated. Bands are Wilson 95 % "
        "intervals: what the number of images leaves open. Dashed lines are switches to the next task (2.2.1).",
    ),
    "task_strips": (_strips_if_crowded, "The same curves, one strip for each task."),
    "worst_cases": (
        worst_cases,
        "min-ACC is the lowest accuracy of every old task since its end, on average (2.2.2); WC-ACC weighs it with the "
        "accuracy on the current task (2.2.3). The grey line is the mean accuracy of the tasks seen at that update.",
    ),
    "gap_zoom": (
        gap_zoom,
        "The switch with the deepest gap. Open circle: before the switch, triangle: lowest, square: last. The arrows "
        "belong to the thick line: how far it fell (3.1), what of it came back (3.3) and what did not (3.2). A fall "
        "that ends within the grey band could be the chance of so few images (3.9).",
    ),
    "gap_grid": (
        gap_grid,
        "One panel for each switch. The thick line is the old task that fell deepest there, the arrow its depth.",
    ),
    "accuracy_matrix": (
        accuracy_matrix,
        "Whole test sets. Read a column downwards to see what became of a task; the diagonal is what was just learnt.",
    ),
    "confusion_last": (
        confusion_last,
        "Images of each true class or task by what they were taken for; a row's colours are shares of its images.",
    ),
    "confusion_grid": (
        confusion_grid,
        "The same after every task. A dark right edge means that old images are taken for the newest classes.",
    ),
    "gradients": (
        gradients,
        "Length of the gradient of the current batch (plasticity) and of what protects old tasks (stability), and the "
        "cosine between them: below 0 they pull against each other (5.1).",
    ),
    "cost_bars": (cost_bars, "Wall-clock seconds by phase (6.6)."),
}
"""Name -> how to draw it and its caption, in the order of the report."""


def draw_all(view: RunView) -> Iterator[Drawn]:
    """The figures that the run's files allow, one after the other.

    Curves over tasks and gaps are left out for a run that has no switches between tasks.
    """
    over_tasks = {"stability_curves", "task_strips", "worst_cases", "gap_zoom", "gap_grid"}
    for name, (draw, caption) in FIGURES.items():
        if view.no_switches is not None and name in over_tasks:
            continue
        figure = draw(view)
        if figure is not None:
            yield Drawn(name, caption, figure)
