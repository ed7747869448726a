"""How a command ends badly: one line on standard error and an exit code."""

from __future__ import annotations

import os
import sys
import traceback

from cl_platform.errors import UserError


def refused(error: UserError, debug: bool) -> int:
    """Print a mistake of the user's as one line, with ``debug`` below its traceback; gives the exit code."""
    if debug:
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def reader_gone() -> int:
    """What follows when nobody reads the output any more, as in ``... | head``; gives the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it at its end
    return 141


def our_fault(error: BaseException) -> int:
    """Print the traceback of a bug and whom to tell; gives the exit code."""
    traceback.print_exc()
    print(
        f"error: this is a fault of cl_platform ({type(error).__name__}); "
        "please report the lines above with your command",
        file=sys.stderr,
    )
    return 70
