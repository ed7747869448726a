"""Name -> object for every kind of plug-in.

Built-in modules register themselves when their package is imported; other packages do so through the entry point group
``cl_platform.plugins`` and single files through the key ``plugins`` (:mod:`cl_platform.plugins`). The decorator is the
same for all three.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cl_platform.errors import UserError, unknown_name

T = TypeVar("T")
Defaults = Mapping[str, Any] | str | Path


class Registry:
    """Names of one kind of plug-in and the objects behind them.

    Args:
        kind: what one of them is called.
        group: the configuration group from which it is chosen, if there is one.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, Any] = {}
        self._configs: dict[str, type] = {}
        self._defaults: dict[str, Defaults] = {}

    def register(self, name: str, *, config: type | None = None, defaults: Defaults | None = None) -> Callable[[T], T]:
        """Decorator: put the decorated object under ``name``.

        Args:
            name: what the user types.
            config: a dataclass with its typed keys, where the object has no class attribute ``Config`` of its own.
            defaults: values other than those of the dataclass, such as a recommended ``optimizer``, or a yaml file with
                them beside the registering module. Built-in objects have a file under ``conf`` instead.

        Raises:
            UserError: another object has that name; both origins are in the message.
        """

        def decorate(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and origin(known) != origin(entry):
                raise UserError(
                    self.kind, name, f"registered twice, by {origin(known)} and {origin(entry)}", "Rename one of them"
                )
            if isinstance(entry, type) and getattr(entry, "name", None) == "":
                entry.name = name  # type: ignore[attr-defined]
            self._entries[name] = entry
            if config is not None:
                self._configs[name] = config
            if defaults is not None:
                self._defaults[name] = defaults
            return entry

        return decorate

    def get(self, name: str) -> Any:
        """The object registered under ``name``; a ``UserError`` with the nearest names if there is none."""
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def config(self, name: str) -> type | None:
        """The dataclass of an object's keys; ``None`` where it has none of its own."""
        return self._configs.get(name) or getattr(self._entries.get(name), "Config", None)

    def defaults(self, name: str) -> Defaults | None:
        """The values that were registered beside the dataclass."""
        return self._defaults.get(name)

    def names(self) -> list[str]:
        """All registered names in alphabetical order."""
        return sorted(self._entries)

    def state(self) -> tuple[dict[str, Any], ...]:
        """Everything registered so far, for :meth:`put_back`."""
        return dict(self._entries), dict(self._configs), dict(self._defaults)

    def put_back(self, state: tuple[dict[str, Any], ...]) -> None:
        """Forget what was registered since :meth:`state`, as after a module that failed half-way."""
        self._entries, self._configs, self._defaults = (dict(part) for part in state)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def origin(entry: Any) -> str:
    """Where an object was defined: its dotted name, and its file if that is no module of this package."""
    entry = getattr(entry, "func", entry)  # of a functools.partial
    module = getattr(entry, "__module__", "?")
    name = f"{module}.{getattr(entry, '__qualname__', repr(entry))}"
    file = getattr(sys.modules.get(module), "__file__", None)
    return name if file is None or module.partition(".")[0] == "cl_platform" else f"{name} ({file})"


strategies = Registry("strategy", "strategy")
scenarios = Registry("scenario", "scenario")
backbones = Registry("backbone", "backbone")
unlearning_methods = Registry("unlearning method", "unlearning")
metrics = Registry("metric")
"""Functions of an :class:`~cl_platform.metrics.AccuracyMatrix` that give a number, ``None`` where it is undefined."""
buffer_policies = Registry("buffer policy")
"""Subclasses of :class:`~cl_platform.memory.policies.Policy`, chosen by ``strategy.NAME.buffer.policy``."""

KINDS = (strategies, scenarios, backbones, unlearning_methods, metrics, buffer_policies)
"""All kinds, in the order in which they are listed."""
