"""Entries of ``metrics.json`` that come from the log of continual evaluation alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from typing import Any

from cl_platform.metrics import continual, gap
from cl_platform.metrics.continual_log import ContinualLog, Curves
from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined
from cl_platform.metrics.results import entry

WINDOWS = (10, 100)
"""Updates of the windowed metrics 2.2.4 and 2.2.5."""
LCA_UPDATES = 10

_BY_KEY: dict[str, Definition] = {d.key: d for d in (*continual.CONTINUAL_DEFINITIONS, *gap.GAP_DEFINITIONS)}
_PARAMETERS = {"wf": WINDOWS, "wp": WINDOWS, "lca": (LCA_UPDATES,)}


def definition_of(key: str) -> Definition | None:
    """The definition behind a key such as ``wf_10``; ``None`` for a key of another module."""
    name, _, parameter = key.rpartition("_")
    return _BY_KEY.get(key) or (_BY_KEY.get(name) if parameter.isdigit() else None)


def continual_keys() -> list[str]:
    """All keys of this module without their space's suffix, in the order of their definitions."""
    return [key for name in _BY_KEY for key in _with_parameters(name)]


def continual_entries(
    log: ContinualLog | None,
    spaces: Sequence[str],
    *,
    window: int | None = None,
    tolerance: float = 0.02,
    reason: str = "evaluation_off",
    forgotten: Collection[int] = (),
) -> dict[str, dict[str, Any]]:
    """Every metric of 2.2 and 3 in every space under its suffixed key, or the reason why it has no value.

    Args:
        log: what was read from the file; ``None`` where nothing was evaluated.
        spaces: prediction spaces of the run.
        window: see :func:`~cl_platform.metrics.gap.gap_pairs`.
        tolerance: see :func:`~cl_platform.metrics.gap.gap_pairs`.
        reason: why there is no log.
        forgotten: ids of tasks that were forgotten on request.
    """
    found: dict[str, dict[str, Any]] = {}
    for space in spaces:
        curves = None if log is None else Curves.of(log, space, forgotten)
        outcomes = {} if curves is None else _outcomes(curves, window, tolerance)
        for key in continual_keys():
            definition = definition_of(key)
            assert definition is not None
            outcome = outcomes.get(key, Undefined(reason))
            found[f"{key}_{space}"] = _entry(definition, outcome, space, curves)
    return found


def gap_table(
    log: ContinualLog, space: str, window: int | None = None, tolerance: float = 0.02, forgotten: Collection[int] = ()
) -> list[dict[str, Any]]:
    """Every switch and old task of one space as plain records; ``switch`` and ``task`` are task ids."""
    curves = Curves.of(log, space, forgotten)
    records = []
    for pair in gap.gap_pairs(curves, window, tolerance):
        values = asdict(pair)
        k, j = values.pop("k"), values.pop("j")
        records.append({"switch": curves.task_ids[k], "task": curves.task_ids[j], **values})
    return records


def coverage(log: ContinualLog, space: str) -> dict[str, Any]:
    """How much was looked at: evaluated updates, all updates, and their ratio after the end of the first task."""
    curves = Curves.of(log, space)
    seen = {e.step for e in curves.evaluations if e.event == "step"}
    total = curves.ends[-1] if curves.ends else 0
    first = curves.ends[0] if curves.ends else 0
    later = total - first
    return {
        "evaluations": len(seen),
        "updates": total,
        "coverage": len([step for step in seen if step > first]) / later if later > 0 else None,
    }


def _outcomes(curves: Curves, window: int | None, tolerance: float) -> dict[str, Outcome]:
    plain: dict[str, Callable[[Curves], Outcome]] = {
        "min_acc": continual.min_acc,
        "wc_acc": continual.wc_acc,
        "aaa": continual.aaa,
        "aaa_samples": continual.aaa_samples,
    }
    outcomes: dict[str, Outcome] = {key: function(curves) for key, function in plain.items()}
    for updates in WINDOWS:
        outcomes[f"wf_{updates}"] = continual.wf(curves, updates)
        outcomes[f"wp_{updates}"] = continual.wp(curves, updates)
    outcomes[f"lca_{LCA_UPDATES}"] = continual.lca(curves, LCA_UPDATES)
    return {**outcomes, **gap.run_level(curves, gap.gap_pairs(curves, window, tolerance))}


def _with_parameters(name: str) -> list[str]:
    return [f"{name}_{value}" for value in _PARAMETERS[name]] if name in _PARAMETERS else [name]


def _entry(definition: Definition, outcome: Outcome, space: str, curves: Curves | None) -> dict[str, Any]:
    if isinstance(outcome, Result):
        per_task = None
        if outcome.per_task is not None and curves is not None:
            per_task = [outcome.per_task.get(curves.task_ids[p]) for p in curves.kept]
        return entry(definition.id, outcome.value, space, definition.unit, per_task)
    return entry(definition.id, None, space, definition.unit, reason=outcome.reason)
