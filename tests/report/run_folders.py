"""Run folders as a training leaves them, with made-up numbers: old tasks dip after every switch and come back."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cl_platform.metrics import AccuracyMatrix, entry, summarise
from cl_platform.metrics.continual_log import HEADER, ContinualLog, LogRow, format_rows, parse
from cl_platform.metrics.continual_results import continual_entries, coverage, gap_table

SETTINGS = {"cil": "class", "dil": "domain", "til": "task"}


@dataclass(frozen=True)
class Made:
    """What to make up: tasks of ``updates`` updates each, evaluated on ``images`` images; ``dip`` deep on average."""

    tasks: int = 3
    updates: int = 60
    images: int = 100
    space: str = "cil"
    seed: int = 0
    strategy: str = "finetune"
    scenario: str = "split_digits"
    dip: float = 0.45
    left: float = 0.06
    classes_per_task: int = 2
    class_names: tuple[str, ...] = ()
    finished: bool = True
    log: bool = True
    diagnostics: bool = True

    @property
    def classes(self) -> list[list[int]]:
        """Class ids of every task."""
        n = self.classes_per_task
        return [list(range(n)) if self.space == "dil" else list(range(t * n, t * n + n)) for t in range(self.tasks)]

    def name_of(self, class_id: int) -> str:
        return self.class_names[class_id] if class_id < len(self.class_names) else f"digit {class_id}"


def write_run(path: Path, made: Made = Made()) -> Path:
    """Write the folder and give its path back."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(_config(made), sort_keys=False, allow_unicode=True))
    _json(path / "environment.json", _environment(made))
    curve = _curves(made)
    matrix = _matrix(made, curve)
    (path / "accuracy_matrix.csv").write_text(matrix.to_csv())
    log = None
    if made.log:
        text = HEADER + _rows(made, curve)
        if not made.finished:  # in the middle of the last task
            lines = text.splitlines(keepends=True)
            text = "".join(lines[: -6 * made.tasks])
        (path / "continual_eval.csv").write_text(text)
        log = parse(text, task_ids=range(made.tasks))
    if made.diagnostics:
        _json(path / "confusion.json", _confusion(made, curve))
        (path / "gradients.csv").write_text(_gradients(made))
    if made.finished:
        _json(path / "metrics.json", _metrics(made, matrix, log))
        _json(path / "cost.json", _cost(made))
    return path


def _json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False))


def _config(made: Made) -> dict[str, Any]:
    return {
        "strategy": {made.strategy: {"loss": "seen"}},
        "scenario": {"kind": made.scenario, "num_tasks": made.tasks, "setting": SETTINGS[made.space]},
        "backbone": {"kind": "vit_nano"},
        "evaluation": {"grid": "adaptive", "gap_window": None, "gap_tolerance": 0.02},
        "seed": made.seed,
    }


def _environment(made: Made) -> dict[str, Any]:
    tasks = [{"task_id": t, "classes": c, "train": 240, "test": 500} for t, c in enumerate(made.classes)]
    dataset = {"scenario": made.scenario, "setting": SETTINGS[made.space], "source": "digits", "digest": "d9" * 32}
    return {
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "device": "cpu (2 cores)",
        "seed": made.seed,
        "dataset": {**dataset, "tasks": tasks},
        "backbone": {"tag": "vit_nano", "weights_sha256": "e4" * 32, "input_size": 32},
    }


class _Accuracy:
    """A made-up accuracy on every task at every update, with the noise of a few images."""

    def __init__(self, made: Made) -> None:
        self.made, self.random = made, random.Random(made.seed)
        self.depth = {
            (k, j): made.dip * self.random.uniform(0.55, 1.35) for k in range(made.tasks) for j in range(made.tasks)
        }
        self.left = {pair: made.left * self.random.uniform(0.2, 1.8) for pair in self.depth}
        self.peak = [self.random.uniform(0.86, 0.97) for _ in range(made.tasks)]
        self.start = 0.0 if made.space != "til" else 0.5

    def before(self, k: int, j: int) -> float:
        """Accuracy on task j when task k starts."""
        value = self.peak[j]
        for later in range(j + 1, k):
            value = max(0.05, value - self.left[later, j])
        return value

    def at(self, k: int, j: int, offset: int) -> float:
        """Accuracy on task j after ``offset`` updates of task k."""
        if j == k:
            return self.start + (self.peak[j] - self.start) * (1 - math.exp(-offset / 12))
        speed = 4.0 + (j + k) % 3
        dip = self.depth[k, j] * (offset / speed) * math.exp(1 - offset / speed)
        return self.before(k, j) - dip - self.left[k, j] * offset / self.made.updates

    def count(self, k: int, j: int, offset: int, images: int) -> int:
        noisy = self.at(k, j, offset) + (self.random.gauss(0, 0.012) if offset else 0)
        return min(images, max(0, round(noisy * images)))


