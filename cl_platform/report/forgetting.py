"""The section about forgotten tasks: their certificates, and what verification found, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError
from cl_platform.metrics.definitions import FORGETTING_BY_KEY
from cl_platform.report import words
from cl_platform.report.tables import Shown

MODELS = (("o", "before"), ("u", "after"), ("r", "never learnt"), ("gap", "gap"))
"""Columns of the table: keys of a metric, and what they are called."""
LEVELS = {
    "E-bit": "the same bytes as a run that never learnt the task",
    "E-law": "as likely as a run that never learnt the task would have made it; its bytes may differ",
    "approximate": "no proof that nothing of the task remains",
    "none": "the request was refused",
}
"""Levels in words."""
OUTCOMES = {True: "passed", False: "failed", None: "not made"}


@dataclass(frozen=True)
class Figure:
    """One metric of the models side by side.

    Attributes:
        id: of its definition.
        key: with the suffix of its prediction space.
        text: its definition.
        cells: one for each of ``MODELS``.
    """

    id: str
    key: str
    text: str
    cells: list[Shown]


@dataclass(frozen=True)
class ForgottenTask:
    """One request, as it is shown.

    Attributes:
        task_id: the task.
        state: ``open``, ``done`` or ``refused``.
        level: claimed by the certificate.
        facts: name and text of what is known about the request.
        components: action -> tensors and bytes, in a sentence.
        files: action -> number of files.
        not_covered: what no request reaches, and why.
        verdict: the sentence of the verification; empty if there was none.
        failed: whether a check failed.
        checks: name, outcome and detail.
        figures: metrics with a value for the model that forgot.
        undefined: metrics without one, and why.
        reference: how its bytes compare, in a sentence; empty if there was none.
        differences: names of tensors that differ, number of elements and the largest difference.
    """

    task_id: int
    state: str
    level: str
    facts: list[tuple[str, str]]
    components: list[tuple[str, str]]
    files: list[tuple[str, str]]
    not_covered: list[tuple[str, str]]
    verdict: str
    failed: bool
    checks: list[tuple[str, str, str]]
    figures: list[Figure]
    undefined: list[tuple[str, str]]
    reference: str
    differences: list[tuple[str, str, str]]


def forgotten_tasks(run: Path) -> list[ForgottenTask]:
    """The requests of a run folder in the order in which they came; empty if nothing was to be forgotten.

    Raises:
        UserError: a certificate that cannot be understood.
    """
    found = [_read(path) for path in sorted((run / "unlearning").glob("certificate_*.json"))]
    return [_shown(content) for content in sorted(found, key=lambda content: str(content.get("created_utc")))]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(content, dict) or not isinstance(_map(content.get("target")).get("task_id"), int):
        raise _damaged(path, "no certificate")
    return content


def _damaged(path: Path, why: str) -> UserError:
    name = f"unlearning/{path.name}"
    return UserError("run", path.parent.parent, f"{name} cannot be understood ({why})", "Restore the file")


def _shown(content: Mapping[str, Any]) -> ForgottenTask:
    target, verification = _map(content.get("target")), _map(content.get("verification"))
    metrics = _map(verification.get("metrics"))
    rows = {key: _map(sides) for key, sides in metrics.items()}
    checks = [_map(check) for check in _list(verification.get("checks"))]
    return ForgottenTask(
        task_id=int(target["task_id"]),
        state=str(content.get("state")),
        level=str(content.get("level")),
        facts=_facts(content, target),
        components=_components(content),
        files=_counted(content.get("files")),
        not_covered=[
            (str(_map(entry).get("what")), str(_map(entry).get("why"))) for entry in _list(content.get("not_covered"))
        ],
        verdict=_sentence(str(verification.get("verdict") or "")),
        failed=verification.get("passed") is False,
        checks=[
            (str(check.get("name")), OUTCOMES.get(check.get("passed"), "-"), str(check.get("detail")))
            for check in checks
        ],
        figures=[_figure(key, sides) for key, sides in rows.items() if _map(sides.get("u")).get("value") is not None],
        undefined=[
            (key, str(_map(sides.get("u")).get("reason")))
            for key, sides in rows.items()
            if _map(sides.get("u")).get("value") is None
        ],
        reference=_compared(_map(content.get("reference"))),
        differences=_differences(_map(content.get("reference"))),
    )


def _facts(content: Mapping[str, Any], target: Mapping[str, Any]) -> list[tuple[str, str]]:
    method, cost = _map(content.get("method")), _map(content.get("cost"))
    basis = _map(content.get("level_basis"))
    level = str(content.get("level"))
    leaks = [str(leak) for leak in _list(basis.get("leaks"))]
    facts = {
        "level": f"{level}: {LEVELS[level]}" if level in LEVELS else level,
        "method": f"{method.get('used')}, asked for: {method.get('requested')}",
        "why": method.get("reason"),
        "lineage": basis.get("lineage"),
        "ways by which the task may remain": ", ".join(leaks),
        "classes": ", ".join(str(class_id) for class_id in _list(target.get("class_ids"))),
        "training images": target.get("n_train"),
        "images in the buffer": target.get("n_buffer"),
        "asked": content.get("created_utc"),
        "done": content.get("closed_utc"),
        "cost": _cost(cost),
        "request": content.get("request_id"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]


def _cost(cost: Mapping[str, Any]) -> str:
    seconds, purge = cost.get("seconds"), cost.get("seconds_purge")
    said = f"{seconds:.2f} s" if isinstance(seconds, int | float) else ""
    said += f", {purge:.2f} s for files" if isinstance(purge, int | float) and said else ""
    steps = cost.get("optimizer_steps")
    return said + (f", {steps:,} steps" if isinstance(steps, int) and said else "")


def _components(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    totals: dict[str, list[int]] = {}
    for entry in map(_map, _list(content.get("components"))):
        held = totals.setdefault(str(entry.get("action")), [0, 0])
        held[0] += 1
        held[1] += int(entry.get("bytes_before") or 0)
    said = {action: f"{count:,} tensor{'s' * (count != 1)}" for action, (count, _) in totals.items()}
    return [(action, f"{said[action]}, {size:,} bytes before") for action, (_, size) in sorted(totals.items())]


def _counted(files: Any) -> list[tuple[str, str]]:
    totals: dict[str, int] = {}
    for entry in map(_map, _list(files)):
        action = str(entry.get("action"))
        totals[action] = totals.get(action, 0) + 1
    return [(action, f"{count:,} file{'s' * (count != 1)}") for action, count in sorted(totals.items())]


def _figure(key: str, sides: Mapping[str, Any]) -> Figure:
    known = FORGETTING_BY_KEY.get(key) or FORGETTING_BY_KEY.get(key.rpartition("_")[0])
    unit = known.unit if known else ""
    cells = [_cell(_map(sides.get(side)), unit, side == "gap") for side, _ in MODELS]
    return Figure(known.id if known else "", key, known.text if known else "no published definition", cells)


def _cell(side: Mapping[str, Any], unit: str, gap: bool) -> Shown:
    value = side.get("value")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return Shown("-", str(side.get("reason") or ""))
    text = words.number(value, "gap_depth" if gap else "", unit) if unit in ("fraction", "updates") else f"{value:.4g}"
    error = side.get("error")
    if isinstance(error, int | float) and unit == "fraction":
        text += f" \u00b1 {100 * error:.1f}"
    return Shown(text, "by construction, no evidence" if side.get("by_construction") else "")


def _compared(reference: Mapping[str, Any]) -> str:
    if not reference:
        return ""
    if not reference.get("compared"):
        return "The bytes were not compared with a run that never learnt the task."
    tensors, size = reference.get("tensors"), reference.get("bytes")
    extent = f"{tensors:,} tensors, {size:,} bytes" if isinstance(tensors, int) and isinstance(size, int) else ""
    if reference.get("equal"):
        return f"All bytes equal those of a run that never learnt the task ({extent})."
    return f"The bytes differ from those of a run that never learnt the task ({extent})."


def _differences(reference: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for entry in map(_map, _list(reference.get("differences"))):
        largest = entry.get("largest")
        shown = f"{largest:.3g}" if isinstance(largest, int | float) else str(entry.get("kind") or "-")
        rows.append((str(entry.get("name")), str(entry.get("elements")), shown))
    return rows


def _sentence(text: str) -> str:
    return text and f"{text[0].upper()}{text[1:]}."


def _map(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
