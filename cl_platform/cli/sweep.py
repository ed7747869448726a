"""Several runs from one command: which ones an experiment stands for, and the table at their end."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform.cli.compose import config_folder
from cl_platform.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from cl_platform.run import RunResult

ASIDE = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i")
DESK = "CL_PLATFORM_SWEEP"
"""Environment variable with the folder in which the runs of a sweep, maybe in other processes, leave their outcome."""

NUMBERS = (("acc", "accuracy"), ("forgetting", "forgetting"))
"""Metrics of the closing table, and their names."""


def with_experiment(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the values that a chosen experiment runs through, such as all strategies.

    A key that the user gave a value keeps that one.

    Raises:
        UserError: one that sweeps is itself one of several.
    """
    words = list(arguments)
    chosen = next((w.partition("=")[2] for w in reversed(words) if w.startswith("experiment=")), "")
    if not chosen or any(word.partition("=")[0] in ASIDE for word in words):
        return words
    several = [name for name in chosen.split(",") if _swept(name)]
    if several and chosen != several[0]:
        raise UserError(
            "experiment", chosen, f"{several[0]} is a sweep of its own", f"Run experiment={several[0]} alone"
        )
    swept = _swept(chosen)
    given = {word.partition("=")[0] for word in words}
    added = [f"{key}={','.join(_element(v) for v in values)}" for key, values in swept.items() if key not in given]
    many = [] if "-m" in words or "--multirun" in words or not added else ["-m"]
    return [*many, *words, *added]


def _swept(name: str) -> Mapping[str, Sequence[Any]]:
    import yaml

    file = config_folder() / "experiment" / f"{name}.yaml"
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):  # what cannot be read is refused where it is composed
        return {}
    swept = content.get("sweep") if isinstance(content, dict) else None
    return swept if isinstance(swept, dict) else {}


def _element(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Outcome:
    """How one run of a sweep ended.

    Attributes:
        words: the run's own ``KEY=VALUE``.
        numbers: metrics by key; ``None`` where one is undefined.
        seconds: wall time of the run.
        failure: the line that says why there are no numbers.
        code: what a process that made this run alone would have ended with.
    """

    words: tuple[str, ...]
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str | None = None
    code: int = 0

    def leave(self, number: int) -> None:
        """Lay it where the process that started the sweep looks for it."""
        (Path(os.environ[DESK]) / f"{number:06d}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def of(cls, words: Sequence[str], result: RunResult) -> Outcome:
        """What the table needs of a finished run; the learner is let go."""
        numbers = {key: result.metrics[key]["value"] for key, _ in NUMBERS}
        return cls(tuple(words), numbers, result.cost["seconds_total"])

    @property
    def line(self) -> str:
        """The run in one line."""
        name = " ".join(word for word in self.words if not word.startswith("experiment="))
        if self.failure is not None:
            return f"{name}: {self.failure}"
        shown = ", ".join(f"{title} {_percent([self.numbers[key]])}" for key, title in NUMBERS)
        return f"{name}: {shown}, {self.seconds:.1f} s"


def outcomes_on(desk: Path) -> list[Outcome]:
    """All outcomes that were left, in the order of the runs."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(desk.glob("*.json"))]
    return [Outcome(**{**fields, "words": tuple(fields["words"])}) for fields in found]


def closing_table(outcomes: Sequence[Outcome]) -> Table:
    """One row per setting that was tried, mean and standard deviation over its seeds, columns per scenario."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    values = [dict(word.split("=", 1) for word in outcome.words if "=" in word) for outcome in outcomes]
    varied = [k for k in dict.fromkeys(k for v in values for k in v) if len({v.get(k) for v in values}) > 1]
    scenarios = list(dict.fromkeys(v.get("scenario", "") for v in values)) if "scenario" in varied else [""]
    told_apart = [key for key in varied if key not in ("scenario", "seed")]
    rows: dict[str, list[int]] = {}
    for index, own in enumerate(values):
        rows.setdefault(_label(own, told_apart), []).append(index)

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, title="Sweep", title_justify="left")
    table.add_column(" ".join(told_apart), overflow="fold")
    for scenario in scenarios:
        table.add_column(scenario or "accuracy / forgetting", justify="right", overflow="fold")
    table.add_column("seconds", justify="right")
    for label, indices in rows.items():
        cells = []
        for scenario in scenarios:
            here = [outcomes[i] for i in indices if len(scenarios) == 1 or values[i].get("scenario") == scenario]
            cells.append(_cell(here))
        table.add_row(Text(label or "all"), *cells, f"{sum(outcomes[i].seconds for i in indices):.0f}")
    return table


def _label(own: Mapping[str, str], keys: Iterable[str]) -> str:
    shown = [own.get(key, "") if key == "strategy" else f"{key}={own.get(key, '')}" for key in keys]
    return " ".join(part for part in shown if part)


def _cell(outcomes: Sequence[Outcome]) -> str:
    if any(outcome.failure is not None for outcome in outcomes):
        return "failed"
    return " / ".join(_percent([outcome.numbers[key] for outcome in outcomes]) for key, _ in NUMBERS)


def _percent(values: Sequence[float | None]) -> str:
    known = [100 * value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"
