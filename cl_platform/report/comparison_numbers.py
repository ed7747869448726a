"""The numbers of a comparison: every metric over the seeds of every group, the best of each, and two CSV files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cl_platform.metrics.built_in import definition as published
from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.efficiency import EFFICIENCY_DEFINITIONS
from cl_platform.metrics.matrix import REASONS, Undefined
from cl_platform.metrics.seeds import OverSeeds, over_seeds
from cl_platform.report import words
from cl_platform.report.comparison_groups import Group, shown
from cl_platform.report.run_view import RunView

COLUMNS = (
    "acc", "aia", "forgetting", "bwt", "min_acc", "wc_acc", "gap_depth", "gap_transient", "gap_recovery_time",
    "seconds_total", "params_trainable",
)  # fmt: skip
"""Metrics of the table, in its order."""

NO_CONTEST = ("gap_transient",)
"""Metrics that name no best group: nothing is won back after no loss, but also where all stays lost."""

JOINT = "joint"
"""The strategy whose runs are the references of ``intransigence``."""
REFERENCE_MODES = ("scratch", "continue")
"""Modes of joint training that know the accuracy on task k of a training on tasks 0..k, the better reference first."""

_COSTS: dict[str, Definition] = {
    **{d.key: d for d in EFFICIENCY_DEFINITIONS},
    "seconds_total": Definition("6.6", "seconds_total", "Wall-clock time of the whole run.", "seconds", "down"),
}


@dataclass(frozen=True)
class Numbers:
    """Everything computed over seeds.

    Attributes:
        groups: in the order of the table.
        keys: all metrics, those of the table first.
        values: (label, key) -> over the seeds of that group.
        outcomes: (label, key) -> of each of its runs.
        best: key -> labels with the best mean; empty where fewer than two groups have a value in every run.
        notes: lines about references that were used or are missing.
    """

    groups: tuple[Group, ...]
    keys: tuple[str, ...]
    values: Mapping[tuple[str, str], OverSeeds]
    outcomes: Mapping[tuple[str, str], tuple[float | Undefined, ...]]
    best: Mapping[str, frozenset[str]]
    notes: tuple[str, ...] = field(default=())

    @property
    def columns(self) -> tuple[str, ...]:
        """Metrics of the table; ``intransigence`` only where joint training is among the groups."""
        if any(group.strategy == JOINT for group in self.groups):
            return (*COLUMNS[:4], "intransigence", *COLUMNS[4:])
        return COLUMNS


def gather(groups: Sequence[Group]) -> Numbers:
    """All metrics and costs of all groups over their seeds."""
    keys = _keys([run for group in groups for run in group.runs])
    references, notes = _references(groups)
    outcomes: dict[tuple[str, str], tuple[float | Undefined, ...]] = {}
    for group in groups:
        for key in keys:
            if key.startswith("intransigence"):
                space = key.removeprefix("intransigence").lstrip("_") or group.runs[0].primary
                outcomes[group.label, key] = _intransigence(group, space, references.get(group.label))
            else:
                outcomes[group.label, key] = tuple(outcome(run, key) for run in group.runs)
    values = {place: over_seeds(known) for place, known in outcomes.items()}
    best = {key: _best(key, groups, values) for key in keys}
    return Numbers(tuple(groups), keys, values, outcomes, best, tuple(notes))


def definition(key: str) -> Definition | None:
    """The definition of a metric or a cost, with or without its space's suffix."""
    name, _, space = key.rpartition("_")
    return _COSTS.get(key) or published(key) or (published(name) if space in words.SPACES else None)


def direction(key: str) -> str | None:
    """``up`` or ``down``, where larger or smaller values are better; ``None`` where neither is."""
    known = definition(key)
    return None if known is None or any(key.removesuffix(f"_{s}") in NO_CONTEST for s in words.SPACES) else known.better


def outcome(run: RunView, key: str) -> float | Undefined:
    """One run's value of a metric or a cost, or why it has none."""
    if key in _COSTS:
        value = run.cost.get(key)
        reason = "not_evaluated"
    else:
        entry = run.metrics.get(key)
        value = entry.get("value") if isinstance(entry, Mapping) else None
        reason = str(entry.get("reason")) if isinstance(entry, Mapping) else "not_evaluated"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return Undefined(reason if reason in REASONS else "not_evaluated")


def accuracy_after(run: RunView, position: int) -> float | None:
    """Mean accuracy over the tasks up to a position after training it; ``None`` where a cell was not evaluated."""
    if position >= len(run.matrix):
        return None
    kept = [j for j in range(position + 1) if run.task_ids[j] not in run.forgotten]
    cells = [run.matrix[position][j] for j in kept]
    known = [cell for cell in cells if cell is not None]
    return sum(known) / len(known) if known and len(known) == len(cells) else None


def comparison_csv(numbers: Numbers) -> str:
    """Text of ``comparison.csv``: one line for each group and metric; fractions, not percent.

    ``n`` counts the runs with a value, ``reason`` why the others have none and how many those are.
    """
    lines: list[list[Any]] = [["group", "metric", "id", "n", "mean", "sd", "low", "high", "reason"]]
    for group in numbers.groups:
        for key in numbers.keys:
            found, known = numbers.values[group.label, key], definition(key)
            why = "; ".join(f"{reason} ({count})" for reason, count in found.missing.items())
            statistics = [_cell(value) for value in (found.mean, found.sd, found.low, found.high)]
            lines.append([group.label, key, known.id if known else "", found.n, *statistics, why])
    return _csv(lines)


