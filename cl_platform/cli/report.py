"""``python -m cl_platform report RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(help="Folder of a finished or running run.", metavar="RUN", show_default=False)]


def report(run: Run) -> None:
    """Write report.html and figures into a run folder."""
    from cl_platform.report.html import write_report

    typer.echo(write_report(run))
