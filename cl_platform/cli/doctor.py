"""``cl-platform doctor``: what of this machine works, and what to do about the rest."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON array.")]


def doctor(as_json: Json = False) -> int:
    """Look at packages, devices, data, weights and room, and let a small network answer."""
    from cl_platform.cli.findings import print_findings

    return print_findings(as_json)
