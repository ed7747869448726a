"""The findings of a check-up as text. Only the standard library is needed, whatever else is broken."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from itertools import chain

from cl_platform.checkup import Finding, check_all, todo_after

TOPIC, STATUS, NARROWEST = 10, 7, 50
"""Widths of the first two columns, and of the narrowest text."""


def print_findings(as_json: bool, failed: ImportError | None = None) -> int:
    """Look at everything and print it, line by line or as one JSON array; gives the exit code.

    Args:
        as_json: one array, at the end.
        failed: why the command line itself could not be imported.
    """
    first = [] if failed is None else [Finding("commands", "problem", f"cannot start: {failed}", todo_after(failed))]
    findings = []
    for finding in chain(first, check_all()):
        findings.append(finding)
        if not as_json:
            _say("\n".join(lines_of(finding, shutil.get_terminal_size().columns)))
    problems = sum(finding.status == "problem" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    if as_json:
        _say(json.dumps([vars(finding) for finding in findings], indent=1, ensure_ascii=False))
    else:
        _say(_total(problems, warnings))
    return 1 if problems else 0


def lines_of(finding: Finding, width: int) -> list[str]:
    """A finding in lines of ``width`` columns, what to do about it below."""
    width = max(NARROWEST, width)
    start = f"{finding.topic:<{TOPIC}} {finding.status:<{STATUS}} "
    below = " " * len(start)

    def wrapped(text: str, first: str, rest: str) -> list[str]:
        return textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
        )

    lines = wrapped(finding.text, start, below)
    return lines + (wrapped(finding.todo, f"{below}-> ", f"{below}   ") if finding.todo else [])


def _say(text: str) -> None:
    """Print also where the terminal lacks some of the signs."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def _total(problems: int, warnings: int) -> str:
    counts = ((problems, "problem"), (warnings, "warning"))
    return " and ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts if count) or "all is well"
