"""``cl-platform resume RUN``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cl_platform.cli.talk import print_log

if TYPE_CHECKING:
    from cl_platform.run import RunResult

Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")]


def resume(run: Run, as_json: Json = False) -> int:
    """Go on with a run that was cut off, with the configuration that stands in its folder."""
    from cl_platform import continuing

    return carried_on(run, lambda: continuing.resume(run), as_json)


def carried_on(run: Path, work: Callable[[], RunResult | None], as_json: bool) -> int:
    """Do the work on a run folder and print what came of it as training does; gives the exit code."""
    from cl_platform.callbacks.interruption import Interrupted

    print_log(logging.WARNING if as_json else logging.INFO)
    try:
        result = work()
    except Interrupted as stop:
        print(f"stopped; to go on after the last finished task: python -m cl_platform resume {run}", file=sys.stderr)
        return stop.exit_code
    if as_json:
        facts = {"run": str(run), "finished": True, "went_on": result is not None}
        names = ("metrics", "cost")
        found = {name: json.loads((run / f"{name}.json").read_text(encoding="utf-8")) for name in names}
        typer.echo(json.dumps({**facts, **found}, indent=1, ensure_ascii=False))
    elif result is None:
        typer.echo(
            f"the run in {run} has finished; to learn more tasks: python -m cl_platform extend {run} KEY=VALUE..."
        )
    else:
        from cl_platform.cli.train import print_table

        print_table(result)
    return 0
