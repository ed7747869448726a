"""What a report calls things: metrics, reasons, directions, and how a number is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SPACES = {
    "cil": "class-incremental: answered among all classes seen so far",
    "til": "task-incremental: answered among the classes of the image's own task",
    "dil": "domain-incremental: one set of classes for all tasks",
    "all": "answered among every class of the stream",
}
"""Prediction spaces in words."""

REASONS = {
    "needs_two_tasks": "needs at least two tasks",
    "not_evaluated": "what it needs was not evaluated",
    "empty": "there was nothing to compute it from",
    "space_excludes_future_classes": "classes of later tasks are no possible answers before they are learnt",
    "no_baseline": "needs the accuracy of the untrained model, which was not evaluated",
    "no_reference_run": "needs a reference run, such as joint training",
    "segment_shorter_than_beta": "a task has fewer updates than it looks at",
    "incomplete_evaluation": "the last evaluation misses a task",
    "no_gap": "no old task fell",
    "censored": "fewer than half of the gaps recovered while they were watched",
    "zero_norm": "a gradient is zero, so there is no angle",
    "zero_variance": "the values do not vary",
    "no_value": "the plug-in gives it no value here",
    "failed": "the plug-in that computes it failed, see run.log",
    "too_few_samples": "too few images",
    "no_counter": "this machine has no counter for it",
    "not_permitted": "this machine does not let it be read",
    "evaluation_off": "continual evaluation was off",
    "joint_trains_once": "all tasks were trained on together, so there is only the end",
    "starts_afresh": "the model starts afresh at every task, so curves over tasks mean nothing",
    "tasks_share_classes": "tasks share their classes, so an answer does not say which task it took",
}
"""Why a metric has no value, in words; the keys are the closed set of ``metrics.json``."""

LABELS = {
    "acc": "final average accuracy",
    "aia": "average incremental accuracy",
    "forgetting": "forgetting",
    "bwt": "backward transfer",
    "min_acc": "lowest accuracy (min\u2011ACC)",
    "wc_acc": "worst case (WC\u2011ACC)",
    "gap_depth": "gap depth",
    "gap_transient": "of the gap, won back",
    "gap_recovery_time": "recovery time",
}
"""The key numbers, in the order in which they are shown."""

DIFFERENCES = frozenset(
    {
        "forgetting", "forgetting_after", "forgetting_clipped", "forgetting_step", "bwt", "bwt_all", "bwt_plus",
        "cumulative_forgetting", "intransigence", "fwt_init", "fwt_chance", "wf_10", "wf_100", "wp_10", "wp_100",
        "gap_depth", "gap_depth_max", "gap_residual", "gap_transient", "gap_gain", "gap_area_mean",
        "gap_boundary_drop",
    }
)  # fmt: skip
"""Metrics that are differences of accuracies, written in points."""


def reason(entry: Mapping[str, Any] | None) -> str:
    """Why an entry has no value, as part of a sentence."""
    if entry is None:
        return "not in this run's metrics.json"
    given = str(entry.get("reason"))
    return REASONS.get(given, given)


def number(value: object, key: str = "", unit: str = "fraction") -> str:
    """A metric's value as a person reads it: percent, points, updates; ``-`` for none."""
    if value is None:
        return "-"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if unit == "updates":
        return f"{value:g}" if value == int(value) else f"{value:.1f}"
    if unit != "fraction":
        return f"{value:.4g}"
    return f"{_signed_zero(100 * value):.1f}{'' if key in DIFFERENCES else ' %'}"


def with_unit(value: object, key: str, unit: str) -> str:
    """As :func:`number`, with the unit spelled out."""
    if value is None:
        return "-"
    if unit == "updates":
        return f"{number(value, key, unit)} updates"
    return f"{number(value, key, unit)}{' points' if key in DIFFERENCES and unit == 'fraction' else ''}"


def _signed_zero(value: float) -> float:
    """No ``-0.0``."""
    return 0.0 if abs(value) < 0.05 else value
