"""Every run below some folders as one line: what it is, how far it came, what it reached."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from cl_platform.errors import UserError

State = Literal["finished", "running", "stopped"]
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d)_(\d{6})")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it was built


@dataclass(frozen=True)
class RunLine:
    """A run folder in short.

    Attributes:
        path: the folder.
        scenario: name of its scenario, those that were added behind it after a plus.
        strategy: its strategies, joined by a plus.
        seed: of the run.
        date: when it began, ISO 8601 to the second, local time.
        state: ``finished``, ``running`` (its lock is held) or ``stopped``.
        done: tasks that are behind it.
        tasks: tasks of its stream; ``None`` where no file says so.
        forgotten: ids of the tasks that it has forgotten on request.
        accuracy: final average accuracy in [0, 1], ``None`` where there is none.
        forgetting: likewise.
        seconds: that it took.
    """

    path: Path
    scenario: str
    strategy: str
    seed: int | None
    date: str
    state: State
    done: int
    tasks: int | None
    forgotten: tuple[int, ...]
    accuracy: float | None
    forgetting: float | None
    seconds: float | None

    @property
    def state_text(self) -> str:
        """The state in a word, with the number of tasks where the run is not at its end."""
        return self.state if self.state == "finished" else f"{self.state} {self.done}/{self.tasks or '?'}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**vars(self), "path": str(self.path), "forgotten": list(self.forgotten)}


@dataclass(frozen=True)
class RunList:
    """What was found.

    Attributes:
        runs: by date, oldest first.
        damaged: a line for every run folder that cannot be read.
    """

    runs: tuple[RunLine, ...]
    damaged: tuple[str, ...]


def list_runs(roots: Sequence[Path], scenario: str | None = None, strategy: str | None = None) -> RunList:
    """All runs in and below some folders.

    Args:
        roots: folders; each may be a run folder itself.
        scenario: only runs whose scenario, or one that was added to it, has this name.
        strategy: only runs with this strategy, alone or among others; or with exactly these, joined by a plus.

    Raises:
        UserError: a folder that is not there.
    """
    runs: dict[Path, RunLine] = {}
    damaged: dict[Path, str] = {}
    for root in roots:
        if not root.is_dir():
            raise UserError("ROOT", root, "there is no such folder", "Name a folder that holds runs, such as outputs")
        for path in _run_folders(root):
            if path.resolve() in runs or path.resolve() in damaged:
                continue
            try:
                found = read_line(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
                damaged[path.resolve()] = f"{path} is damaged and left out: {' '.join(str(error).split())[:160]}"
                continue
            if found is not None and _wanted(found, scenario, strategy):
                runs[path.resolve()] = found
    ordered = sorted(runs.values(), key=lambda run: (run.date, str(run.path)))
    return RunList(tuple(ordered), tuple(damaged.values()))


def _wanted(run: RunLine, scenario: str | None, strategy: str | None) -> bool:
    named = strategy is None or strategy == run.strategy or strategy in run.strategy.split("+")
    return named and (scenario is None or scenario in run.scenario.split("+"))


def _run_folders(root: Path) -> list[Path]:
    """Folders with a ``config.yaml``, hidden ones and what lies inside a run left out."""
    found = []
    for folder, inner, files in os.walk(root):
        if "config.yaml" in files:
            found.append(Path(folder))
            if "checkpoints" in inner:
                inner.clear()
        inner[:] = sorted(name for name in inner if not name.startswith("."))
    return found


def read_line(path: Path) -> RunLine | None:
    """A run folder in short; ``None`` for a ``config.yaml`` that is of something else.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file cannot be understood.
        yaml.YAMLError: likewise.
    """
    config = yaml.load((path / "config.yaml").read_text(encoding="utf-8"), Loader=_LOADER)  # a safe one
    if not isinstance(config, dict):
        raise ValueError("config.yaml holds no keys")
    strategy, scenario = config.get("strategy"), config.get("scenario")
    if not isinstance(strategy, dict) or not isinstance(scenario, dict) or "kind" not in scenario:
        return None
    metrics, cost = _json(path / "metrics.json"), _json(path / "cost.json")
    added = [entry["scenario"]["kind"] for entry in config.get("extensions") or ()]
    done, tasks = _progress(path)
    finished = metrics is not None
    return RunLine(
        path=path,
        scenario="+".join(dict.fromkeys(map(str, [scenario["kind"], *added]))),
        strategy="+".join(map(str, strategy)),
        seed=config.get("seed"),
        date=_date(path),
        state="running" if _locked(path) else "finished" if finished else "stopped",
        done=done,
        tasks=tasks,
        forgotten=_forgotten(path),
        accuracy=_value(metrics, "acc"),
        forgetting=_value(metrics, "forgetting"),
        seconds=None if cost is None else cost.get("seconds_total"),
    )


def _json(path: Path) -> dict[str, Any] | None:
    """A JSON object; ``None`` where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be understood ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content


def _value(metrics: Mapping[str, Any] | None, key: str) -> float | None:
    return None if metrics is None else (metrics.get(key) or {}).get("value")


def _forgotten(path: Path) -> tuple[int, ...]:
    file = path / "unlearning" / "forgotten.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    return tuple(sorted(int(entry["task_id"]) for entry in entries))


def _progress(path: Path) -> tuple[int, int | None]:
    """Tasks behind the newest checkpoint, and all tasks of the stream."""
    names = (folder.name.removeprefix("task_") for folder in (path / "checkpoints").glob("task_*"))
    done = max((int(name) + 1 for name in names if name.isdigit()), default=0)
    dataset = (_json(path / "environment.json") or {}).get("dataset") or {}
    tasks = dataset.get("tasks")
    return done, len(tasks) if isinstance(tasks, list) else None


def _date(path: Path) -> str:
    """When a run began: its folder's name says so, else its oldest file."""
    stamp = _STAMP.search(path.name)
    if stamp:
        try:
            return datetime.strptime(f"{stamp[1]} {stamp[2]}", "%Y-%m-%d %H%M%S").isoformat()
        except ValueError:
            pass
    files = [path / "config.yaml", *path.glob("checkpoints/*/state.json")]
    return datetime.fromtimestamp(int(min(file.stat().st_mtime for file in files))).isoformat()


def _locked(path: Path) -> bool:
    """Whether a process is writing to the run."""
    try:
        with open(path / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
