"""What a broken promise looks like: which check, what was seen, what to do next."""

from __future__ import annotations

import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WIDTH = 100
HERE = Path(__file__).resolve().parent
SHOWN = 3
"""Names of a longer list that a message shows."""


@dataclass(frozen=True)
class Failure:
    """One check that failed.

    Attributes:
        check: its name.
        seen: what was observed, a sentence without its full stop.
        todo: what to do next, likewise.
    """

    check: str
    seen: str
    todo: str

    def __str__(self) -> str:
        lines = [self.check]
        for word, text in (("seen", self.seen), ("next", self.todo)):
            lines += textwrap.wrap(
                f"{word}: {text}.", WIDTH, initial_indent="  ", subsequent_indent="        ", break_long_words=False
            )
        return "\n".join(lines)


class ContractError(AssertionError):
    """A strategy breaks its contract; the text names every check that failed, what was seen, and what to do next.

    Attributes:
        failures: a :class:`Failure` for each failed check, in the order in which they were run.
    """

    def __init__(self, strategy: str, failures: Sequence[Failure], run: int) -> None:
        self.strategy, self.failures = strategy, tuple(failures)
        of = f"{len(failures)} of {run} checks" if run > 1 else "a check"
        super().__init__("\n\n".join([f"{strategy} fails {of} of the contract of a strategy", *map(str, failures)]))


class Breach(Exception):
    """What a check raises; its caller knows the check's name.

    Args:
        seen: see :class:`Failure`.
        todo: likewise.
    """

    def __init__(self, seen: str, todo: str) -> None:
        self.seen, self.todo = " ".join(seen.split()).rstrip("."), " ".join(todo.split()).rstrip(".")
        super().__init__(self.seen)


class NotReady(Breach):
    """What a check looks at cannot be made, since another promise is broken.

    Args:
        by: name of the check that looks at that promise.
    """

    def __init__(self, by: str, seen: str, todo: str) -> None:
        super().__init__(seen, todo)
        self.by = by


@contextmanager
def expected(doing: str, todo: str) -> Iterator[None]:
    """Turn an error of the strategy inside the block into a breach.

    Args:
        doing: what was being done, such as ``training under bf16``.
        todo: what to do about it.
    """
    try:
        yield
    except Breach:
        raise
    except Exception as error:
        raise Breach(f"{doing} raised {cause(error)}", todo) from error


def cause(error: BaseException) -> str:
    """An error in one line, with the line of the strategy, as far as can be told, at which it came up."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve().parent != HERE]
    own = [f for f in frames if "site-packages" not in f.filename and "cl_platform" not in Path(f.filename).parts[:-1]]
    inner = [f for f in frames if "strategies" in Path(f.filename).parts]
    place = next(iter([*own[-1:], *inner[-1:], *frames[-1:]]), None)
    text = " ".join(str(error).split())[:200].rstrip(".")
    where = f", in line {place.lineno} of {Path(place.filename).name} ({place.name})" if place else ""
    return f"{type(error).__name__}: {text}{where}"


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
