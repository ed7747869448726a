"""``cl-platform runs``: a table of run folders."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cl_platform.report.run_list import RunLine

DEFAULT_ROOT = Path("outputs")
WIDE = 120
"""Columns of a terminal from which on the path stands in the line of its run."""
NAMES = ("scenario", "strategy")
"""Columns that are cut where the line is too long."""

Roots = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Folders with runs in or below them; outputs by default.", metavar="ROOT...", show_default=False
    ),
]
Scenario = Annotated[str | None, typer.Option("--scenario", help="Only runs on this scenario.")]
Strategy = Annotated[str | None, typer.Option("--strategy", help="Only runs with this strategy; several as a+b.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON array.")]


def runs(roots: Roots = None, scenario: Scenario = None, strategy: Strategy = None, as_json: Json = False) -> int:
    """List runs by date: what they are, how far they came, what they reached."""
    from cl_platform.report.run_list import RunList, list_runs

    given = roots or [DEFAULT_ROOT]
    nothing_yet = not roots and not DEFAULT_ROOT.exists()
    found = RunList((), ()) if nothing_yet else list_runs(given, scenario, strategy)
    for line in found.damaged:
        print(f"warning: {line}", file=sys.stderr)
    if as_json:
        typer.echo(json.dumps([run.to_json() for run in found.runs], indent=1, ensure_ascii=False))
    elif not found.runs:
        chosen = " of that kind" if scenario or strategy else ""
        typer.echo(f"no runs{chosen} in {', '.join(map(str, given))}; python train.py makes them")
    else:
        typer.echo("\n".join(table(found.runs, shutil.get_terminal_size().columns)))
    return 1 if found.damaged else 0


def table(lines: Sequence[RunLine], width: int) -> list[str]:
    """The runs as text of ``width`` columns; paths are never cut, a narrow table has them below their runs."""
    wide = width >= WIDE
    names = ("began", "scenario", "strategy", "seed", "state", "final %", "forgot %", "time")
    rows = [_cells(run, wide) for run in lines]
    sizes = [max(len(name), *(len(row[place]) for row in rows)) for place, name in enumerate(names)]
    room = width - (2 if wide else 1) * (len(names) - 1)
    if wide:
        room -= 2 + min(40, max(len(str(run.path)) for run in lines))
    _narrow(sizes, [names.index(name) for name in NAMES], room)
    gap = "  " if wide else " "
    head = gap.join(_placed(name, size, place) for place, (name, size) in enumerate(zip(names, sizes, strict=True)))
    shown = [f"{head}{gap}folder" if wide else head]
    for run, row in zip(lines, rows, strict=True):
        text = gap.join(_placed(cell, size, place) for place, (cell, size) in enumerate(zip(row, sizes, strict=True)))
        gone = f"  (forgot {', '.join(map(str, run.forgotten))})" if run.forgotten else ""
        shown += [f"{text}{gap}{run.path}{gone}"] if wide else [text.rstrip(), f"  {run.path}{gone}"]
    return shown


def _cells(run: RunLine, wide: bool) -> list[str]:
    date = run.date.replace("T", " ")
    return [
        date[:16] if wide else date[:10],
        run.scenario,
        run.strategy,
        "" if run.seed is None else str(run.seed),
        run.state_text,
        _percent(run.accuracy),
        _percent(run.forgetting),
        _duration(run.seconds),
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _narrow(sizes: list[int], places: Sequence[int], room: int) -> None:
    """Take from the widest of some columns until all fit, or until they are short."""
    while sum(sizes) > room:
        widest = max(places, key=lambda place: sizes[place])
        if sizes[widest] <= 8:
            return
        sizes[widest] -= 1


def _placed(cell: str, size: int, place: int) -> str:
    short = cell if len(cell) <= size else cell[: size - 1] + "…"
    return short.rjust(size) if place in (3, 5, 6, 7) else short.ljust(size)
