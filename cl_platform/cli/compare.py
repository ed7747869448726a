"""``python -m cl_platform compare RUN...``."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_platform.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from cl_platform.report.compare import Comparison
    from cl_platform.report.comparison_numbers import Numbers

GAP = 2
"""Blanks between two columns, one of which the box draws."""

Runs = Annotated[
    list[str],
    typer.Argument(help="Run folders, or quoted wildcards: 'outputs/*/finetune/*'.", metavar="RUN", show_default=False),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder to write; else comparison_<date>_<time>.", metavar="FOLDER"),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an output folder that holds something.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")]


def compare(runs: Runs, output: Output = None, force: Force = False, as_json: Json = False) -> None:
    """Lay runs of one scenario side by side: mean and band over seeds, curves, a page and CSV files."""
    from cl_platform.report import compare as report

    paths, passed_over = run_folders(runs)
    made = report.compare(paths, output, force)
    left_out = [*passed_over, *made.left_out]
    if as_json:
        typer.echo(json.dumps(as_record(made, left_out), indent=1, allow_nan=False, ensure_ascii=False))
        return
    _print(made, left_out)


def run_folders(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Folders for what a user named, and a line for each folder with content that a wildcard met and that is no run.

    Raises:
        UserError: a wildcard that meets no run folder.
    """
    found: list[Path] = []
    passed_over: list[str] = []
    for word in words:
        path = Path(word).expanduser()
        if path.exists() or not glob.has_magic(word):
            found.append(path)
            continue
        folders = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_dir()]
        runs = [p for p in folders if (p / "config.yaml").is_file()]
        if not runs:
            met = f"meets {len(folders)} folders, none of them a run" if folders else "meets no folder"
            raise UserError("run", word, met, "Runs lie in outputs/<scenario>/<strategy>/<date>: 'outputs/*/*/*'")
        found += runs
        others = [p for p in folders if p not in runs and _holds_something(p) and not _related(p, runs)]
        passed_over += [f"{p} holds no config.yaml, so it is no run folder" for p in others]
    return found, passed_over


def as_record(made: Comparison, left_out: Sequence[str]) -> dict[str, Any]:
    """The comparison as plain JSON; fractions, not percent."""
    numbers = made.numbers
    return {
        "scenario": made.scenario,
        "output": str(made.folder),
        "report": str(made.page),
        "groups": [
            {
                "group": group.label,
                "strategy": group.strategy,
                "seeds": list(group.seeds),
                "runs": [str(run.path) for run in group.runs],
                "metrics": {key: _over_seeds(numbers, group.label, key) for key in numbers.keys},
            }
            for group in numbers.groups
        ],
        "left_out": list(left_out),
        "notes": list(made.notes),
    }


def _over_seeds(numbers: Numbers, label: str, key: str) -> dict[str, Any]:
    from cl_platform.report.comparison_numbers import definition

    value, known = numbers.values[label, key], definition(key)
    return {
        "id": known.id if known else None,
        "n": value.n,
        "mean": value.mean,
        "sd": value.sd,
        "low": value.low,
        "high": value.high,
        "missing": dict(value.missing),
        "best": label in numbers.best[key],
    }


def _holds_something(path: Path) -> bool:
    """Whether a folder is not empty; also one that may not be looked into."""
    try:
        return any(path.iterdir())
    except OSError:
        return True


def _related(path: Path, runs: Sequence[Path]) -> bool:
    """Whether a folder holds one of the runs, or is inside one."""
    return any(path in run.parents or run in path.parents for run in runs)


def _print(made: Comparison, left_out: Sequence[str]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    from cl_platform.report import comparison_tables as tables

    console = Console(highlight=False)
    space = made.groups[0].runs[0].primary
    console.print(f"Comparison on {made.scenario}, prediction space {space}", style="bold", markup=False)
    for table in _tables(made.numbers, console.width):
        console.print()
        console.print(table)
    console.print()
    console.print(tables.legend(made.numbers), style="dim", markup=False)
    for line in (*tables.absences(made.numbers), *made.notes):
        console.print(Padding(Text(f"{line.rstrip('.')}."), (0, 0, 0, 2)))
    for line in left_out:
        console.print(Text(f"left out: {line}."))
    for name in ("comparison.csv", "runs.csv", "comparison.html"):
        console.print(str(made.folder / name), markup=False, soft_wrap=True)


def _tables(numbers: Numbers, width: int) -> list[Table]:
    """The table, cut between columns into as many as the terminal's width needs; every one names the groups."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from cl_platform.report.comparison_tables import wrapped

    columns = _columns(numbers)
    names = [wrapped(group.label, max(18, width * 3 // 10)) for group in numbers.groups]
    first = max(len("strategy"), *(len(line) for name in names for line in name))
    tables: list[Table] = []
    for part in _fitting([wide + GAP for _, _, wide in columns], width - first - GAP):
        made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        made.add_column("strategy\n", width=first, overflow="fold")
        for index in part:
            made.add_column(columns[index][0], justify="right", no_wrap=True)
        for row, name in enumerate(names):
            made.add_row(Text("\n".join(name)), *(columns[index][1][row] for index in part))
        tables.append(made)
    return tables


def _columns(numbers: Numbers) -> list[tuple[str, list[Text], int]]:
    """Heading, cells and width of every column."""
    from rich.text import Text

    from cl_platform.report import comparison_tables as shown

    columns = [("seeds\n", [Text(str(len(group.runs))) for group in numbers.groups])]
    for key in numbers.columns:
        cells = []
        for group in numbers.groups:
            cell = shown.cell(numbers, group.label, key)
            text = Text(cell.text, style="bold" if cell.best else "")
            text.append("*" if cell.best else " ")
            text.append(f"\n{cell.share}", style="dim") if cell.share else None
            cells.append(text)
        columns.append((f"{shown.heading(key)}\n{shown.below(key)}", cells))
    return [
        (title, cells, max(len(line) for text in [title, *(cell.plain for cell in cells)] for line in text.split("\n")))
        for title, cells in columns
    ]


def _fitting(widths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of the columns of each table; one that is too wide stands alone."""
    parts: list[list[int]] = [[]]
    left = room
    for index, wide in enumerate(widths):
        if wide > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(index)
        left -= wide
    return parts
