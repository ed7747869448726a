"""How much of min-ACC the adaptive grid sees, by replay over logs of every update.

    python benchmarks/adaptive_grid.py [--quick] [RUN_FOLDER ...]

Run folders must hold a ``continual_eval.csv`` of ``evaluation=every_step``. Without any, the script trains its own runs
into a temporary folder: an MLP 64-128-128-10 on scikit-learn's digits, five tasks of two classes each or rotated by 0,
36, .. degrees, fine-tuning and replay from 200 images, batch 16, 150 and 400 updates per task, up to 100 test images of
each task. ``error`` is the min-ACC of the chosen updates minus that of every update, in points; ``evaluated`` is the
share of all updates. Only ``max_rate`` bounds the adaptive grid here; ``max_overhead`` is out of its way.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.metrics import SPACES, Result
from cl_platform.metrics.continual_log import HEADER, ContinualLog, Curves, LogRow, format_rows, parse
from cl_platform.metrics.grid import Adaptive, Every, Grid, Plan
from cl_platform.metrics.replay_grid import replay
from cl_platform.metrics.subset import evaluation_subset

TASKS, BATCH, BUFFER, IMAGES = 5, 16, 200, 100
FILE = "continual_eval.csv"
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam_0.001": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
    "adam_0.003": lambda p: torch.optim.Adam(p, 3e-3, fused=True),
    "sgd_0.02": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, fused=True),
    "sgd_0.05": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
}
BUDGETLESS = 10**6


# -- recording --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Training images (n, 64), their labels, the evaluation subset and its labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def tasks_of(scenario: str, seed: int) -> list[Task]:
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    pixels, labels = pixels[order].reshape(-1, 8, 8) / 16, labels[order]
    test = np.arange(len(labels)) < len(labels) // 4
    made = []
    for k in range(TASKS):
        chosen = np.isin(labels, (2 * k, 2 * k + 1)) if scenario == "class" else np.full(len(labels), True)
        angle = 0 if scenario == "class" else 36 * k
        turned = rotate(pixels, angle, axes=(1, 2), reshape=False, order=1).reshape(len(labels), 64)
        held_out = np.flatnonzero(chosen & test)
        subset = held_out[evaluation_subset(labels[held_out].tolist(), IMAGES, seed, k)]
        train = chosen & ~test
        arrays = turned[train], labels[train], turned[subset], labels[subset]
        x, y, test_x, test_y = (torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)
        made.append(Task(x.float(), y.long(), test_x.float(), test_y.long()))
    return made


class Reservoir:
    """A uniform sample of all images seen (Vitter's algorithm R)."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.seen = generator, 0
        self.images, self.labels = torch.empty(BUFFER, 64), torch.empty(BUFFER, dtype=torch.int64)

    def add(self, images: Tensor, labels: Tensor) -> None:
        for image, label in zip(images, labels, strict=True):
            place = self.seen
            if place >= BUFFER:
                place = int(torch.randint(self.seen + 1, (1,), generator=self.generator))
            if place < BUFFER:
                self.images[place], self.labels[place] = image, label
            self.seen += 1

    def sample(self) -> tuple[Tensor, Tensor]:
        rows = torch.randint(min(self.seen, BUFFER), (BATCH,), generator=self.generator)
        return self.images[rows], self.labels[rows]


def record(scenario: str, strategy: str, optimizer: str, updates: int, seed: int) -> str:
    """The text of a log: a run with every update evaluated."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tasks = tasks_of(scenario, seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    space = "cil" if scenario == "class" else "dil"
    buffer = Reservoir(generator)
    rows: list[LogRow] = []
    for k, task in enumerate(tasks):
        seen = tasks[: k + 1]
        classes = 2 * (k + 1) if scenario == "class" else 10
        images, labels = torch.cat([t.test_images for t in seen]), torch.cat([t.test_labels for t in seen])
        sizes = [len(t.test_labels) for t in seen]
        owner = torch.repeat_interleave(torch.tensor(sizes))

        def evaluate(step: int, event: str) -> None:
            with torch.no_grad():
                right = model(images)[:, :classes].argmax(1) == labels  # noqa: B023
            counts = torch.bincount(owner[right], minlength=k + 1).tolist()  # noqa: B023
            for j, cell in enumerate(zip(counts, sizes, strict=True)):  # noqa: B023
                rows.append(LogRow(step, k, k, 0, event, j, space, *cell))  # noqa: B023

        stepper = OPTIMIZERS[optimizer](model.parameters())
        evaluate(k * updates, "start")
        order = torch.empty(0, dtype=torch.int64)
        for step in range(k * updates + 1, (k + 1) * updates + 1):
            if len(order) < BATCH:
                order = torch.randperm(len(task.labels), generator=generator)
            x, y = task.images[order[:BATCH]], task.labels[order[:BATCH]]
            order = order[BATCH:]
            if strategy == "replay":
                new = x, y
                if k:
                    old_x, old_y = buffer.sample()
                    x, y = torch.cat([x, old_x]), torch.cat([y, old_y])
                buffer.add(*new)
            stepper.zero_grad()
            F.cross_entropy(model(x)[:, :classes], y).backward()
            stepper.step()
            evaluate(step, "step")
        evaluate((k + 1) * updates, "end")
    return HEADER + format_rows(rows)


def record_all(folder: Path, quick: bool) -> list[Path]:
    lengths, seeds = ((150,), (1,)) if quick else ((150, 400), (1, 2))
    optimizers = ("adam_0.001",) if quick else tuple(OPTIMIZERS)
    made = []
    for parts in itertools.product(("class", "rotated"), ("finetune", "replay"), optimizers, lengths, seeds):
        run = folder / "-".join(map(str, parts))
        run.mkdir()
        (run / FILE).write_text(record(*parts))
        made.append(run)
    return made


# -- replaying --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One run under one grid."""

    error: float
    share: Fraction


def grids(updates: list[int]) -> dict[str, Grid]:
    made: dict[str, Grid] = {}
    for rate in ("0.10", "0.05", "0.20"):
        made[f"adaptive {rate}"] = Adaptive(Plan(updates, 1, max_overhead=BUDGETLESS, max_rate=rate), 1)
    return made | {"every 10th": Every(10)}


def read(run: Path) -> tuple[ContinualLog, str, list[int]]:
    """A run's log, its primary prediction space as far as the log shows it, and the updates of its tasks."""
    log = parse((run / FILE).read_text())
    found = {row.prediction_space for row in log.rows}
    space = next((s for s in ("cil", "dil", "til") if s in found), SPACES[0])
    curves = Curves.of(log, space)
    return log, space, [end - begin for begin, end in zip(curves.begins, curves.ends, strict=True)]


def measure(runs: list[Path]) -> dict[tuple[str, str], list[Line]]:
    """(grid, group) -> a line per run; groups are ``all`` and the updates of the longest task."""
    lines: dict[tuple[str, str], list[Line]] = {}
    for run in runs:
        log, space, updates = read(run)
        for name, grid in grids(updates).items():
            try:
                seen = replay(log, space, grid)
            except ValueError as error:
                sys.exit(f"{run}: {error}; the log must hold every update (evaluation=every_step)")
            if not isinstance(seen.min_acc, Result) or not isinstance(seen.min_acc_every_step, Result):
                sys.exit(f"{run}: min_acc is undefined: {seen.min_acc_every_step}")
            line = Line(100 * (seen.min_acc.value - seen.min_acc_every_step.value), seen.share)
            for group in ("all", f"{max(updates)} updates"):
                lines.setdefault((name, group), []).append(line)
    return lines


def share_of(lines: list[Line]) -> float:
    return float(sum((line.share for line in lines), Fraction(0)) / len(lines))


def print_table(lines: dict[tuple[str, str], list[Line]]) -> None:
    print(f"{'grid':15s} {'runs':18s} {'mean':>6s} {'median':>7s} {'max':>6s} {'<= 1 point':>11s} {'evaluated':>10s}")
    groups = sorted({group for _, group in lines}, key=lambda group: (group != "all", len(group), group))
    if len(groups) == 2:
        groups = ["all"]
    for group in groups:
        for name in dict.fromkeys(name for name, _ in lines):
            chosen = lines[name, group]
            errors = [line.error for line in chosen]
            within = sum(error <= 1 + 1e-9 for error in errors) / len(errors)
            label = f"{len(chosen)}, {group}"
            print(
                f"{name:15s} {label:18s} {statistics.mean(errors):6.2f} {statistics.median(errors):7.2f} "
                f"{max(errors):6.2f} {within:11.0%} {share_of(chosen):10.2%}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--quick", action="store_true", help="record 4 runs in place of 64")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, 1 thread; "
        f"python {platform.python_version()}, torch {torch.__version__}"
    )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = options.folders or record_all(Path(folder), options.quick)
        recorded = time.perf_counter()
        lines = measure(runs)
    print(f"{len(runs)} runs: {recorded - start:.0f} s to record, {time.perf_counter() - recorded:.0f} s to replay")
    print_table(lines)
    chosen = lines["adaptive 0.10", "all"]
    mean, share = statistics.mean(line.error for line in chosen), share_of(chosen)
    held = "holds" if mean <= 1 and share <= 0.1 else "does not hold"
    print(f"mean error at most 1 point at most 10 % evaluated: {held} ({mean:.2f} points, {share:.2%})")


if __name__ == "__main__":
    main()
