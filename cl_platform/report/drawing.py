"""Sheets to draw on, and what becomes of them: PNG, SVG, and SVG inside an HTML page, the same bytes every time."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cl_platform.report.palette import GRID, INK, MUTED, ON_PAGE, PAPER

T = TypeVar("T")

WIDTH = 11.0
"""Inches of a figure over the whole page."""
PNG_DPI = 150

_RC: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so that a figure is the same on every machine
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # given, so that it is not searched for on every drawing
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": PAPER,
    "figure.titlesize": 11.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "lines.markeredgewidth": 0.8,
    "path.simplify": True,
}


def style() -> AbstractContextManager[None]:
    """Within it, figures are drawn in the report's style; matplotlib's own settings come back afterwards."""
    return matplotlib.rc_context(_RC)  # type: ignore[arg-type]


def sheet(height: float, title: str, width: float = WIDTH) -> Figure:
    """An empty figure of a size in inches with a title at its upper left."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    lines = textwrap.wrap(plain(title, 200), width=int(10.5 * width), max_lines=3, placeholder=" …")
    figure.suptitle("\n".join(lines), x=0.008, ha="left", fontweight="bold")
    return figure


def settle(figure: Figure) -> None:
    """Lay the figure out once for all the ways in which it is saved."""
    engine = figure.get_layout_engine()
    if engine is not None:
        with _no_glyph_warnings():
            engine.execute(figure)
    figure.set_layout_engine("none")


def whole_updates(axes: Axes) -> None:
    """Ticks of the update axis at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))


def plain(text: object, most: int = 24) -> str:
    """A text that a user named, for matplotlib: one line, no formulas, at most so many characters."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    short = line if len(line) <= most else line[: most - 1] + "…"
    return short.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.set_dpi(PNG_DPI)
    with _no_glyph_warnings():
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The figure as SVG; letters stay text, so that they can be found, edited and read aloud.

    Args:
        figure: what to write.
        name: letters, digits and underscores; decides the ids.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _no_glyph_warnings():
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


@contextmanager
def _no_glyph_warnings() -> Iterator[None]:
    """A letter that the font lacks is a box in the PNG; the SVG has the letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def embedded(text: str, name: str, label: str) -> str:
    """An SVG as an element of an HTML page: page colours, no reference outwards, no id that another figure has.

    Args:
        text: what :func:`svg` made.
        name: precedes every id.
        label: what a screen reader says.
    """
    body = text[text.index("<svg") :]
    head, body = body.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href=", "href=")
    body = _rounded(_own_ids(body, name))
    for color, value in ON_PAGE.items():
        body = re.sub(rf"(fill|stroke): {color}", rf"\1: {value}", body, flags=re.IGNORECASE)
    body = re.sub(r"\n\s*", "\n", body).replace("<defs>\n</defs>\n", "")
    frame = box.group(1) if box else "0 0 792 360"
    widest = round(1.4 * float(frame.split()[2]))
    return f'<svg viewBox="{frame}" style="max-width:{widest}px" role="img" aria-label="{_attribute(label)}">{body}'


def _own_ids(body: str, name: str) -> str:
    """Ids that something refers to get a prefix; the others go."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)


def _rounded(body: str) -> str:
    """Coordinates with two decimals, a hundredth of a point, in half the bytes."""

    def shorter(attribute: re.Match[str]) -> str:
        return attribute[0] if "scale" in attribute[0] else re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])

    return re.sub(r' (?:d|x|y|transform|points)="[^"]*"', shorter, body)


def _attribute(text: str) -> str:
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(sign, entity)
    return text


def thinned(steps: Sequence[int], values: Sequence[float], most: int = 400) -> list[int]:
    """Indices that keep the look of a curve: of each of ``most`` parts of the axis the first, lowest, highest, last."""
    if len(steps) <= 4 * most:
        return list(range(len(steps)))
    first, width = steps[0], max(1, steps[-1] - steps[0])
    parts: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        parts.setdefault((step - first) * most // (width + 1), []).append(index)
    kept = {f(part) for part in parts.values() for f in (min, max)}
    kept |= {f(part, key=lambda i: values[i]) for part in parts.values() for f in (min, max)}
    return sorted(kept)


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly spaced, the last one among them."""
    if len(items) <= most:
        return list(items)
    return [items[(number + 1) * len(items) // most - 1] for number in range(most)]