def runs_csv(numbers: Numbers) -> str:
    """Text of ``runs.csv``: one line for each run; an empty cell is a metric without a value."""
    settings = dict.fromkeys(
        key
        for group in numbers.groups
        for key in group.settings
        if len({shown(other.settings.get(key)) for other in numbers.groups}) > 1
    )
    facts = ("device", "torch", "git_commit")
    lines: list[list[Any]] = [["group", "run", "seed", *numbers.keys, *facts, *settings]]
    for group in numbers.groups:
        for index, run in enumerate(group.runs):
            known = [numbers.outcomes[group.label, key][index] for key in numbers.keys]
            cells = ["" if isinstance(value, Undefined) else _cell(value) for value in known]
            made_with = surroundings(run)
            made = [made_with[fact] for fact in facts]
            keys = [shown(group.settings.get(key)) for key in settings]
            lines.append([group.label, str(run.path), run.config.get("seed"), *cells, *made, *keys])
    return _csv(lines)


def surroundings(run: RunView) -> dict[str, str]:
    """Device, version of torch and commit of a run, empty where unknown."""
    versions = run.environment.get("versions")
    torch = versions.get("torch") if isinstance(versions, Mapping) else None
    found = {key: run.environment.get(key) for key in ("device", "git_commit")}
    return {key: str(value or "") for key, value in {**found, "torch": torch}.items()}


def _keys(runs: Sequence[RunView]) -> tuple[str, ...]:
    """The table's metrics, then every other single number in the order of the runs' files."""
    lists = {key for run in runs for key, entry in run.metrics.items() if _is_list(entry)}
    metrics = [key for run in runs for key, entry in run.metrics.items() if _is_entry(entry) and key not in lists]
    doubled = {f"{key}_{runs[0].primary}" for key in metrics}
    costs = [key for key in _COSTS if any(_is_number(run.cost.get(key)) for run in runs)]
    return tuple(dict.fromkeys([*COLUMNS, *(key for key in metrics if key not in doubled), "intransigence", *costs]))


def _references(groups: Sequence[Group]) -> tuple[dict[str, Group], list[str]]:
    """For each group the runs of joint training that its intransigence is measured against, and lines about that."""
    joint = [group for group in groups if group.strategy == JOINT]
    modes = {group.label: str(group.settings.get("strategy.joint.mode")) for group in joint}
    usable = [group for mode in REFERENCE_MODES for group in joint if modes[group.label] == mode]
    notes: list[str] = []
    if joint and not usable:
        notes.append(
            "intransigence (1.11) has no value: it needs joint training on the tasks up to each task, "
            "strategy.joint.mode=scratch, and the joint runs here trained once on everything"
        )
    chosen: dict[str, Group] = {}
    for group in groups:
        alike = [other for other in usable if _same_backbone(group, other)]
        if alike and group.strategy != JOINT:
            chosen[group.label] = alike[0]
    for label in dict.fromkeys(reference.label for reference in chosen.values()):
        runs = next(len(group.runs) for group in groups if group.label == label)
        notes.append(
            f"intransigence (1.11) is measured against the mean of {runs} run{'s' if runs > 1 else ''} of {label}; "
            "its band does not hold the deviation of the reference"
        )
    return chosen, notes


def _same_backbone(one: Group, other: Group) -> bool:
    parts = [{k: v for k, v in g.settings.items() if k.startswith("backbone.")} for g in (one, other)]
    return parts[0] == parts[1]


def _intransigence(group: Group, space: str, reference: Group | None) -> tuple[float | Undefined, ...]:
    """1.11 of each run: mean over tasks k of the references' mean accuracy on k minus the run's own, at its end."""
    if group.settings.get("strategy.joint.mode") == "once":
        return tuple(Undefined("joint_trains_once") for _ in group.runs)
    if reference is None or space != group.runs[0].primary:
        return tuple(Undefined("no_reference_run") for _ in group.runs)
    found: list[float | Undefined] = []
    for run in group.runs:
        kept = [k for k in range(len(run.matrix)) if run.task_ids[k] not in run.forgotten]
        own = [run.matrix[k][k] for k in kept]
        joint = [[other.matrix[k][k] if k < len(other.matrix) else None for other in reference.runs] for k in kept]
        if any(value is None for values in joint for value in values):
            found.append(Undefined("no_reference_run"))
        elif not kept or any(value is None for value in own):
            found.append(Undefined("not_evaluated"))
        else:
            means = [sum(value for value in values if value is not None) / len(values) for values in joint]
            gaps = [mean - value for mean, value in zip(means, own, strict=True) if value is not None]
            found.append(sum(gaps) / len(gaps))
    return tuple(found)


def _best(key: str, groups: Sequence[Group], values: Mapping[tuple[str, str], OverSeeds]) -> frozenset[str]:
    """Labels of the best mean. A group that lacks the value in a run does not compete: its mean is over the rest."""
    better = direction(key)
    if better is None:
        return frozenset()
    entering = {group.label: values[group.label, key] for group in groups}
    means = {label: v.mean for label, v in entering.items() if v.mean is not None and not v.missing}
    if len(means) < 2:
        return frozenset()
    best = max(means.values()) if better == "up" else min(means.values())
    winners = frozenset(label for label, mean in means.items() if mean == best)
    return winners if len(winners) < len(means) else frozenset()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "id" in entry and "value" in entry and "reason" in entry


def _is_list(entry: Any) -> bool:
    return _is_entry(entry) and isinstance(entry["value"], list)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: float | None) -> str:
    return "" if value is None else str(int(value)) if value == int(value) and abs(value) >= 1e4 else repr(value)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()
