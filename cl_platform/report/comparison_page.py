"""``comparison.html``: one file in the style of a run's report, with everything a user named escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from cl_platform.report import comparison_tables as tables
from cl_platform.report import words
from cl_platform.report.comparison_numbers import Numbers, definition, surroundings
from cl_platform.report.drawing import embedded
from cl_platform.report.figures import Drawn
from cl_platform.report.html import TEMPLATES


def render(
    scenario: str,
    numbers: Numbers,
    left_out: Sequence[str],
    notes: Sequence[str],
    drawn: Sequence[tuple[Drawn, str]],
) -> str:
    """The page.

    Args:
        scenario: its name.
        numbers: what is compared.
        left_out: lines about runs that are not.
        notes: lines that a reader has to know.
        drawn: figures with their SVG.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["breakable"] = _breakable
    css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    figures = {one.name: _element(one, text, scenario) for one, text in drawn}
    return environment.get_template("comparison.html.j2").render(
        css=css, figures=figures, left_out=left_out, notes=notes, **_content(scenario, numbers)
    )


def _breakable(text: object) -> Markup:
    """A text that may be broken behind signs; without them a long key would be broken anywhere."""
    return Markup("<wbr>").join(escape(piece) for piece in re.findall(r"[^._=,+/]+[._=,+/]*|[._=,+/]+", str(text)))


def _content(scenario: str, numbers: Numbers) -> dict[str, Any]:
    groups = numbers.groups
    runs = sum(len(group.runs) for group in groups)
    first = groups[0].runs[0]
    setting = {"cil": "class-incremental", "til": "task-incremental", "dil": "domain-incremental"}[first.primary]
    tasks = len(first.task_ids)
    return {
        "scenario": scenario,
        "facts": [
            f"{len(groups)} configuration{'s' if len(groups) > 1 else ''}",
            f"{runs} run{'s' if runs > 1 else ''}",
            setting,
            f"{tasks} task{'s' if tasks != 1 else ''}",
        ],
        "reading": tables.ranking(numbers),
        "columns": [(tables.heading(key), tables.below(key), key) for key in numbers.columns],
        "rows": [
            (group.label, len(group.runs), [tables.cell(numbers, group.label, key) for key in numbers.columns])
            for group in groups
        ],
        "legend": tables.legend(numbers),
        "absences": tables.absences(numbers),
        "space": f"Prediction space {first.primary}, {words.SPACES[first.primary]}.",
        "definitions": [(known.id, key, known.text) for key in numbers.columns if (known := definition(key))],
        "labels": [group.label for group in groups],
        "differing": tables.group_rows(groups),
        "runs": _runs(numbers),
    }


def _runs(numbers: Numbers) -> list[dict[str, str]]:
    rows = []
    for group in numbers.groups:
        for run in group.runs:
            made = surroundings(run)
            acc, seconds = run.metrics.get("acc") or {}, run.cost.get("seconds_total")
            rows.append(
                {
                    "group": group.label,
                    "seed": str(run.config.get("seed")),
                    "acc": words.number(acc.get("value")),
                    "seconds": f"{seconds:.1f}" if isinstance(seconds, int | float) else "-",
                    "device": made["device"] or "-",
                    "torch": made["torch"] or "-",
                    "commit": made["git_commit"][:12] or "-",
                    "path": str(run.path),
                }
            )
    return rows


def _element(drawn: Drawn, text: str, scenario: str) -> Markup:
    title = drawn.name.replace("_", " ")
    picture = Markup(embedded(text, drawn.name, f"{title} on {scenario}. {drawn.caption}"))  # escaped in there
    return Markup('<figure id="figure-{}"><div class="scroll" tabindex="0" role="group" aria-label="{}">{}</div>'
                  "<figcaption>{}</figcaption></figure>").format(drawn.name, title, picture, drawn.caption)  # fmt: skip
