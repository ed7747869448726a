"""Which strategy is to be checked: a class, a registered name, or several that work together, with their keys."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import cl_platform.strategies  # noqa: F401  registers what is built in
from cl_platform import plugins, registry
from cl_platform.cli.compose import choice_values, config_folder
from cl_platform.config import typed
from cl_platform.errors import UserError
from cl_platform.optimizers import OptimizerConfig
from cl_platform.strategies.base import Strategy
from cl_platform.strategies.composition import Composition, assembled

Checked: TypeAlias = "type[Strategy] | str | Sequence[type[Strategy] | str]"
Keys: TypeAlias = Mapping[str, Any]

FITTING: dict[str, dict[str, Any]] = {
    "coda_prompt": {"num_components": 12},
    "ranpac": {"projections": 64},
    "gdumb": {"passes": 6},
    "fpf": {"steps": 3},
    "k_fpf": {"steps": 3},
}
"""Keys of built-in strategies whose defaults do not fit the small network, or cost too much for a check."""

RULE: dict[str, Any] = {"name": "adam", "lr": 0.003, "weight_decay": 0.01}
"""The update rule: one that moves the small network far in few steps, and by its decay whatever it should not hold.
Recommended ones are for pretrained trunks."""

COMPANY = "er"
"""What stands before a strategy that needs a buffer, where nothing else was asked for."""


@dataclass(frozen=True)
class Given:
    """What is to be checked.

    Attributes:
        label: its names, joined by ``+``.
        classes: its strategies, in order.
        names: what each is called.
        keys: of each strategy, without its ``optimizer``.
        optimizer: the update rule.
    """

    label: str
    classes: tuple[type[Strategy], ...]
    names: tuple[str, ...]
    keys: tuple[Keys, ...]
    optimizer: Keys

    def composition(self) -> Composition:
        """The strategies, newly made.

        Raises:
            UserError: keys that they do not have, or strategies that cannot stand side by side.
        """
        made = []
        for cls, name, keys in zip(self.classes, self.names, self.keys, strict=True):
            strategy = cls(typed(cls.Config, keys, f"strategy.{name}"))
            if not strategy.name:
                strategy.name = name  # type: ignore[misc]
            made.append(strategy)
        return assembled(made)

    def rule(self) -> OptimizerConfig:
        """The update rule."""
        return typed(OptimizerConfig, self.optimizer, "optimizer")


def given(strategy: Checked, config: Keys | None = None) -> Given:
    """What the arguments of a check stand for.

    Args:
        strategy: a class, registered or not; a registered name; or a list of these in the order of ``strategy=[A,B]``.
            A strategy that needs a replay buffer is put behind ``er`` where nothing in the list has one.
        config: keys of a single strategy; for a list, names with keys below them. ``optimizer`` among them is
            the update rule. Keys that are left out take what the strategy's yaml file or plug-in recommends.

    Raises:
        UserError: an unknown name, or no class of a strategy.
    """
    listed = list(strategy) if isinstance(strategy, (list, tuple)) else [strategy]
    found = [_found(entry) for entry in listed]
    if not found:
        raise UserError("strategy", "[]", "there is nothing to check", "Name a strategy")
    names = [name for name, _ in found]
    config = dict(config or {})
    own = {names[0]: config} if len(found) == 1 and not isinstance(strategy, (list, tuple)) else config
    for name in own:
        if name not in names:
            raise UserError("config", name, f"is none of {', '.join(names)}", "Write the keys below a strategy's name")
    if any(cls.needs.buffer for _, cls in found) and not any("buffer" in cls.owns for _, cls in found):
        found.insert(0, _found(COMPANY))
    keys, optimizer = [], None
    for name, cls in found:
        values = {**_recommended(name, cls), **FITTING.get(name, {}), **dict(own.get(name) or {})}
        values.pop("optimizer", None)
        rule = dict(own.get(name) or {}).get("optimizer")
        optimizer = rule if optimizer is None else optimizer
        keys.append(values)
    classes = tuple(cls for _, cls in found)
    called = tuple(name for name, _ in found)
    return Given("+".join(called), classes, called, tuple(keys), dict(optimizer or RULE))


def _found(entry: Any) -> tuple[str, type[Strategy]]:
    """Name and class of one strategy."""
    if isinstance(entry, str):
        if entry not in registry.strategies:
            plugins.load_installed()
        return entry, registry.strategies.get(entry)
    if not (isinstance(entry, type) and issubclass(entry, Strategy)):
        shown = getattr(entry, "__name__", type(entry).__name__)
        raise UserError(
            "strategy", shown, "is neither a subclass of cl_platform.strategies.Strategy nor a registered name",
            "Give the class itself, check_strategy(MyStrategy)",
        )  # fmt: skip
    return entry.name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", entry.__name__).lower(), entry


def _recommended(name: str, cls: type[Strategy]) -> dict[str, Any]:
    """The keys in the strategy's yaml file, or those that it was registered with; none for a class of its own."""
    if name not in registry.strategies or registry.strategies.get(name) is not cls:
        return {}
    if name in plugins.choices("strategy") or (config_folder() / "strategy" / f"{name}.yaml").is_file():
        return choice_values("strategy", name)
    defaults = registry.strategies.defaults(name)
    return dict(defaults) if isinstance(defaults, Mapping) else {}
