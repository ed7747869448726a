"""What neither certificate nor audit log may tell: paths of this machine, names of accounts, hosts and classes."""

from __future__ import annotations

import contextlib
import getpass
import re
import socket
from collections.abc import Collection, Iterator, Mapping

_ABSOLUTE = re.compile(r"(?:^|[\s\"'=(:,])(?:/[^\s/]|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\\w)|file://")
_SEPARATORS = re.compile(r"[/\\@,;]")
_OWN_WORDS = frozenset({"train", "validation", "test", "sgd", "adam", "adamw", "retain", "released", "none", "buffer"})
"""Values that the platform writes by themselves whatever the classes are called: they tell of none."""
_EVENT_FILE = re.compile(r"(events\.out\.tfevents\.\d+)\..+?((?:\.\d+\.\d+)?(?:\.v2)?)$")


def account_names() -> frozenset[str]:
    """Names of the account and of the machine, as far as they can be found out."""
    found = {socket.gethostname(), socket.gethostname().partition(".")[0]}
    with contextlib.suppress(KeyError, OSError):  # an account without a name, as in some containers
        found.add(getpass.getuser())
    return frozenset(name for name in found if name)


def findings(value: object, names: Collection[str] = (), place: str = "value") -> Iterator[str]:
    """Where a value says more than it may; empty if it does not.

    A name counts where it is a whole string, or a whole part between path separators, commas or ``@``: an ordinary
    word of a sentence may well be somebody's name, or a class's. Names that are numbers cannot be told from ids, nor
    those that are values of keys, such as that of a split, from these.

    Args:
        value: plain JSON.
        names: further names that must not stand in it, such as those of classes.
        place: how the value is called in what is found.
    """
    known = {name.casefold() for name in (*names, *account_names()) if not name.isdigit()} - _OWN_WORDS
    yield from _walk(value, known, place)


def _walk(value: object, names: set[str], place: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _walk(str(key), names, f"{place} (a key)")
            yield from _walk(inner, names, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _walk(inner, names, f"{place}[{index}]")
    elif isinstance(value, bytes):
        yield f"{place} holds bytes"
    elif isinstance(value, str):
        if _ABSOLUTE.search(value):
            yield f"{place} holds a path of this machine"
        if any(part.strip().casefold() in names for part in _SEPARATORS.split(value)):
            yield f"{place} holds the name of an account, a machine or a class"


def masked(path: str, names: Collection[str] = ()) -> str:
    """A relative path as it may be shown: parts that are the name of an account, a machine or a class become ``*``."""
    known = {name.casefold() for name in (*names, *account_names()) if not name.isdigit()}
    parts = re.split(r"([/\\\\@,;])", shown_path(path))
    return "".join("*" if part.strip().casefold() in known else part for part in parts)


def shown_path(path: str) -> str:
    """A relative path without the host name that TensorBoard puts into the names of its files."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + _EVENT_FILE.sub(r"\1.host\2", name)
