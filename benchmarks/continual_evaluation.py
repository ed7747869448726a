"""Cost of one continual evaluation, against the way it is usually done, and over a whole run.

    python benchmarks/continual_evaluation.py [--repeats 5] [--threads 1] [--whole-run]

One evaluation looks at 10 tasks x 100 images. The usual way reads every task with a ``DataLoader`` of its own and runs
all layers, the query's pass included; ours answers resident images in one batch and runs only what can have changed.
Everything runs in one process on one machine, in turn: a ViT of 65 tokens (32 px, patches of 4, width 192, 6 blocks,
random weights). Times are CPU seconds of the process, medians after two warm-ups. ``ideal`` is the ratio of the forward
work alone. ``--whole-run`` trains on five tasks of digits and compares every step the usual way with ``adaptive``.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from step_cost import BATCH, StepTimer, learner_of, median_cpu, random_stream
from torch.utils.data import DataLoader, TensorDataset

from cl_platform.cli.compose import compose
from cl_platform.learner import ContinualLearner
from cl_platform.run import run
from cl_platform.run_config import parse
from cl_platform.scenarios import Stream, TaskLoader
from cl_platform.subset_evaluation import Subset, count_subsets, image_weight, resident, subset_of
from cl_platform.trainer import quiet_libraries

IMAGES = 100
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("finetune", "finetune", ()),
    ("finetune, last 2 blocks", "finetune", ("strategy.finetune.trainable=[blocks.4.*,blocks.5.*,norm.*]",)),
    ("coda_prompt", "coda_prompt", ()),
    ("coda_prompt, blocks 3-5", "coda_prompt", ("strategy.coda_prompt.layers=[3,4,5]",)),
    ("dual_prompt", "dual_prompt", ()),
    ("l2p", "l2p", ()),
    ("linear_probe", "linear_probe", ()),
    ("nmc", "nmc", ()),
)


def naive(learner: ContinualLearner, subsets: list[Subset]) -> int:
    """Right answers, one loader a task, all layers for every image."""
    right = 0
    seen = torch.tensor(learner.seen_classes())
    for subset in subsets:
        data = TensorDataset(subset.images.images(slice(None)), subset.images.labels)
        for images, labels in DataLoader(data, batch_size=IMAGES):
            right += int((seen[learner.logits_of_images(images).argmax(1)] == labels).sum())
    return right


def begin_last(learner: ContinualLearner, stream: Stream) -> float:
    """All but the last task passed through without training, the last begun; CPU seconds of one of its steps."""
    timer = StepTimer()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=8, logger=False, callbacks=[timer], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    learner.trainer = trainer
    for task in stream.tasks[:-1]:
        learner.begin_task(task, 1)
        learner.end_task(task)
    last = stream.tasks[-1]
    learner.begin_task(last, 50)
    if not learner.composition.needs_gradient:
        learner.end_task(last)
        return float("nan")
    trainer.fit(learner, TaskLoader(last.train, last.task_id, BATCH, 0, drop_last=True))
    return timer.median()


def one_evaluation(repeats: int) -> None:
    stream = random_stream(10 * 10 * BATCH, 10 * 2 * IMAGES, classes=100, num_tasks=10)
    subsets = [subset_of(task, IMAGES, 0) for task in stream.tasks]
    print(f"one evaluation of {len(subsets)} tasks x {IMAGES} images, CPU seconds")
    print(
        f"{'strategy':26s} {'usual':>8s} {'ours':>8s} {'ratio':>7s} {'ideal':>7s} {'ours / step':>12s} "
        f"{'share at 10 %':>14s} {'kept MiB':>9s}"
    )
    for label, strategy, overrides in ROWS:
        learner = learner_of(strategy, stream, "crop_flip", *overrides)
        step = begin_last(learner, stream)
        learner.trainer = None  # type: ignore[assignment]
        ready = resident(learner, subsets)
        assert naive(learner, subsets) == sum(cells["cil"][0] for cells in count_subsets(learner, ready).values())
        usual, ours = [], []
        for _ in range(repeats):
            usual.append(median_cpu(lambda: naive(learner, subsets), 1))  # noqa: B023
            ours.append(median_cpu(lambda: count_subsets(learner, ready), 1))  # noqa: B023
        before, now = statistics.median(usual), statistics.median(ours)
        kept = sum(t.element_size() * t.numel() for t in (ready.images, *ready.columns.values()))
        print(
            f"{label:26s} {before:8.3f} {now:8.4f} {before / now:7.1f} {ideal(learner, ready.columns):7.1f} "
            f"{now / step:12.1f} {0.1 * now / (step + 0.1 * now):14.0%} {kept / 2**20:9.1f}"
        )


def ideal(learner: ContinualLearner, columns: dict[str, torch.Tensor]) -> float:
    """Forward work of the usual way over ours, longer sequences counted."""
    (strategy,) = learner.composition.strategies
    tokens = learner.backbone.num_tokens
    if learner.composition.query == "only":
        return float(1 / image_weight(learner, columns))
    rows = 0
    if hasattr(strategy, "pool"):
        rows = strategy.config.top_k * strategy.config.length  # type: ignore[attr-defined]
    prompted = 1 + rows / tokens
    query = 1 if learner.composition.query == "beside" else 0
    depth = learner.backbone.depth
    return (query + prompted) / (prompted * (depth - learner.context.kept_blocks * ("tokens" in columns)) / depth)


class Naive(L.Callback):
    """Every step the usual way, with a stopwatch."""

    def __init__(self, stream: Stream, images: int) -> None:
        self.subsets = [subset_of(task, images, 0) for task in stream.tasks]
        self.seconds = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, learner: ContinualLearner, *rest: object) -> None:  # type: ignore[override]
        start = time.process_time()
        assert learner.task is not None
        naive(learner, self.subsets[: learner.task.position + 1])
        self.seconds += time.process_time() - start


def whole_run() -> None:
    import cl_platform.run as spine

    print("a whole run on split_digits, evaluation's CPU seconds (cost.json holds wall seconds of the same)")
    print(f"{'strategy':14s} {'usual, every step':>18s} {'every_step':>11s} {'adaptive':>9s} {'usual / adaptive':>17s}")
    for strategy in ("finetune", "coda_prompt"):
        seconds = {}
        for grid in ("every_step", "adaptive"):
            with tempfile.TemporaryDirectory() as folder:
                keys = [f"strategy={strategy}", f"evaluation={grid}", "evaluation.images_per_task=30"]
                result = run(parse(compose([*keys, f"run_dir={folder}/run", "trainer.progress=false"])))
                seconds[grid] = result.cost["seconds"]["eval_continual"]
        watcher = Naive(result.stream, 30)
        real = spine.build_trainer
        spine.build_trainer = lambda config, callbacks: real(config, [watcher, *callbacks])  # noqa: B023
        try:
            with tempfile.TemporaryDirectory() as folder:
                run(parse(compose([f"strategy={strategy}", "evaluation=off", f"run_dir={folder}/run"])))
        finally:
            spine.build_trainer = real
        print(
            f"{strategy:14s} {watcher.seconds:18.1f} {seconds['every_step']:11.1f} {seconds['adaptive']:9.2f} "
            f"{watcher.seconds / seconds['adaptive']:17.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--whole-run", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    warnings.filterwarnings("ignore")
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {options.threads} thread(s)"
    )
    one_evaluation(options.repeats)
    if options.whole_run:
        whole_run()


if __name__ == "__main__":
    main()
