"""The tables of a report as plain records: key numbers, metrics, tasks, switches, cost, surroundings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cl_platform.metrics.built_in import definition
from cl_platform.metrics.continual_log import Curves
from cl_platform.metrics.continual_results import continual_entries
from cl_platform.metrics.efficiency import EFFICIENCY_DEFINITIONS
from cl_platform.metrics.gap import GapPair, deepest
from cl_platform.report import words
from cl_platform.report.run_view import RunView


@dataclass(frozen=True)
class Shown:
    """A number as it is printed.

    Attributes:
        text: the value, ``-`` for none.
        why: why there is none, or what kind of value it is; else empty.
        several: whether it is a list.
    """

    text: str
    why: str = ""
    several: bool = False


@dataclass(frozen=True)
class Row:
    """One metric: its names, its definition, and its value in each prediction space."""

    key: str
    label: str
    id: str
    text: str
    better: str
    values: dict[str, Shown]


def entries(view: RunView) -> dict[str, Any]:
    """Entries of ``metrics.json``; of a run without it, those that the log of continual evaluation gives so far."""
    if view.metrics or view.log is None:
        return view.metrics
    found = continual_entries(view.log, [view.primary], window=view.gap_window, tolerance=view.gap_tolerance)
    suffix = f"_{view.primary}"
    return {**{key.removesuffix(suffix): entry for key, entry in found.items()}, **found}


def key_numbers(view: RunView, pairs: Sequence[GapPair]) -> list[Row]:
    """The numbers at the top, in the order of ``words.LABELS``."""
    known = entries(view)
    rows = []
    for key, label in words.LABELS.items():
        entry = known.get(key)
        shown = _shown(key, entry, spelled=True)
        if key == "gap_recovery_time" and entry is not None and entry.get("reason") == "censored":
            shown = Shown("not recovered", _open_gaps(pairs))
        if entry is None and not view.metrics:
            shown = Shown("-", "known when the run has finished")
        rows.append(_row(key, label, {view.primary: shown}))
    return rows


def metric_rows(view: RunView) -> tuple[list[str], list[Row]]:
    """The prediction spaces, the primary one first, and every metric with its value in each of them."""
    known = entries(view)
    spaces = [s for s in words.SPACES if any(_space_of(key, entry) == s for key, entry in known.items())]
    spaces.sort(key=lambda space: space != view.primary)
    names = {key.removesuffix(f"_{_space_of(key, entry)}"): None for key, entry in known.items() if _is_entry(entry)}
    rows = []
    for name in names:
        values = {space: _shown(name, known.get(f"{name}_{space}")) for space in spaces}
        said = next((str(known[key].get("text") or "") for key in known if key.startswith(f"{name}_")), "")
        rows.append(_row(name, name, values, said))
    return spaces, sorted(rows, key=lambda row: _number_of(row.id))


def per_task(view: RunView) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the metrics with a term for each task, and for each averaged task its facts and those terms."""
    known = entries(view)
    averaged = known.get("tasks")
    if not isinstance(averaged, list):
        return [], []
    wanted = ("la", "acc", "forgetting", "bwt", "min_acc", "wf_10")
    named = {key: known[key].get("per_task") for key in wanted if _is_entry(known.get(key))}
    columns = {key: terms for key, terms in named.items() if isinstance(terms, list) and len(terms) == len(averaged)}
    facts = {task.get("task_id"): task for task in _tasks(view)}
    rows = []
    for index, task_id in enumerate(averaged):
        fact = facts.get(task_id, {})
        terms = [words.number(terms[index], key) for key, terms in columns.items()]
        rows.append(
            {"task_id": task_id, "classes": class_names(view, fact.get("classes", ())), **_sizes(fact), "terms": terms}
        )
    return list(columns), rows


def class_names(view: RunView, ids: Iterable[int]) -> list[str]:
    """Names of classes as far as ``confusion.json`` has them, else their ids."""
    names: dict[int, str] = {}
    for record in view.confusion.get("after") or []:
        if isinstance(record, Mapping):
            names |= dict(zip(record.get("classes", ()), record.get("class_names", ()), strict=False))
    return [str(names.get(class_id, class_id)) for class_id in ids]


def recalls(view: RunView) -> list[tuple[str, str]]:
    """Name and recall of every class after the last task."""
    shares = _mapping(entries(view).get("acc_per_class")).get("per_class")
    if not isinstance(shares, Mapping):
        return []
    ids = [int(class_id) for class_id in shares]
    values = [words.number(value) for value in shares.values()]
    return list(zip(class_names(view, ids), values, strict=True))


def switch_rows(curves: Curves, pairs: Sequence[GapPair]) -> list[dict[str, Any]]:
    """For each switch the means over its old tasks, and its deepest gap beside its noise floor."""
    rows = []
    for k in sorted({pair.k for pair in pairs}):
        group = [pair for pair in pairs if pair.k == k]
        known = [pair for pair in group if pair.depth is not None]
        gaps = [pair for pair in known if pair.status != "no_gap"]
        deep = deepest(known)
        means = {
            name: _mean([getattr(pair, name) for pair in group])
            for name in ("depth", "transient", "residual", "boundary_drop")
        }
        recovered = sum(pair.status == "recovered" for pair in gaps)
        rows.append(
            {
                "task_id": curves.task_ids[k],
                "begin": curves.begins[k],
                "old": len(group),
                **{name: _points(value) for name, value in means.items()},
                "recovered": f"{recovered} of {len(gaps)}" if gaps else "no gap" if known else "not evaluated",
                "deepest": None if deep is None else pair_row(curves, deep),
            }
        )
    return rows


