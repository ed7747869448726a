"""Name -> object for every kind of plug-in.

A kind is ``strategy``, ``scenario`` or ``backbone``. Built-in modules register themselves when their package is
imported; other packages do so through the entry point group ``cl_platform.plugins`` or the decorator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cl_platform.errors import UserError, unknown_name

T = TypeVar("T")


class Registry:
    """Names of one kind of plug-in and the objects behind them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: put the decorated object under ``name``.

        Raises:
            UserError: another object has that name; both origins are in the message.
        """

        def decorate(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and _origin(known) != _origin(entry):
                raise UserError(
                    self.kind, name, f"registered twice, by {_origin(known)} and {_origin(entry)}", "Rename one of them"
                )
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> Any:
        """The object registered under ``name``; a ``UserError`` with the nearest names if there is none."""
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names in alphabetical order."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def _origin(entry: Any) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"


strategies = Registry("strategy")
scenarios = Registry("scenario")
backbones = Registry("backbone")
unlearning_methods = Registry("unlearning method")
