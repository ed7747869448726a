"""What a command says while it works: the package's log, line by line on standard error."""

from __future__ import annotations

import logging
import sys


def print_log(level: int = logging.INFO) -> None:
    """Print lines of at least ``level``; files of a run may take more."""
    log = logging.getLogger("cl_platform")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for before in [h for h in log.handlers if type(h) is logging.StreamHandler]:
        log.removeHandler(before)  # it may hold a standard error that was replaced since
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)


def warn_of_broken_plugins() -> None:
    """A line on standard error for each installed plug-in that cannot be used."""
    from cl_platform import plugins

    for plugin in plugins.load_installed():
        if plugin.problem is not None:
            print(f"warning: {plugin.line}", file=sys.stderr)
