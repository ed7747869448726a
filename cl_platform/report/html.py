"""``report.html``: one file that opens anywhere, without network, with everything a user named escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from cl_platform.errors import UserError
from cl_platform.files import write_atomically
from cl_platform.metrics.continual_results import coverage
from cl_platform.metrics.gap import GapPair
from cl_platform.report import tables, words
from cl_platform.report.drawing import embedded, png, settle, style, svg
from cl_platform.report.figures import FIGURES, Drawn, draw_all
from cl_platform.report.forgetting import MODELS, forgotten_tasks
from cl_platform.report.run_view import RunView, read_run

TEMPLATES = Path(__file__).parent / "templates"
MOST_BAD_ROWS = 100
"""Bad rows that are listed; the rest is counted."""
MOST_PAIRS = 1000
"""Rows of the table of all gaps; beyond it, it holds the deepest."""


def write_report(path: Path) -> Path:
    """Write ``report.html`` and ``figures/*.png`` and ``*.svg`` into a run folder; the same files for the same folder.

    Args:
        path: the run folder.

    Returns:
        Path of the page.

    Raises:
        UserError: no run folder, a damaged file in it, or a folder that cannot be written to.
    """
    view = read_run(path)
    target = path / "report.html"
    try:
        inline = _write_figures(view, path / "figures")
        write_atomically(target, render(view, inline))
    except OSError as error:
        raise UserError(
            "run", path, f"cannot be written to ({error.strerror})", "Check its permissions and the disk's free space"
        ) from error
    return target


def render(view: RunView, figures: Mapping[str, Markup]) -> str:
    """The page.

    Args:
        view: the run.
        figures: name -> element with the figure; those of a run that has no such figure are missing.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return environment.get_template("report.html.j2").render(css=css, figures=figures, **_content(view))


def _write_figures(view: RunView, folder: Path) -> dict[str, Markup]:
    folder.mkdir(exist_ok=True)
    inline = {}
    with style():
        for drawn in draw_all(view):
            settle(drawn.figure)
            text = svg(drawn.figure, drawn.name)
            write_atomically(folder / f"{drawn.name}.png", png(drawn.figure))
            write_atomically(folder / f"{drawn.name}.svg", text)
            inline[drawn.name] = _element(drawn, text, view.name)
    for name in FIGURES.keys() - inline.keys():  # left by an earlier report on a folder that held more
        for ending in ("png", "svg"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    return inline


def _element(drawn: Drawn, text: str, run: str) -> Markup:
    title = drawn.name.replace("_", " ")
    picture = Markup(embedded(text, drawn.name, f"{title} of {run}. {drawn.caption}"))  # escaped in there
    return Markup('<figure id="figure-{}"><div class="scroll" tabindex="0" role="group" aria-label="{}">{}</div>'
                  "<figcaption>{}</figcaption></figure>").format(drawn.name, title, picture, drawn.caption)  # fmt: skip


def _content(view: RunView) -> dict[str, Any]:
    curves, pairs = view.curves(), view.pairs()
    spaces, metrics = tables.metric_rows(view)
    columns, tasks = tables.per_task(view)
    bad = [str(row) for row in view.log.bad_rows] if view.log is not None else []
    return {
        "view": view,
        "strategy": view.name.partition(" on ")[0],
        "scenario": view.name.partition(" on ")[2].rpartition(", seed ")[0],
        "facts": _facts(view),
        "unfinished": _unfinished(view),
        "reading": _reading(view, pairs),
        "cards": tables.key_numbers(view, pairs),
        "looked": _looked(view),
        "no_curves": _no_curves(view),
        "no_gaps": _no_gaps(view, pairs),
        "spaces": spaces,
        "space_words": words.SPACES,
        "metrics": metrics,
        "task_columns": columns,
        "tasks": tasks,
        "switches": tables.switch_rows(curves, pairs) if curves is not None else [],
        "pairs": [tables.pair_row(curves, pair) for pair in _deepest_pairs(pairs)] if curves is not None else [],
        "pair_count": len(pairs),
        "images": _images(view),
        "diagnostics": [row for row in metrics if row.id.startswith("5.")],
        "recalls": tables.recalls(view),
        "strategy_facts": _written(view.metrics.get("strategy") or {}),
        "cost": tables.cost_rows(view),
        "forgetting": forgotten_tasks(view.path),
        "models": [name for _, name in MODELS],
        "surroundings": tables.surroundings(view),
        "bad_rows": bad[:MOST_BAD_ROWS],
        "bad_count": len(bad),
        "config": yaml.safe_dump(view.config, sort_keys=False, allow_unicode=True),
    }


def _deepest_pairs(pairs: Sequence[GapPair]) -> list[GapPair]:
    """At most ``MOST_PAIRS`` of them, in their order."""
    ranked = sorted(pairs, key=lambda pair: (-(pair.depth or 0.0), pair.k, pair.j))[:MOST_PAIRS]
    return sorted(ranked, key=lambda pair: (pair.k, pair.j))


def _facts(view: RunView) -> list[str]:
    setting = {"cil": "class-incremental", "til": "task-incremental", "dil": "domain-incremental"}[view.primary]
    backbone = view.environment.get("backbone")
    tag = backbone.get("tag") if isinstance(backbone, Mapping) else None
    count = len(view.task_ids)
    facts = [f"seed {view.config.get('seed', 'unknown')}", setting, f"{count} task{'s' if count != 1 else ''}"]
    return [*facts, *([f"backbone {tag}"] if tag else [])]


def _unfinished(view: RunView) -> str:
    if view.metrics:
        return ""
    return (
        f"This run has not finished: {len(view.matrix)} of {len(view.task_ids)} tasks have ended. "
        "The report shows what it has written so far."
    )


def _reading(view: RunView, pairs: Sequence[GapPair]) -> list[str]:
    """The main numbers as sentences."""
    known = tables.entries(view)

    def value(key: str) -> Any:
        entry = known.get(key)
        return entry.get("value") if isinstance(entry, Mapping) else None

    said = []
    acc, la, depth, back = value("acc"), value("la"), value("gap_depth"), value("gap_transient")
    if acc is not None:
        learnt = f"; right after learning it, it was {words.number(la)}" if la is not None else ""
        said.append(f"After the last task, {words.number(acc)} of a task's test images are answered right{learnt}.")
    if depth is not None and back is not None:
        fell, won = words.with_unit(depth, "gap_depth", "fraction"), words.number(back, "gap_transient")
        said.append(
            f"When a new task started, the accuracy on an old task fell by {fell} on average, of which {won} came back "
            "before the next task."
        )
    gaps = [pair for pair in pairs if pair.depth_significant is not None and pair.depth]
    if gaps:
        sure = sum(bool(pair.depth_significant) for pair in gaps)
        said.append(f"{sure} of {len(gaps)} falls are deeper than chance alone would make them.")
    return said


def _looked(view: RunView) -> str:
    """How much was evaluated, in a sentence; empty without a log."""
    if view.log is None or view.no_switches is not None:
        return ""
    given = view.metrics.get("continual")
    facts: dict[str, Any] = {**coverage(view.log, view.primary), **(given if isinstance(given, Mapping) else {})}
    share = facts.get("coverage")
    said = f"Evaluated after {facts.get('evaluations')} of {facts.get('updates')} updates"
    said += f" ({words.number(share)} of those after the first task)" if share is not None else ""
    said += f", grid {facts['grid']}" if facts.get("grid") else ""
    said += f", on {facts['images_per_task']} images of each task" if facts.get("images_per_task") else ""
    said += f", for {words.number(facts['overhead'])} of the training's work" if facts.get("overhead") else ""
    return said + ". Extremes are those of the evaluated updates: looking more often can only find lower ones."


def _no_curves(view: RunView) -> str:
    """Why there are no stability curves; empty if there are."""
    if view.no_switches is not None:
        return f"No curves over tasks: {words.REASONS[view.no_switches]}."
    if view.log is None:
        return (
            "No stability curves: the run folder holds no evaluations in continual_eval.csv. What happened to old "
            "tasks between the task ends is not known. Run with evaluation=adaptive to see it."
        )
    if view.curves() is None:
        return f"No stability curves: continual_eval.csv holds nothing in the prediction space {view.primary}."
    return ""


def _no_gaps(view: RunView, pairs: Sequence[GapPair]) -> str:
    """Why there is no gap to show; empty if there is."""
    if _no_curves(view):
        return "No gaps: there are no curves to see them in."
    if not pairs:
        return f"No gaps: a gap {words.REASONS['needs_two_tasks']}."
    if all(pair.depth is None for pair in pairs):
        return f"No gaps: {words.REASONS['not_evaluated']}."
    return ""


def _images(view: RunView) -> str:
    totals = sorted({row.total for row in view.log.rows}) if view.log is not None else []
    return "" if not totals else f"{totals[0]}" if len(totals) == 1 else f"{totals[0]} to {totals[-1]}"


def _written(value: Any) -> Any:
    """Facts of a strategy with short numbers."""
    if isinstance(value, Mapping):
        return {str(name): _written(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_written(item) for item in value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
