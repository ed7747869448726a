"""Runs of one scenario side by side: numbers over seeds, overlaid curves, a page and two CSV files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from matplotlib.figure import Figure

from cl_platform.errors import UserError
from cl_platform.files import write_atomically
from cl_platform.report.comparison_charts import accuracy_after_tasks, forgetting_by_task, key_numbers
from cl_platform.report.comparison_curves import curves_of
from cl_platform.report.comparison_figures import looks, lost_after_switches, while_learning
from cl_platform.report.comparison_groups import Group, group_runs
from cl_platform.report.comparison_numbers import Numbers, comparison_csv, gather, runs_csv
from cl_platform.report.comparison_page import render
from cl_platform.report.comparison_runs import choose, scenario_name
from cl_platform.report.comparison_tables import advice
from cl_platform.report.drawing import png, settle, style, svg
from cl_platform.report.figures import Drawn

OVER_SEEDS = (
    "Lines are means over seeds, bands the 95 % band of the mean (t distribution); where a group has three seeds or "
    "fewer, thin lines are its runs."
)
CAPTIONS = {
    "key_numbers": "Means over seeds with their 95 % band; rings are the single runs. Bars end where values end.",
    "while_learning": f"{OVER_SEEDS} Above, the mean accuracy over the tasks seen, on the evaluation subsets; below, "
    "min-ACC: the lowest accuracy of every old task since its end, on average (2.2.2). Between evaluated updates of a "
    "task the line is interpolated; it is broken at every switch.",
    "lost_after_switches": f"{OVER_SEEDS} Above, how far old tasks are below their accuracy before the switch, on "
    "average. Below, for each switch, how deep they fell (3.1) and what of it came back before the next one (3.3): gap "
    "(ours).",
    "accuracy_after_tasks": "Mean accuracy over the tasks seen after each task, with the 95 % band over seeds; the "
    "last one is acc (1.1), their mean is aia (1.3). Points stand side by side to keep their bars apart.",
    "forgetting_by_task": "Best accuracy on a task before the last task minus the final one (1.5), with the 95 % band "
    "over seeds.",
}
"""Figures in the order of the page, and what to see in them."""


@dataclass(frozen=True)
class Comparison:
    """What was compared and where it stands.

    Attributes:
        folder: the output folder.
        page: path of ``comparison.html`` in it.
        scenario: name of the runs' scenario.
        numbers: everything over seeds.
        left_out: a line for every run that was named and is not among the groups.
        notes: lines that a reader has to know.
    """

    folder: Path
    page: Path
    scenario: str
    numbers: Numbers
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """Runs by configuration."""
        return self.numbers.groups


def compare(paths: Sequence[Path], output: Path | None = None, force: bool = False) -> Comparison:
    """Compare runs and write ``comparison.html``, ``comparison.csv``, ``runs.csv`` and ``figures/``.

    Args:
        paths: run folders; those that differ in nothing but their seed are averaged.
        output: folder to write into; ``comparison_<date>_<time>`` if not said.
        force: write into a folder that holds something already.

    Raises:
        UserError: a folder that is no run, runs of different scenarios, no finished run, or an output folder that
            holds something or cannot be written to.
    """
    folder = output or _new_folder()
    _check_output(folder, force)
    chosen = choose(paths)
    groups, repeated = group_runs(chosen.runs)
    numbers = gather(groups)
    scenario = scenario_name(chosen.runs[0])
    curves, without = curves_of(groups)
    look = looks([group.label for group in groups])
    figures: dict[str, Callable[[], Figure | None]] = {
        "key_numbers": lambda: key_numbers(numbers, look, scenario),
        "while_learning": lambda: while_learning(curves, look, scenario),
        "lost_after_switches": lambda: lost_after_switches(curves, look, scenario),
        "accuracy_after_tasks": lambda: accuracy_after_tasks(numbers, look, scenario),
        "forgetting_by_task": lambda: forgetting_by_task(numbers, look, scenario),
    }
    notes = (*chosen.notes, *numbers.notes, *advice(numbers), *without)
    left_out = (*chosen.left_out, *repeated)
    made = Comparison(folder, folder / "comparison.html", scenario, numbers, left_out, notes)
    try:
        _write(made, figures)
    except OSError as error:
        raise UserError(
            "output", folder, f"cannot be written to ({error.strerror})", "Choose another folder with --output FOLDER"
        ) from error
    return made


def _write(made: Comparison, figures: dict[str, Callable[[], Figure | None]]) -> None:
    """Everything is made before the first file is written."""
    files: dict[str, str | bytes] = {"comparison.csv": comparison_csv(made.numbers), "runs.csv": runs_csv(made.numbers)}
    drawn: list[tuple[Drawn, str]] = []
    with style():
        for name, draw in figures.items():
            figure = draw()
            if figure is None:
                continue
            settle(figure)
            text = svg(figure, name)
            files[f"figures/{name}.png"] = png(figure)
            files[f"figures/{name}.svg"] = text
            drawn.append((Drawn(name, CAPTIONS[name], figure), text))
    files["comparison.html"] = render(made.scenario, made.numbers, made.left_out, made.notes, drawn)
    (made.folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(made.folder / name, content)
    for name in CAPTIONS:  # left by an earlier comparison in this folder that had more to draw
        for ending in ("png", "svg"):
            if f"figures/{name}.{ending}" not in files:
                (made.folder / f"figures/{name}.{ending}").unlink(missing_ok=True)


def _new_folder() -> Path:
    name = datetime.now().strftime("comparison_%Y-%m-%d_%H%M%S")
    path, number = Path(name), 2
    while path.exists():
        path, number = Path(f"{name}_{number}"), number + 1
    return path


def _check_output(folder: Path, force: bool) -> None:
    if (folder / "config.yaml").exists():
        raise UserError("output", folder, "is a run folder", "Choose another folder with --output FOLDER")
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError("output", folder, "is a file", "Choose another folder with --output FOLDER")
        taken = folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise UserError("output", folder, f"cannot be read ({error.strerror})", "Choose another folder") from error
    if taken and not force:
        raise UserError(
            "output", folder, "holds something already", "Add --force to overwrite it, or choose another folder"
        )
