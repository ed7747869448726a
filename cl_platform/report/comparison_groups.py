"""Runs that differ in nothing but their seed belong together; what a group is called and how groups differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cl_platform.report.run_view import RunView

BOOKKEEPING = (
    "seed", "run_dir", "output_root", "resume", "debug", "plugins", "logger", "report", "data", "diagnostics",
    "scenario.path", "scenario.split_file", "trainer.progress", "evaluation.cache_bytes",
)  # fmt: skip
"""Keys, or the groups they are in, that do not change what is learnt or how it is measured."""

GRID_KEYS = {
    "adaptive": ("max_overhead", "max_rate", "min_per_task", "reserve", "images_per_task"),
    "every": ("k", "images_per_task"),
    "every_step": ("images_per_task",),
    "boundaries": ("images_per_task",),
    "off": (),
}
"""Grid of continual evaluation -> the keys of ``evaluation`` that it reads beside those about gaps."""

ABOUT_GAPS = ("gap_window", "gap_tolerance")

Settings = Mapping[str, Any]
"""Full key -> value of what decides a run's numbers, its seed aside; a key that is null is left out."""


@dataclass(frozen=True)
class Group:
    """Runs of one configuration.

    Attributes:
        label: its strategy and the keys in which it differs from other groups of that strategy; unique.
        strategy: names of its strategies, joined by a plus.
        runs: one for each seed.
        settings: what decides their numbers.
    """

    label: str
    strategy: str
    runs: tuple[RunView, ...]
    settings: Settings = field(repr=False)

    @property
    def seeds(self) -> tuple[Any, ...]:
        """The seed of every run."""
        return tuple(run.config.get("seed") for run in self.runs)


def group_runs(runs: Sequence[RunView]) -> tuple[list[Group], list[str]]:
    """The groups in the order of their first runs, and a line for each run that repeats another one.

    Two runs of one configuration and seed are no two samples: the later one counts.
    """
    weights = _weights_apart(runs)
    found: dict[str, list[RunView]] = {}
    settings: dict[str, Settings] = {}
    for run, digest in zip(runs, weights, strict=True):
        made = {**settings_of(run), **({"backbone.weights_sha256": digest} if digest else {})}
        key = json.dumps(made, sort_keys=True, default=str)
        settings[key] = made
        found.setdefault(key, []).append(run)
    repeated: list[str] = []
    members = {key: _one_per_seed(group, repeated) for key, group in found.items()}
    strategies = {key: strategy_of(group[0]) for key, group in members.items()}
    labels = _labels(strategies, settings)
    groups = [Group(labels[key], strategies[key], tuple(group), settings[key]) for key, group in members.items()]
    return groups, repeated


def settings_of(run: RunView) -> Settings:
    """What decides a run's numbers, with the optimizer as it was used: its own keys over the strategy's advice."""
    config = {key: value for key, value in run.config.items() if key not in BOOKKEEPING}
    strategies = config.get("strategy")
    if isinstance(strategies, Mapping):
        used = _used_optimizer(strategies, config.get("optimizer"))
        bare = {
            name: {key: value for key, value in (keys or {}).items() if key != "optimizer"}
            for name, keys in strategies.items()
        }
        config = {**config, "strategy": bare, "optimizer": used}
    evaluation = config.get("evaluation")
    if isinstance(evaluation, Mapping):
        config["evaluation"] = _read_by_grid(evaluation)
    flat = {key: value for key, value in _flat(config).items() if value is not None and key not in BOOKKEEPING}
    flat["strategy"] = strategy_of(run)
    dropped = sorted(run.forgotten)
    return {**flat, **({"forgotten tasks": dropped} if dropped else {})}


def strategy_of(run: RunView) -> str:
    """Names of a run's strategies, joined by a plus."""
    chosen = run.config.get("strategy")
    if isinstance(chosen, Mapping | list):
        return "+".join(map(str, chosen)) or "no strategy"
    return str(chosen or "unknown strategy")


