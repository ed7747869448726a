"""Run folders that differ in a seed, a key or their data, to be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from run_folders import Made, write_run

from cl_platform.report.comparison_groups import group_runs
from cl_platform.report.comparison_numbers import Numbers, gather
from cl_platform.report.comparison_runs import choose

SMALL = Made(tasks=3, updates=24, diagnostics=False)


def run(
    root: Path, strategy: str = "finetune", seed: int = 0, keys: Mapping[str, Any] | None = None, **made: Any
) -> Path:
    """Write ``root/strategy/<number>``; ``keys`` are full keys of its configuration."""
    place = root / strategy
    number = len(list(place.glob("*"))) if place.is_dir() else 0
    path = write_run(place / f"{number:02d}", replace(SMALL, strategy=strategy, seed=seed, **made))
    if keys:
        config = yaml.safe_load((path / "config.yaml").read_text())
        for key, value in keys.items():
            _put(config, key.split("."), value)
        (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def seeds(root: Path, strategy: str, count: int, **made: Any) -> list[Path]:
    """Runs of one configuration with seeds 0, 1, .."""
    return [run(root, strategy, seed, **made) for seed in range(count)]


def three_seeds_each(root: Path) -> list[Path]:
    """Two strategies of three seeds each, the second one better."""
    return [*seeds(root, "finetune", 3), *seeds(root, "replay", 3, dip=0.1, left=0.01)]


def numbers_of(paths: list[Path]) -> Numbers:
    """What is compared."""
    return gather(group_runs(choose(paths).runs)[0])


def edit(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a run folder in place."""
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


def give(path: Path, key: str, value: float | None, reason: str | None = None) -> None:
    """Make up a metric, under its bare key and with its space."""

    def change(metrics: Any) -> None:
        for name in (key, f"{key}_cil"):
            metrics[name] |= {"value": value, "reason": reason}

    edit(path, "metrics.json", change)


def _put(config: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        config = config.setdefault(part, {})
    config[parts[-1]] = value