def _curves(made: Made) -> dict[tuple[int, int, int], int]:
    """(position, old position, offset) -> right answers of the subset, on a grid that thins out."""
    accuracy = _Accuracy(made)
    found = {}
    for k in range(made.tasks):
        for offset in offsets(made.updates):
            for j in range(k + 1):
                found[k, j, offset] = accuracy.count(k, j, offset, made.images)
        for j in range(k):
            found[k, j, 0] = found[k - 1, j, made.updates]
    return found


def offsets(updates: int) -> list[int]:
    """0, then every update, then ever fewer, and the last."""
    chosen, offset = [0], 1.0
    while offset < updates:
        chosen.append(round(offset))
        offset = max(offset + 1, offset * 1.18)
    return [*chosen, updates]


def _rows(made: Made, curve: dict[tuple[int, int, int], int]) -> str:
    rows: dict[tuple[int, int], list[LogRow]] = {}
    for (k, j, offset), correct in curve.items():
        event = "start" if offset == 0 else "end" if offset == made.updates else "step"
        step = k * made.updates + offset
        rows.setdefault((k, offset), []).append(LogRow(step, k, k, 0, event, j, made.space, correct, made.images))
    return "".join(format_rows(group) for _, group in sorted(rows.items()))


def _matrix(made: Made, curve: dict[tuple[int, int, int], int]) -> AccuracyMatrix:
    matrix = AccuracyMatrix(made.space, list(range(made.tasks)))
    for k in range(made.tasks if made.finished else made.tasks - 1):
        cells = {j: (5 * curve[k, j, made.updates], 5 * made.images) for j in range(k + 1)}
        matrix.append_row(k, cells, {t: cells[t] for t in range(k + 1)} if made.space == "cil" else None)
    return matrix


def _confusion(made: Made, curve: dict[tuple[int, int, int], int]) -> dict[str, Any]:
    after = []
    for k in range(made.tasks if made.finished else made.tasks - 1):
        ids = sorted({c for classes in made.classes[: k + 1] for c in classes})
        counts = [[0] * len(ids) for _ in ids]
        for j, classes in enumerate(made.classes[: k + 1]):
            for c in classes:
                right = round(curve[k, j, made.updates] / len(classes))
                wrong = made.images // len(classes) - right
                counts[ids.index(c)][ids.index(c)] += max(0, right)
                for step in range(max(0, wrong)):  # most of what is wrong goes to the newest classes
                    counts[ids.index(c)][-1 - step % min(3, len(ids))] += 1
        names = [made.name_of(c) for c in ids]
        after.append({"position": k, "task_id": k, "classes": ids, "class_names": names, "counts": counts})
    return {"space": made.space, "after": after}


def _gradients(made: Made) -> str:
    lines = ["global_step,position,task_id,plasticity_norm,stability_norm,cosine"]
    generator = random.Random(made.seed)
    for k in range(made.tasks):
        for offset in range(1, 21):
            new = 3.2 * math.exp(-offset / 9) * generator.uniform(0.85, 1.15)
            old = 0.0 if k == 0 else 0.9 * (1 - math.exp(-offset / 5)) * generator.uniform(0.85, 1.15)
            cosine = "" if k == 0 else f"{-0.7 * math.exp(-offset / 8) + generator.uniform(-0.1, 0.1):.6f}"
            lines.append(f"{k * made.updates + offset},{k},{k},{new:.6f},{old:.6f},{cosine}")
    return "\n".join(lines) + "\n"


def _metrics(made: Made, matrix: AccuracyMatrix, log: ContinualLog | None) -> dict[str, Any]:
    extra = continual_entries(log, [made.space])
    if made.diagnostics:
        values = {"ece_15": ("5.3", 0.081), "negative_flip_rate": ("5.2", 0.112), "churn": ("5.2", 0.174)}
        for key, (number, value) in values.items():
            extra[f"{key}_{made.space}"] = entry(number, value, made.space)
        extra[f"recency_bias_{made.space}"] = entry("5.5", None, made.space, reason="needs_two_tasks")
    summary = summarise({made.space: matrix}, made.space, extra=extra)
    continual: dict[str, Any] = {"grid": "off"}
    if log is not None:
        facts = {"grid": "adaptive", "images_per_task": made.images, "overhead": 0.19}
        continual = {**facts, **coverage(log, made.space), "bad_rows": [str(row) for row in log.bad_rows]}
    gaps = [] if log is None else gap_table(log, made.space)
    return {**summary, "continual": continual, "gaps": gaps, "strategy": {}}


def _cost(made: Made) -> dict[str, Any]:
    seconds = {"setup": 1.1, "data": 0.2, "train": 31.4, "boundary": 0.1, "eval_continual": 6.2, "eval_boundary": 2.9}
    return {
        "seconds": {**seconds, "checkpoint": 0.4, "report": 0.0},
        "seconds_total": 43.1,
        "samples_per_second": 187.4,
        "updates": made.tasks * made.updates,
        "images_trained": 240 * made.tasks,
        "peak_rss_bytes": 1045069824,
        "peak_cuda_bytes": None,
        "params_total": 2712010,
        "params_trainable": 2712010,
    }
