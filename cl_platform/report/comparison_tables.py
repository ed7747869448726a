"""A comparison's numbers as a person reads them: cells with half widths, headings, sentences, what groups differ in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cl_platform.metrics.seeds import OverSeeds
from cl_platform.report import words
from cl_platform.report.comparison_groups import Group, differences, shown
from cl_platform.report.comparison_numbers import Numbers, definition, direction, surroundings

HEADINGS = {
    "gap_depth": "gap", "gap_transient": "won back", "gap_recovery_time": "recovery", "seconds_total": "seconds",
    "params_trainable": "params",
}  # fmt: skip
"""Short headings of the table; the number of the definition stands below."""

ARROWS = {"up": "↑", "down": "↓"}


@dataclass(frozen=True)
class Cell:
    """A number over seeds as it is printed.

    Attributes:
        mean: the mean, ``-`` for none.
        half: half the width of its band behind a ``±``; empty without a band.
        best: whether it is the best mean of its column.
        share: ``2 of 3`` where a run has no value; else empty.
        why: why runs have none, in words; else empty.
    """

    mean: str
    half: str
    best: bool
    share: str
    why: str

    @property
    def text(self) -> str:
        """Mean and half width in one line."""
        return f"{self.mean} {self.half}".rstrip()


def cell(numbers: Numbers, label: str, key: str) -> Cell:
    """One cell of the table."""
    value = numbers.values[label, key]
    share = f"{value.n} of {value.runs}" if value.missing and value.n else ""
    reasons = [words.REASONS.get(reason, reason) for reason in value.missing]
    mean, sign, half = _written(value, key).partition(" ± ")
    return Cell(mean, f"± {half}" if sign else "", label in numbers.best[key], share, "; ".join(reasons))


def heading(key: str) -> str:
    """The short name of a column."""
    return HEADINGS.get(key, key)


def below(key: str) -> str:
    """What stands below it: the definition's number and which direction is good."""
    known = definition(key)
    return f"{known.id} {ARROWS.get(direction(key) or '', '')}".rstrip() if known else ""


def legend(numbers: Numbers) -> str:
    """How to read the table."""
    counts = sorted({len(group.runs) for group in numbers.groups})
    if counts == [1]:
        spread = "One seed each: without repetitions there is no error bar"
    else:
        spread = "± is half the width of the 95 % band of the mean over seeds"
        spread += "; a single run has none" if counts[0] == 1 else ""
    star = "; * the best mean" if any(numbers.best[key] for key in numbers.columns) else ""
    return (
        f"Accuracies in %, differences of accuracies in points. {spread}{star}. ↑ higher is better, ↓ lower is better."
    )


def absences(numbers: Numbers) -> list[str]:
    """A line for each reason of a group why cells of the table are empty or over fewer runs."""
    lines = []
    for group in numbers.groups:
        found: dict[tuple[str, int], list[str]] = {}
        for key in numbers.columns:
            value = numbers.values[group.label, key]
            for reason, count in value.missing.items():
                found.setdefault((reason, count), []).append(key)
        for (reason, count), keys in found.items():
            runs = "" if count == len(group.runs) else f" in {count} of {len(group.runs)} runs"
            lines.append(f"{group.label}: no {', '.join(keys)}{runs}: {words.REASONS.get(reason, reason)}")
    return lines


def advice(numbers: Numbers) -> list[str]:
    """What to keep in mind about these groups: few seeds, other machines, other settings."""
    lines = []
    two = [group.label for group in numbers.groups if len(group.runs) == 2]
    if two:
        lines.append(f"Two seeds give very wide bands ({', '.join(two)}): three or more say much more")
    unlike = {
        key: values
        for key, values in differences(numbers.groups)
        if key != "optimizer" and not key.startswith("optimizer.")
    }
    evaluation = [key for key in unlike if key.startswith("evaluation.")]
    if evaluation:
        lines.append(
            "Groups were evaluated in different ways (" + ", ".join(evaluation) + "): min_acc, wc_acc and the gaps are "
            "lower or deeper where more updates were looked at"
        )
    other = [key for key in unlike if key not in evaluation]
    if other:
        lines.append("Beside their strategies, groups differ in " + ", ".join(other))
    devices = sorted({surroundings(run)["device"] or "unknown" for group in numbers.groups for run in group.runs})
    if len(devices) > 1:
        lines.append("Seconds are of different machines: " + ", ".join(devices))
    return lines


def ranking(numbers: Numbers) -> list[str]:
    """The main findings as sentences; about order only where every group has the value in every run."""
    said = []
    for key, what in (("acc", "the highest final average accuracy"), ("forgetting", "the least forgetting")):
        known = definition(key)
        means = {g.label: numbers.values[g.label, key] for g in numbers.groups}
        entering = {label: v for label, v in means.items() if v.mean is not None and not v.missing}
        if len(entering) < 2 or not numbers.best[key] or known is None:
            continue
        order = sorted(entering, key=lambda name: entering[name].mean or 0.0, reverse=known.better == "up")
        first, second = entering[order[0]], entering[order[1]]
        unit = "\u00a0points" if key in words.DIFFERENCES else "\u00a0%"
        best, next_best = (_written(value, key).replace(" ", "\u00a0") + unit for value in (first, second))
        if first.mean == second.mean:
            alike = [label for label in order if entering[label].mean == first.mean]
            said.append(f"{', '.join(alike[:-1])} and {alike[-1]} share {what}.")
            continue
        said.append(f"{order[0]} has {what}, {best}, then {order[1]} with {next_best}{_apart(first, second)}.")
    return said


def group_rows(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Key and each group's value, for all keys in which groups differ, the strategies' own among them."""
    own = dict.fromkeys(key for group in groups for key in group.settings if key.startswith("strategy."))
    rows = [(key, [shown(group.settings.get(key)) for group in groups]) for key in own]
    return [*((key, values) for key, values in rows if len(set(values)) > 1), *differences(groups)]


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many characters; a word that is too long is broken behind a sign where it has one."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for piece in re.findall(r"[^._=,+/-]*[._=,+/-]?", word):
            if len(lines[-1]) + len(piece) > width and lines[-1]:
                lines.append("")
            lines[-1] += piece
            while len(lines[-1]) > width:
                lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return lines


def short_count(value: float) -> str:
    """A count with three digits and a letter, such as ``2.71M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _apart(one: OverSeeds, other: OverSeeds) -> str:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return ""
    if one.low > other.high or other.low > one.high:
        return "; their bands do not overlap"
    return "; their bands overlap, so more seeds may turn the order"


def _written(value: OverSeeds, key: str) -> str:
    known = definition(key)
    unit = known.unit if known else ""
    if value.mean is None:
        return "-"
    if unit == "parameters":
        return short_count(value.mean) + (f" ± {short_count(value.half)}" if value.half else "")
    scale = 100.0 if unit == "fraction" else 1.0
    mean = scale * value.mean
    text = f"{0.0 if abs(mean) < 0.05 else mean:.1f}"
    return text if value.half is None else f"{text} ± {scale * value.half:.1f}"
