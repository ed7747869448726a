"""``cl-platform evaluate RUN``."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_platform.cli.answers import printable
from cl_platform.cli.talk import print_log

if TYPE_CHECKING:
    from cl_platform.reevaluation import Accuracies

Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN", show_default=False)]
On = Annotated[
    Path | None,
    typer.Option("--on", help="Your own images, a sub-folder for each class; left out: the run's test sets."),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; left out: that of the run.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

SPACES = {"cil": "class-incremental", "til": "task-incremental", "dil": "domain-incremental"}
PART_FAILED = 1
WIDTH = 80


def evaluate(run: Run, on: On = None, device: Device = None, as_json: Json = False) -> int:
    """Count right answers of a run's newest checkpoint on whole test sets, or on your own images."""
    print_log(logging.WARNING)
    from cl_platform.trained import Trained

    found = Trained.open(run, device).evaluate(on)
    for name in found.unknown:
        print(f"{printable(name)}: no class of the learner has that name; left out", file=sys.stderr)
    for path, reason in found.unread:
        print(f"{printable(path)}: {reason}", file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        typer.echo(json.dumps({"run": str(run), **found.to_json()}, indent=1, allow_nan=False, ensure_ascii=False))
    else:
        _print(found)
    return PART_FAILED if found.unknown or found.unread else 0


def _print(found: Accuracies) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=WIDTH)
    table = Table(title="Right answers", title_justify="left")
    table.add_column("")
    table.add_column("images", justify="right")
    for space in found.spaces:
        table.add_column(SPACES[space], justify="right")
    first = next(iter(found.spaces.values()))
    for task_id, (_, images) in first.items():
        shares = [_percent(found.accuracy(space, task_id)) for space in found.spaces]
        table.add_row(f"task {task_id}", str(images), *shares)
    table.add_section()
    table.add_row("mean of the tasks", "", *(_percent(found.mean_of_tasks(space)) for space in found.spaces))
    total = str(sum(images for _, images in first.values()))
    table.add_row("all images", total, *(_percent(found.accuracy(space)) for space in found.spaces))
    console.print(table)
    if found.per_class:
        classes = Table(title="By class", title_justify="left")
        for name, side in (("class", "left"), ("images", "right"), ("right", "right")):
            classes.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
        for name, (right, images) in found.per_class.items():
            classes.add_row(Text(printable(name)), str(images), _percent(right / images))
        console.print(classes)
    if found.same_as_recorded:
        console.print("the same counts as in the run's own last evaluation")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
