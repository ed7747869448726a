"""``python -m cl_platform unlearn RUN --task 1``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_platform.cli.talk import print_log
from cl_platform.errors import UserError

if TYPE_CHECKING:
    from cl_platform.unlearning.choice import Choice

Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN", show_default=False)]
Task = Annotated[
    int | None, typer.Option("--task", help="Id of the task to forget; left out: finish a request left open.")
]
Method = Annotated[str, typer.Option("--method", help="auto, drop, rollback or approximate:NAME.")]
Accept = Annotated[str, typer.Option("--accept", help="E-law: auto may take a cheaper way of equal distribution.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before relearning.")]
Cache = Annotated[
    bool, typer.Option("--purge-data-cache", help="Also delete the run's data set from the cache of decoded images.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def unlearn(
    run: Run,
    task: Task = None,
    method: Method = "auto",
    accept: Accept = "E-bit",
    yes: Yes = False,
    purge_data_cache: Cache = False,
    as_json: Json = False,
) -> None:
    """Forget a task of a run: in its model and in its files, with a certificate of what was done."""
    from cl_platform.requests import paused
    from cl_platform.unlearning.engine import Wish

    if accept not in ("E-bit", "E-law"):
        raise UserError("--accept", accept, "must be E-bit or E-law", "Write --accept E-law, or leave it out")
    print_log(logging.WARNING if as_json else logging.INFO)
    with paused(run) as folder:
        left_open = folder.unfinished
        certificate = folder.carry_out() if left_open is not None else None
        if task is not None and task != left_open:
            wish = Wish(task, method, "command", accept, purge_data_cache)
            _ask(folder.plan(wish), yes, as_json)
            certificate = folder.carry_out(wish)
    if certificate is None:
        raise UserError("--task", "", "no request was left open in this run", "Write --task ID")
    _show(run, certificate, as_json)


def _ask(choice: Choice, yes: bool, as_json: bool) -> None:
    """State the price, and have it agreed to where something is relearnt."""
    typer.echo(f"{choice.option.method}: {choice.option.price}", err=True)
    if yes or not choice.option.price.tasks:
        return
    if as_json or not sys.stdin.isatty():
        raise UserError("--yes", "", "relearning has to be agreed to, and there is no terminal to ask", "Add --yes")
    typer.confirm("Go on?", abort=True)


def _show(run: Path, certificate: Mapping[str, Any], as_json: bool) -> None:
    files = [entry["action"] for entry in certificate["files"]]
    facts = {
        "task": certificate["target"]["task_id"],
        "method": certificate["method"]["used"],
        "level": certificate["level"],
        "leaks": certificate["level_basis"]["leaks"],
        "reason": certificate["method"]["reason"],
        "seconds": certificate["cost"]["seconds"],
        "files": {action: files.count(action) for action in ("deleted", "rewritten", "kept")},
        "certificate": str(run / "unlearning" / "certificate.json"),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    leaks = f", remaining leaks {', '.join(facts['leaks'])}" if facts["leaks"] else ""
    counts = ", ".join(f"{count} {action}" for action, count in facts["files"].items())
    typer.echo(f"task {facts['task']} is forgotten by {facts['method']}, level {facts['level']}{leaks}")
    typer.echo(f"why: {facts['reason']}")
    typer.echo(f"files of the run: {counts}")
    typer.echo(f"certificate: {facts['certificate']}")
    typer.echo(f"to prove it: python -m cl_platform verify {run}")
