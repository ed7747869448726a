"""``python -m cl_platform COMMAND``: everything but training. Each command is a function in a file of this folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cl_platform.cli.compare import compare
from cl_platform.cli.failures import our_fault, refused
from cl_platform.cli.report import report
from cl_platform.cli.unlearn import unlearn
from cl_platform.cli.verify import verify
from cl_platform.errors import UserError

NAME = "python -m cl_platform"

app = typer.Typer(
    help="Look at runs of the platform; python train.py makes them.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("report")(report)
app.command("compare")(compare)
app.command("unlearn")(unlearn)
app.command("verify")(verify)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a refused input.")]


@app.callback()
def _options(debug: Debug = False) -> None:
    """Options of every command; also keeps the name of a command needed while there is only one."""


def main() -> None:
    """Entry point of ``python -m cl_platform``; ends the process with a documented exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments ask for.

    Returns:
        0 done, 2 the user's input, 70 a bug of ours, 130 after Ctrl-C, else what the command decided.
    """
    given = list(arguments)
    options = given[: given.index("--")] if "--" in given else given
    debug = "--debug" in options
    words = [word for word in options if word != "--debug"] + given[len(options) :]  # it may stand anywhere
    try:
        code = app(words or ["--help"], prog_name=NAME, standalone_mode=False)
    except UserError as error:
        return refused(error, debug)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        return _misspelt(error) or our_fault(error)
    return code if isinstance(code, int) else 0


def _misspelt(error: Exception) -> int | None:
    """Print what click says about wrong words; ``None`` for any other error.

    Known by its method: some releases of typer bring a click of their own, whose classes are not those of ``click``.
    """
    message = getattr(error, "format_message", None)
    if message is None:
        return None
    line = " ".join(message().split())
    print(f"error: {line}{'' if line.endswith(('.', '?', '!')) else '.'} See {NAME} --help.", file=sys.stderr)
    return 2
