"""The one exception that becomes one line and exit code 2, and the search for near names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

LONG = 20
"""Elements of a list that a message shows."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Names of ``known`` that look most like ``name``, best first, at most ``count`` of them."""
    return difflib.get_close_matches(str(name), sorted(set(known)), n=count, cutoff=0.45)


def as_typed(value: object) -> str:
    """A value as one types it behind ``KEY=``: ``null``, ``true``, ``[0,cat]``; a long list is cut in its middle."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{as_typed(name)}:{as_typed(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        shown = [as_typed(inner) for inner in value]
        return "[" + ",".join(shown if len(shown) <= LONG else [*shown[: LONG - 2], "...", shown[-1]]) + "]"
    return str(value)


class UserError(Exception):
    """A mistake in what the user gave: printed as one line, without a traceback.

    Args:
        key: the configuration key as the user typed it, for example ``scenario.num_tasks``.
        value: what was given.
        allowed: what would have been accepted, as part of a sentence.
        what_to_do: the next step for the user, a sentence without its full stop.
        exit_code: the process's exit code, 2 for the user's input.
    """

    def __init__(self, key: str, value: object, allowed: str, what_to_do: str, exit_code: int = 2) -> None:
        self.key = key
        self.value = value
        self.allowed = allowed
        self.what_to_do = what_to_do
        self.exit_code = exit_code
        super().__init__(key, value, allowed, what_to_do)

    def __str__(self) -> str:
        given = self.key if self.value == "" else f"{self.key}={as_typed(self.value)}"
        line = f"{given}: {self.allowed}. {self.what_to_do}."
        return " ".join(line.split())


@contextmanager
def keys_below(prefix: str, group: str) -> Iterator[None]:
    """Give refusals about keys of ``group`` the place at which it stands: ``buffer.size`` to ``PREFIX.buffer.size``."""
    try:
        yield
    except UserError as error:
        if not error.key.startswith(f"{group}."):
            raise
        todo = re.sub(rf"(?<![\w.]){re.escape(group)}\.", f"{prefix}.{group}.", error.what_to_do)
        raise UserError(f"{prefix}.{error.key}", error.value, error.allowed, todo, error.exit_code) from error


def unknown_name(key: str, value: str, known: Iterable[str]) -> UserError:
    """A ``UserError`` for a name that is not among ``known``, with the nearest names first."""
    names = sorted(set(known))
    near = nearest(value, names)
    hint = f"Did you mean {' or '.join(near)}" if near else "Choose one of them"
    return UserError(key, value, f"unknown; known are {', '.join(names) or 'none'}", hint)
