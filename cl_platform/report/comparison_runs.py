"""Which runs a comparison is over: finished ones of one scenario, each counted once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError
from cl_platform.report.run_view import RunView, read_run

HOW_NOT_WHAT = ("augment", "augment_scale", "test_transform", "interpolation", "online", "boundaries")
"""Keys of ``scenario`` that say how images are used; any other one that differs makes other data."""


@dataclass(frozen=True)
class Chosen:
    """The runs to compare.

    Attributes:
        runs: finished runs of one scenario in the order given.
        left_out: a line for every folder that is not among them.
        notes: lines about what a reader has to know of their data.
    """

    runs: tuple[RunView, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def choose(paths: Sequence[Path]) -> Chosen:
    """Read the run folders.

    Args:
        paths: run folders; one that is named twice counts once.

    Raises:
        UserError: a folder that is no run, a damaged file, runs of different scenarios, or no finished run.
    """
    unique = {path.resolve(): path for path in reversed(paths)}
    given = [path for path in dict.fromkeys(paths) if unique[path.resolve()] == path]
    left_out = [f"{path} is named twice and counted once" for path in _repeated(paths)]
    runs = []
    for path in given:
        view = read_run(path)
        if view.metrics:
            runs.append(view)
        else:
            left_out.append(f"{path} has no metrics.json: the run has not finished")
    if not runs:
        what = "no run is given" if not paths else "none of the runs has finished"
        todo = (
            "Name run folders" if not paths else "Go on with python train.py ... resume=FOLDER, or name finished runs"
        )
        raise UserError("runs", " ".join(map(str, paths[:3])), what, todo)
    return Chosen(tuple(runs), tuple(left_out), tuple(_check_scenario(runs)))


def scenario_name(view: RunView) -> str:
    """Name of a run's scenario."""
    name = _dataset(view).get("scenario") or _scenario(view).get("kind")
    return str(name or "unknown scenario")


def _repeated(paths: Sequence[Path]) -> list[Path]:
    seen: set[Path] = set()
    again = []
    for path in paths:
        if path.resolve() in seen:
            again.append(path)
        seen.add(path.resolve())
    return list(dict.fromkeys(again))


def _check_scenario(runs: Sequence[RunView]) -> list[str]:
    """Refuse runs of different scenarios; a line if every seed draws data of its own."""
    by_seed: dict[Any, RunView] = {}
    drawn = False
    for view in runs:
        twin = by_seed.setdefault(view.config.get("seed"), view)
        for other in (twin, runs[0]):
            ours, theirs = _dataset(other).get("digest"), _dataset(view).get("digest")
            if ours is not None and ours == theirs:
                continue
            differing, unknown = _differing(other, view), ours is None or theirs is None
            if differing or (other is twin and not unknown):
                raise _refused(other, view, differing)
            drawn |= not unknown
    if drawn:
        return ["Each seed draws images or permutations of its own, so the deviation over seeds holds theirs too."]
    return []


def _differing(one: RunView, other: RunView) -> list[str]:
    """Keys of ``scenario`` in which two runs are of different data, and both values."""
    a, b = _scenario(one), _scenario(other)
    keys = [key for key in {**a, **b} if key not in HOW_NOT_WHAT and _text(a.get(key)) != _text(b.get(key))]
    return [f"scenario.{key} is {_shown(a.get(key))} and {_shown(b.get(key))}" for key in keys]


def _refused(one: RunView, other: RunView, differing: Sequence[str]) -> UserError:
    names = scenario_name(one), scenario_name(other)
    if differing:
        more = f" and {len(differing) - 3} more keys differ" if len(differing) > 3 else ""
        why = ", ".join(differing[:3]) + more
    else:
        digests = [str(_dataset(view).get("digest"))[:12] for view in (one, other)]
        why = f"their images or splits differ, SHA-256 {digests[0]} and {digests[1]}"
    return UserError(
        "runs",
        f"{one.path} {other.path}",
        f"are of different scenarios, {names[0]} and {names[1]}: {why}",
        "Numbers of different data cannot be compared; name runs of one scenario",
    )


def _dataset(view: RunView) -> Mapping[str, Any]:
    value = view.environment.get("dataset")
    return value if isinstance(value, Mapping) else {}


def _scenario(view: RunView) -> Mapping[str, Any]:
    value = view.config.get("scenario")
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _shown(value: Any) -> str:
    return "not set" if value is None or value == [] else value if isinstance(value, str) else _text(value)
