"""The content of ``metrics.json``: every metric of every prediction space, or the reason it has no value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cl_platform.metrics import matrix as definitions_as_code
from cl_platform.metrics.counts import AccuracyMatrix
from cl_platform.metrics.definitions import DEFINITIONS, Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined

PRIMARY_SPACES = ("cil", "dil", "til")


def summarise(
    matrices: Mapping[str, AccuracyMatrix],
    primary: str,
    *,
    row_reason: str | None = None,
    candidates: Mapping[str, int | Sequence[int]] | None = None,
    joint_references: Mapping[str, Sequence[float | None]] | None = None,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """All matrix metrics as one JSON-ready object.

    Every metric stands under its key with the space's suffix, those of the primary space under the bare key as well;
    ``tasks`` lists the ids of the tasks averaged over, and ``per_task`` runs along it (null for a task that the
    definition leaves out).

    Args:
        matrices: prediction space -> counts.
        primary: the scenario's own space: ``cil``, ``dil`` or ``til``.
        row_reason: reason in place of ``not_evaluated`` where a whole row is absent, such as ``joint_trains_once``.
        candidates: space -> number of classes to choose from (one, or one per position), for ``fwt_chance``.
        joint_references: space -> accuracy on task k of a joint training on tasks 0..k, for ``intransigence``.
        extra: further entries made by :func:`entry`, under keys with their space's suffix.

    Raises:
        ValueError: unknown or absent primary space, a matrix under another space's name, an unknown reason, a key
            given twice, or a value that JSON cannot hold.
    """
    _check_spaces(matrices, primary)
    row_undefined = Undefined(row_reason) if row_reason is not None else None
    entries: dict[str, Any] = {}
    for space, counts in matrices.items():
        for definition in DEFINITIONS:
            outcome = _compute(definition.key, counts, candidates, joint_references)
            if isinstance(outcome, Undefined) and outcome.row_missing and row_undefined is not None:
                outcome = row_undefined
            entries[f"{definition.key}_{space}"] = _entry_of(definition, counts, outcome)
    for key, given in (extra or {}).items():
        if key in entries:
            raise ValueError(f"{key} is given twice")
        entries[key] = dict(given)
    suffix = f"_{primary}"
    bare = {key.removesuffix(suffix): value for key, value in entries.items() if key.endswith(suffix)}
    summary = {"tasks": _averaged(matrices[primary]), **bare, **entries}
    _check_finite(summary, "metrics")
    return summary


def entry(
    number: str,
    value: object,
    space: str,
    unit: str = "fraction",
    per_task: Sequence[float | None] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """One entry of ``metrics.json``.

    Args:
        number: the definition's id.
        value: what was computed, or ``None``.
        space: suffix of the prediction space.
        unit: unit of the value.
        per_task: one term per averaged task.
        reason: why there is no value; given exactly when ``value`` is ``None``.

    Raises:
        ValueError: an unknown reason, both a value and a reason, neither of them, or NaN or infinity.
    """
    if (value is None) != (reason is not None):
        raise ValueError(f"metric {number}: needs a value or a reason, not both")
    if reason is not None:
        Undefined(reason)
    made = {
        "id": number,
        "value": value,
        "space": space,
        "unit": unit,
        "per_task": None if per_task is None else list(per_task),
        "reason": reason,
    }
    _check_finite(made, f"metric {number}")
    return made


def _check_spaces(matrices: Mapping[str, AccuracyMatrix], primary: str) -> None:
    if primary not in PRIMARY_SPACES or primary not in matrices:
        raise ValueError(f"primary space {primary!r}: must be one of {', '.join(PRIMARY_SPACES)} and have a matrix")
    for space, counts in matrices.items():
        if counts.space != space:
            raise ValueError(f"the matrix of {space!r} was counted in {counts.space!r}")


def _compute(
    key: str,
    counts: AccuracyMatrix,
    candidates: Mapping[str, int | Sequence[int]] | None,
    joint_references: Mapping[str, Sequence[float | None]] | None,
) -> Outcome:
    if key == "fwt_chance":
        return definitions_as_code.fwt_chance(counts, (candidates or {}).get(counts.space))
    if key == "intransigence":
        return definitions_as_code.intransigence(counts, (joint_references or {}).get(counts.space))
    function: Callable[[AccuracyMatrix], Outcome] = getattr(definitions_as_code, key)
    return function(counts)


def _entry_of(definition: Definition, counts: AccuracyMatrix, outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Undefined):
        return entry(definition.id, None, counts.space, definition.unit, reason=outcome.reason)
    made = entry(definition.id, outcome.value, counts.space, definition.unit, _along_tasks(counts, outcome))
    if outcome.per_class is not None:
        made["per_class"] = {str(c): recall for c, recall in outcome.per_class.items()}
    return made


def _along_tasks(counts: AccuracyMatrix, result: Result) -> list[float | None] | None:
    if result.per_task is None:
        return None
    return [result.per_task.get(task_id) for task_id in _averaged(counts)]


def _averaged(counts: AccuracyMatrix) -> list[int]:
    return [counts.task_ids[position] for position in counts.kept]


def _check_finite(value: object, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; an undefined metric is null with a reason")
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_finite(item, where)
