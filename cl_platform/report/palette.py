"""Colours, markers and line styles: told apart by colour-blind eyes, in grey print and on a dark page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1B1B1F", "#B8A800")
"""Colours of Okabe and Ito (2008), the dark ones first; black is the ink's, yellow is darkened to show on white."""

INK = "#1B1B1F"
MUTED = "#63636E"
GRID = "#DEDEE4"
PAPER = "#FEFEFD"
CELL_DARK = "#111112"
CELL_LIGHT = "#FDFDFE"
"""Text on coloured cells, which keeps its colour on a dark page."""

ON_PAGE = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--rule)",
    PAPER: "var(--card)",
    **{color: f"var(--task-{number})" for number, color in enumerate(OKABE_ITO) if color != INK},
}
"""Colours that follow the page when a figure stands in it, and the CSS value that does so."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "*")
LINES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.6, 1.2, 1.6)))


@dataclass(frozen=True)
class TaskStyle:
    """How one task is drawn everywhere.

    Attributes:
        color: one of ``OKABE_ITO``.
        marker: matplotlib's name of it.
        line: matplotlib's line style; changes when the colours begin anew.
    """

    color: str
    marker: str
    line: Any


def task_style(position: int) -> TaskStyle:
    """The style of the task at a stream position; colour, marker and line together repeat only after 352 tasks."""
    turn = position // len(OKABE_ITO)
    return TaskStyle(OKABE_ITO[position % len(OKABE_ITO)], MARKERS[position % len(MARKERS)], LINES[turn % len(LINES)])