def pair_row(curves: Curves, pair: GapPair) -> dict[str, Any]:
    """One old task at one switch."""
    return {
        "switch": curves.task_ids[pair.k],
        "task_id": curves.task_ids[pair.j],
        "pre": words.number(pair.pre),
        "low": words.number(pair.low),
        "low_offset": "-" if pair.low_offset is None else str(pair.low_offset),
        "depth": _points(pair.depth),
        "noise_floor": _points(pair.noise_floor),
        "verdict": _verdict(pair),
        "transient": _points(pair.transient),
        "residual": _points(pair.residual),
        "boundary_drop": _points(pair.boundary_drop),
        "recovery": _recovery(pair),
    }


def cost_rows(view: RunView) -> list[tuple[str, str, str, Any]]:
    """(id, key, definition, value) of ``cost.json``; a list or a mapping stays what it is, with its numbers written."""
    defined = {d.key: d for d in EFFICIENCY_DEFINITIONS}
    order = list(defined)
    rows = []
    for key, value in view.cost.items():
        own = defined.get(key)
        unit = own.unit if own else "bytes" if key.endswith("bytes") else ""
        made = (own.id, own.text) if own else ("", _PLAIN_COSTS.get(key, ""))
        rows.append((made[0], key, made[1], _cost(value, unit)))
    return sorted(rows, key=lambda row: order.index(row[1]) if row[1] in order else len(order))


_PLAIN_COSTS = {
    "seconds_total": "From the start of the run to its end.",
    "updates": "Optimizer updates.",
    "images_trained": "Training images of the tasks, each epoch anew.",
}


def surroundings(view: RunView) -> list[tuple[str, str]]:
    """What the run was made with: data, backbone, machine, versions."""
    environment = view.environment
    data, backbone = _mapping(environment.get("dataset")), _mapping(environment.get("backbone"))
    versions = _mapping(environment.get("versions"))
    size, mean, std = (backbone.get(name) for name in ("input_size", "input_mean", "input_std"))
    facts = {
        "data": data.get("source"),
        "SHA-256 of the data": data.get("digest"),
        "images left out": data.get("skipped_images") or None,
        "backbone": backbone.get("tag"),
        "SHA-256 of its weights": backbone.get("weights_sha256"),
        "input": f"{size} px, mean {mean}, standard deviation {std}" if size and mean else size,
        "device": environment.get("device"),
        "platform": environment.get("platform"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": environment.get("git_commit"),
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _open_gaps(pairs: Sequence[GapPair]) -> str:
    gaps = [pair for pair in pairs if pair.status in ("recovered", "censored")]
    return f"{sum(pair.status == 'censored' for pair in gaps)} of {len(gaps)} gaps"


def _verdict(pair: GapPair) -> str:
    if pair.depth is None:
        return "not evaluated"
    if pair.depth == 0:
        return "did not fall"
    return "more than chance" if pair.depth_significant else "could be chance"


def _recovery(pair: GapPair) -> str:
    if pair.status == "recovered":
        after = f", after {pair.lower}" if pair.lower is not None and pair.lower + 1 != pair.recovery_time else ""
        return f"by update {pair.recovery_time}{after}"
    return {"no_gap": "no gap", "censored": f"not by update {pair.censored_at}"}.get(pair.status, "not evaluated")


def _shown(key: str, entry: Any, spelled: bool = False) -> Shown:
    if not _is_entry(entry):
        return Shown("-", words.reason(None))
    value, unit = entry.get("value"), str(entry.get("unit", "fraction"))
    if value is None:
        return Shown("-", words.reason(entry))
    if isinstance(value, list):
        last = value[-1] if value and isinstance(value[-1], list) else value
        text = ", ".join(words.number(item, key, unit).replace(" %", "") for item in last)
        return Shown(text, "after the last task" if last is not value else "by task end", several=True)
    return Shown(words.with_unit(value, key, unit) if spelled else words.number(value, key, unit))


def _row(key: str, label: str, values: dict[str, Shown], said: str = "") -> Row:
    """A metric's row; ``said`` is what an entry without a published definition says about itself."""
    known = definition(key)
    better = {"up": "higher is better", "down": "lower is better"}[known.better] if known else ""
    text = known.text if known else said or "no published definition"
    return Row(key, label, known.id if known else "", text, better, values)


def _space_of(key: str, entry: Any) -> str | None:
    """The space in the suffix of a key; ``None`` for a bare key."""
    space = entry.get("space") if _is_entry(entry) else None
    return str(space) if space is not None and key.endswith(f"_{space}") else None


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "id" in entry and "value" in entry


def _number_of(number: str) -> tuple[tuple[int, str], ...]:
    """Sorts 1.10 behind 1.9, and 3.7m behind 3.7; what has no number comes last."""
    parts = [(part.rstrip("abcdefghijklmnopqrstuvwxyz"), part) for part in number.split(".")]
    return tuple((int(digits) if digits.isdigit() else 10**6, part[len(digits) :]) for digits, part in parts)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _points(value: float | None) -> str:
    return words.number(value, "gap_depth")


def _cost(value: Any, unit: str) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _cost(item, unit) for name, item in value.items()}
    if isinstance(value, list):
        return [_cost(item, unit) for item in value]
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if unit == "bytes":
        return _bytes(value)
    if unit == "fraction":
        return words.number(value)
    if unit == "seconds":
        return f"{value:.2f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def _bytes(value: float) -> str:
    for name in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or name == "GiB":
            return f"{value:.0f} {name}" if name == "B" else f"{value:.1f} {name}"
        value /= 1024
    raise AssertionError


def _tasks(view: RunView) -> list[Mapping[str, Any]]:
    tasks = _mapping(view.environment.get("dataset")).get("tasks")
    return [task for task in tasks if isinstance(task, Mapping)] if isinstance(tasks, list) else []


def _sizes(fact: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(fact.get(name, "-")) for name in ("train", "test")}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
