"""The command ``cl-platform``, also ``python -m cl_platform``. Each of its commands is a function in a file here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cl_platform.cli.compare import compare
from cl_platform.cli.compose import groups
from cl_platform.cli.describe import describe
from cl_platform.cli.doctor import doctor
from cl_platform.cli.evaluate import evaluate
from cl_platform.cli.export import export
from cl_platform.cli.extend import extend
from cl_platform.cli.failures import our_fault, reader_gone, refused
from cl_platform.cli.listing import list_
from cl_platform.cli.new import new
from cl_platform.cli.predict import predict
from cl_platform.cli.report import report
from cl_platform.cli.resume import resume
from cl_platform.cli.runs import runs
from cl_platform.cli.unlearn import unlearn
from cl_platform.cli.verify import verify
from cl_platform.errors import UserError

EXIT_CODES = (
    "Exit codes: 0 done; 1 done but for a part of the input, or a problem was found; 2 the input is wrong; 3 a check "
    "failed; 70 a fault of cl_platform; 130 stopped by Ctrl-C."
)

app = typer.Typer(
    help="Train image classifiers on one task after another, and live with what was learnt.",
    epilog=EXIT_CODES,
    pretty_exceptions_enable=False,
)


def _choices(incomplete: str) -> list[str]:
    words = [f"{group}={choice}" for group, names in groups().items() for choice in names]
    return [word for word in words if word.startswith(incomplete)]


Words = Annotated[
    list[str] | None,
    typer.Argument(help="KEY=VALUE; --help lists all.", metavar="KEY=VALUE...", autocompletion=_choices),
]


@app.command("train")
def _train(words: Words = None) -> None:
    """Train a learner on a stream of tasks: the same as python train.py."""


for _name, _command in (
    ("list", list_),
    ("describe", describe),
    ("new", new),
    ("predict", predict),
    ("evaluate", evaluate),
    ("export", export),
    ("report", report),
    ("runs", runs),
    ("resume", resume),
    ("extend", extend),
    ("doctor", doctor),
    ("compare", compare),
    ("unlearn", unlearn),
    ("verify", verify),
):
    app.command(_name)(_command)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a refused input.")]


@app.callback()
def _options(debug: Debug = False) -> None:
    """Options of every command."""


def main() -> None:
    """Entry point of ``cl-platform``; ends the process with a documented exit code."""
    sys.exit(run(sys.argv[1:]))


def name() -> str:
    """How this process was called."""
    return "python -m cl_platform" if Path(sys.argv[0]).name == "__main__.py" else "cl-platform"


def run(arguments: Sequence[str]) -> int:
    """Do what the arguments ask for.

    Returns:
        0 done, 1 a part of the input could not be used, 2 the user's input, 3 a check that failed, 70 a bug of ours,
        130 or 141 after Ctrl-C or a closed pipe.
    """
    given = list(arguments)
    if given[:1] == ["train"]:
        from cl_platform.cli.train import train

        return train(given[1:])
    options = given[: given.index("--")] if "--" in given else given
    debug = "--debug" in options
    words = [word for word in options if word != "--debug"] + given[len(options) :]  # it may stand anywhere
    try:
        code = app(words or ["--help"], prog_name=name(), standalone_mode=False)
    except UserError as error:
        return refused(error, debug)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return reader_gone()
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
    print(f"error: {line}{'' if line.endswith(('.', '?', '!')) else '.'} See {name()} --help.", file=sys.stderr)
    return 2
