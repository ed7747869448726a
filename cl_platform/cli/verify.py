"""``python -m cl_platform verify RUN``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from cl_platform.metrics.measured import Measured
    from cl_platform.unlearning.verify import Verification

WIDTH = 80
CHECK_FAILED = 3

Run = Annotated[Path, typer.Argument(help="Folder of a run that forgot a task.", metavar="RUN", show_default=False)]
Reference = Annotated[
    Path | None,
    typer.Option(help="Run folder to compare with, in place of one that is trained.", metavar="FOLDER"),
]
ShadowCount = Annotated[
    int, typer.Option(help="Further models for the attack by each image's own spread.", metavar="N")
]
Lira = Annotated[
    str, typer.Option(help="offline: shadows never learnt the task; online: half of them learnt and forgot it.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.")]


def verify(
    run: Run, reference: Reference = None, shadows: ShadowCount = 0, lira: Lira = "offline", as_json: Json = False
) -> int:
    """Compare a run that forgot a task with one that never learnt it, byte by byte and by what they answer."""
    from rich.console import Console

    from cl_platform.unlearning.verify import Options, read_certificate
    from cl_platform.unlearning.verify import verify as verified

    options = Options(reference, shadows, lira)
    read_certificate(run)  # what cannot be verified is refused before anything heavy is loaded
    from cl_platform.verifying import workshop

    console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False)
    result = verified(run, workshop(), options, lambda line: console.print(line, markup=False, soft_wrap=True))
    if as_json:
        typer.echo(json.dumps(_plain(result), indent=1, allow_nan=False, ensure_ascii=False))
    else:
        _print(result, console, run)
    return 0 if result.passed else CHECK_FAILED


def _plain(result: Verification) -> dict[str, Any]:
    head = {"task_id": result.task_id, "level": result.level, "method": result.method}
    return {**head, **result.to_json(), "reference": result.reference_json()}


def _print(result: Verification, console: Console, run: Path) -> None:
    from rich.table import Table

    from cl_platform.metrics.definitions import FORGETTING_BY_KEY

    table = Table(title=f"Task {result.task_id}: {result.method}, {result.level}", title_justify="left", width=WIDTH)
    table.add_column("metric", ratio=1, overflow="fold")
    for name in ("before", "after", "never", "gap"):
        table.add_column(name, justify="right", no_wrap=True)
    reasons: dict[str, list[str]] = {}
    for key, sides in result.figures.items():
        cells = [_cell(value) for value in (sides.o, sides.u, sides.r, sides.gap)]
        number = FORGETTING_BY_KEY.get(key) or FORGETTING_BY_KEY.get(key.rpartition("_")[0])
        if sides.u.value is None:
            reasons.setdefault(str(sides.u.reason), []).append(key)
            continue
        table.add_row(f"{number.id if number else ''} {key}", *cells)
    console.print(table)
    for reason, keys in reasons.items():
        console.print(f"no value for {', '.join(keys)}: {reason}", markup=False, width=WIDTH)
    console.print("* by construction: the classes are no answers any more, or the trunk never learns; no evidence")
    for check in result.checks:
        word = {True: "passed", False: "FAILED", None: "open"}[check.passed]
        console.print(f"{word:7}{check.name}: {check.detail}", markup=False, width=WIDTH)
    passed = sum(check.passed is True for check in result.checks)
    undone = sum(check.passed is None for check in result.checks)
    if result.passed:
        console.print(f"all {passed} checks passed" + (f", {undone} could not be made" if undone else ""))
    else:
        console.print(f"{len(result.checks) - passed - undone} of {len(result.checks)} checks failed")
    console.print(f"verdict: {result.verdict}", markup=False, width=WIDTH)
    console.print(f"written into {run / 'unlearning' / 'certificate.json'}", markup=False, soft_wrap=True)


def _cell(value: Measured) -> str:
    if value.value is None:
        return f"> {value.censored_at}" if value.censored_at is not None else "-"
    shown = f"{value.value:.0f}" if value.value == int(value.value) and abs(value.value) >= 2 else f"{value.value:.3f}"
    return shown + ("*" if value.by_construction else "")