def differences(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Keys beside those of the strategies themselves in which groups differ, and the value of each group."""
    keys = dict.fromkeys(key for group in groups for key in group.settings)
    shared = [key for key in keys if key != "strategy" and not key.startswith("strategy.")]
    rows = [(key, [shown(group.settings.get(key)) for group in groups]) for key in shared]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def shown(value: Any) -> str:
    """A value as it is written on the command line, ``-`` for one that is not set."""
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(shown, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _used_optimizer(strategies: Mapping[str, Any], given: Any) -> dict[str, Any]:
    advised = next((dict(keys["optimizer"]) for keys in strategies.values() if keys and keys.get("optimizer")), {})
    own = {key: value for key, value in given.items() if value is not None} if isinstance(given, Mapping) else {}
    if "lr" in own and "lr_per_256" not in own:
        advised.pop("lr_per_256", None)
    return {**advised, **own}


def _read_by_grid(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``evaluation`` that its grid reads."""
    grid = str(evaluation.get("grid"))
    unread = {key for keys in GRID_KEYS.values() for key in keys} - set(GRID_KEYS.get(grid, evaluation))
    unread |= set(ABOUT_GAPS) if grid == "off" else set()
    return {key: value for key, value in evaluation.items() if key not in unread}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Full key -> value; an empty mapping has no key."""
    if not isinstance(values, Mapping):
        return {prefix: _plain(values)}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _plain(value: Any) -> Any:
    """A value under which 1 and 1.0 are one."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _weights_apart(runs: Sequence[RunView]) -> list[str | None]:
    """For each run the digest of its backbone's first weights where one configuration began with several.

    A backbone without pretrained weights begins differently for every seed, which is no such case.
    """
    begun: dict[str, list[tuple[Any, str | None]]] = {}
    keys = []
    for run in runs:
        keys.append(json.dumps(_flat(run.config.get("backbone")), sort_keys=True, default=str))
        begun.setdefault(keys[-1], []).append((run.config.get("seed"), _weights(run)))
    apart = set()
    for key, known in begun.items():
        digests, seeds, pairs = {d for _, d in known}, {s for s, _ in known}, set(known)
        one_per_seed = len(pairs) == len(seeds) == len(digests)
        if len(digests) > 1 and not one_per_seed:
            apart.add(key)
    return [(_weights(run) or "unknown")[:8] if key in apart else None for run, key in zip(runs, keys, strict=True)]


def _weights(run: RunView) -> str | None:
    backbone = run.environment.get("backbone")
    digest = backbone.get("weights_sha256") if isinstance(backbone, Mapping) else None
    return str(digest) if digest else None


def _one_per_seed(runs: Sequence[RunView], repeated: list[str]) -> list[RunView]:
    latest: dict[str, RunView] = {}
    for run in runs:
        seed = json.dumps(run.config.get("seed"), default=str)
        earlier = latest.get(seed)
        if earlier is not None:
            repeated.append(
                f"{earlier.path} has the configuration and the seed of {run.path}: no second sample, the later one "
                "counts"
            )
        latest[seed] = run
    return list(latest.values())


def _labels(strategies: Mapping[str, str], settings: Mapping[str, Settings]) -> dict[str, str]:
    """A name for each group: its strategy, and the keys that tell it from other groups of that strategy."""
    labels: dict[str, str] = {}
    for strategy in dict.fromkeys(strategies.values()):
        group = [key for key, name in strategies.items() if name == strategy]
        keys = dict.fromkeys(key for member in group for key in settings[member])
        differing = [key for key in keys if len({shown(settings[member].get(key)) for member in group}) > 1]
        everywhere = [key for key in differing if all(key in settings[member] for member in group)]
        for chosen in (everywhere, differing):
            for member in group:
                parts = [f"{_short(key, strategy)}={shown(settings[member].get(key))}" for key in chosen]
                labels[member] = " ".join([strategy, *parts])
            if len({labels[member] for member in group}) == len(group):
                break
    return labels


def _short(key: str, strategy: str) -> str:
    """A key without what the strategy's name says already."""
    return key.removeprefix(f"strategy.{strategy}.").removeprefix("strategy.")
