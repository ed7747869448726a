"""A run folder as a report sees it: every file parsed, what is missing empty, what is damaged named."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cl_platform.errors import UserError
from cl_platform.metrics.continual_log import HEADER, ContinualLog, Curves, parse
from cl_platform.metrics.gap import GapPair, gap_pairs

SPACE_OF_SETTING = {"class": "cil", "domain": "dil", "task": "til"}
"""Setting of a scenario -> its own prediction space."""
WITHOUT_SWITCHES = ("joint_trains_once", "starts_afresh")
"""Reasons for which a run has no switch from task to task, so that gaps and curves over tasks mean nothing."""


@dataclass(frozen=True)
class RunView:
    """Everything a report needs from a run folder.

    Attributes:
        path: the folder.
        metrics: content of ``metrics.json``, empty while the run is going on.
        cost: content of ``cost.json``, or empty.
        environment: content of ``environment.json``, or empty.
        config: content of ``config.yaml``.
        log: what ``continual_eval.csv`` holds; ``None`` without the file or without a line below its header.
        primary: the scenario's own prediction space: ``cil``, ``dil`` or ``til``.
        task_ids: id of the task at each position of the stream, as far as known.
        matrix: accuracy ``[i][j]`` in [0, 1] on position j after position i; ``None`` where not evaluated.
        confusion: content of ``confusion.json``, or empty.
        name: one line about the run, such as ``finetune on rotated_digits, seed 0``.
    """

    path: Path
    metrics: dict[str, Any]
    cost: dict[str, Any]
    environment: dict[str, Any]
    config: dict[str, Any]
    log: ContinualLog | None
    primary: str
    task_ids: tuple[int, ...]
    matrix: list[list[float | None]]
    confusion: dict[str, Any]
    name: str

    @property
    def forgotten(self) -> frozenset[int]:
        """Ids of trained tasks that no average is over, because they were forgotten on request."""
        averaged = self.metrics.get("tasks")
        trained = self.task_ids[: len(self.matrix)]
        return frozenset(trained) - frozenset(averaged) if averaged is not None else frozenset()

    @property
    def no_switches(self) -> str | None:
        """Why the run has no switches between tasks, one of ``WITHOUT_SWITCHES``; ``None`` for a usual run."""
        entry = self.metrics.get("gap_depth")
        reason = entry.get("reason") if isinstance(entry, Mapping) else None
        return reason if reason in WITHOUT_SWITCHES else None

    @property
    def gap_window(self) -> int | None:
        """Updates after a switch in which a gap is looked for; ``None`` for the whole task."""
        value = _group(self.config, "evaluation").get("gap_window")
        return value if isinstance(value, int) and value >= 1 else None

    @property
    def gap_tolerance(self) -> float:
        """How far below the old accuracy counts as recovered, in [0, 1]."""
        value = _group(self.config, "evaluation").get("gap_tolerance")
        return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else 0.02

    def curves(self, space: str | None = None) -> Curves | None:
        """The log in one prediction space, the primary one if not said; ``None`` if it holds nothing of that space.

        Raises:
            ValueError: unknown space.
        """
        if self.log is None:
            return None
        curves = Curves.of(self.log, space or self.primary, self.forgotten)
        return curves if curves.begun else None

    def pairs(self) -> list[GapPair]:
        """Every switch and old task in the primary space; empty without a log or in a run without switches."""
        curves = self.curves()
        if curves is None or self.no_switches is not None:
            return []
        return gap_pairs(curves, self.gap_window, self.gap_tolerance)


def read_run(path: Path) -> RunView:
    """Read a run folder; also one that is being written to.

    Args:
        path: a folder with ``config.yaml``; any other file may be missing.

    Raises:
        UserError: no folder, no run folder, or a file that cannot be understood.
    """
    if not path.is_dir():
        raise UserError("run", path, "is not a folder", "Name the folder of a run, the one that holds config.yaml")
    config = _read_config(path)
    environment = _read_json(path, "environment.json")
    metrics = _read_json(path, "metrics.json")
    ids, matrix = _read_matrix(path)
    ids = ids or _ids_of(environment)
    log = _read_log(path, ids or None)
    return RunView(
        path=path,
        metrics=metrics,
        cost=_read_json(path, "cost.json"),
        environment=environment,
        config=config,
        log=log,
        primary=_primary(metrics, environment, config),
        task_ids=ids or (log.task_ids if log is not None else ()),
        matrix=matrix,
        confusion=_read_json(path, "confusion.json"),
        name=_name(config),
    )


def _read_config(path: Path) -> dict[str, Any]:
    text = _text(path, "config.yaml")
    if text is None:
        inside = [p.parent for p in path.glob("*/config.yaml")] or [p.parent for p in path.glob("*/*/*/config.yaml")]
        newest = max(inside, key=lambda folder: (folder.stat().st_mtime, folder.name), default=None)
        hint = f"Its newest run is {newest}" if newest else "Name the folder that a run printed as its run folder"
        raise UserError("run", path, "holds no config.yaml, so it is no run folder", hint)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _damaged(path, "config.yaml", str(error)) from error
    if not isinstance(config, dict):
        raise _damaged(path, "config.yaml", "no mapping")
    return config


def _read_json(path: Path, name: str) -> dict[str, Any]:
    text = _text(path, name)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _damaged(path, name, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, name, "no JSON object")
    return content


def _read_matrix(path: Path) -> tuple[tuple[int, ...], list[list[float | None]]]:
    """Task ids by position and the rows after each task; the row of the untrained model is left out."""
    text = _text(path, "accuracy_matrix.csv")
    if not text or not text.strip():
        return (), []
    header, *lines = text.splitlines()
    try:
        ids = tuple(int(column.removeprefix("task_")) for column in header.split(",")[1:])
        rows = [line.split(",") for line in lines if line and not line.startswith("init,")]
        matrix = [[_number(cell) for cell in row[1:]] for row in rows]
    except ValueError as error:
        raise _damaged(path, "accuracy_matrix.csv", str(error)) from error
    if any(len(row) != len(ids) for row in matrix):
        raise _damaged(path, "accuracy_matrix.csv", "rows of different lengths")
    return ids, matrix


def _read_log(path: Path, ids: tuple[int, ...] | None) -> ContinualLog | None:
    text = _text(path, "continual_eval.csv")
    if text is None or text in ("", HEADER):
        return None
    try:
        return parse(text, task_ids=ids)
    except ValueError as error:
        raise UserError(
            "run", path, str(error), "Restore the file, or move it away for a report without stability curves"
        ) from error


def _text(path: Path, name: str) -> str | None:
    """Content of a file with its line ends as they are; bytes that are no UTF-8 become marks, ``None`` if absent."""
    try:
        return (path / name).read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError("run", path, f"{name} cannot be read ({error.strerror})", "Check its permissions") from error


def _damaged(path: Path, name: str, why: str) -> UserError:
    return UserError("run", path, f"{name} cannot be understood ({why})", "Restore the file, or move it away")


def _ids_of(environment: Mapping[str, Any]) -> tuple[int, ...]:
    tasks = _group(environment, "dataset").get("tasks")
    if not isinstance(tasks, list):
        return ()
    return tuple(task["task_id"] for task in tasks if isinstance(task, dict) and isinstance(task.get("task_id"), int))


def _primary(metrics: Mapping[str, Any], environment: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    space = _group(metrics, "acc").get("space")
    if space in SPACE_OF_SETTING.values():
        return str(space)
    setting = _group(environment, "dataset").get("setting") or _group(config, "scenario").get("setting")
    return SPACE_OF_SETTING.get(str(setting), "cil")


def _name(config: Mapping[str, Any]) -> str:
    strategy = config.get("strategy")
    chosen = "+".join(map(str, strategy)) if isinstance(strategy, dict | list) else str(strategy or "unknown strategy")
    scenario = _group(config, "scenario").get("kind") or "unknown scenario"
    return f"{chosen} on {scenario}, seed {config.get('seed', 'unknown')}"


def _group(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping inside a mapping, empty where there is none."""
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _number(cell: str) -> float | None:
    value = float(cell)
    return None if math.isnan(value) else value
