"""Cost of a training step of each replay strategy and regulariser, as a ratio to plain finetuning's.

    python benchmarks/replay_cost.py [--rounds 5] [--steps 4] [--threads 1] [--strategies er,mir] [--save FILE]

Everything runs in one process on one machine: a ViT of 65 tokens (32 px, patches of 4, width 192, 6 blocks, random
weights), batch 16, 16 replayed images of a draw, 50 candidates, a buffer of 100 images (for gem, 50 of them the first
task's), the second of two tasks. ``count`` is the cost by arithmetic, per current image and relative to finetuning's 3:
a forward pass of an image is 1, its backward 2. Times are CPU seconds of the process. The strategies are timed in turn,
once a round; a round's ratio is that of its medians, and the table gives the median, the smallest and the largest ratio
of all rounds. A ratio above its count is drawing, augmenting, inserting, and work on parameters; it is below where
finetuning's own work on parameters, which no replayed image repeats, is not negligible beside its passes.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import framing
import lightning as L
from step_cost import BATCH, StepTimer, learner_of, random_stream

from cl_platform.scenarios import Stream, Task, TaskLoader

DRAW, CANDIDATES, SIZE, TASKS = 16, 50, 100, 2
RHO = DRAW / BATCH
COUNTS = {  # per current image: examples with gradient and backward (3 each), examples without gradient (1 each)
    "finetune": 3.0,
    "er": 3 * (1 + RHO),
    "er_ace": 3 * (1 + RHO),
    "der": 3 * (1 + RHO),
    "derpp": 3 * (1 + 2 * RHO),
    "agem": 3 * (1 + RHO),
    "gem": 3 * (1 + (SIZE // TASKS) / BATCH),
    "mir": 3 * (1 + RHO) + 2 * CANDIDATES / BATCH,
    "ewc": 3.0,
    "l2": 3.0,
    "si": 3.0,
    "lwf": 4.0,
    "feature_distillation": 4.0,
}
WARM_UP = 2


class Timed:
    """A strategy at the start of the second task, and its steps so far."""

    def __init__(self, name: str, stream: Stream) -> None:
        own = {"mir": [f"strategy.mir.candidates={CANDIDATES}"], "ewc": ["strategy.ewc.fisher_samples=16"]}
        buffered = name in ("er", "er_ace", "der", "derpp", "agem", "gem", "mir")
        keys = [f"strategy.{name}.buffer.size={SIZE}"] if buffered else []
        if buffered and name != "gem":
            keys.append(f"strategy.{name}.batch_size={DRAW}")
        self.learner = learner_of(name, stream, "crop_flip", *keys, *own.get(name, []))
        self.epochs = 0
        self.trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
            enable_model_summary=False,
        )  # fmt: skip
        self.learner.trainer = self.trainer
        first, self.task = stream.tasks
        self.learner.begin_task(first, 1)
        self._train(first)
        self.learner.end_task(first)
        self.learner.begin_task(self.task, 1, 1)

    def _train(self, task: Task) -> StepTimer:
        timer = StepTimer()
        self.trainer.callbacks.append(timer)
        self.epochs += 1
        self.trainer.fit_loop.max_epochs = self.epochs
        self.trainer.fit(self.learner, TaskLoader(task.train, task.task_id, BATCH, 0, drop_last=True))
        self.trainer.callbacks.remove(timer)
        return timer

    def round(self) -> float:
        """Median CPU seconds of a step of one epoch more."""
        return self._train(self.task).median()


def table(rounds: dict[str, list[float]]) -> list[str]:
    lines = [f"{'strategy':22s} {'count':>6s} {'measured':>9s} {'least':>7s} {'most':>7s} {'seconds':>9s}"]
    for name, times in rounds.items():
        ratios = [own / plain for own, plain in zip(times, rounds["finetune"], strict=True)]
        lines.append(
            f"{name:22s} {COUNTS[name] / 3:6.2f} {statistics.median(ratios):9.2f} {min(ratios):7.2f} "
            f"{max(ratios):7.2f} {statistics.median(times):9.4f}"
        )
    return lines


def main() -> None:
    parser = framing.parser(__doc__, 4, "timed steps of a round", ",".join(COUNTS))
    options = parser.parse_args()
    lines = framing.begin(options.threads)
    names = dict.fromkeys(["finetune", *options.strategies.split(",")])
    stream = random_stream(TASKS * max(BATCH * (options.steps + WARM_UP + 1), SIZE), num_tasks=TASKS)
    timed = {name: Timed(name, stream) for name in names}
    rounds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, learner in timed.items():
            rounds[name].append(learner.round())
    lines += table(rounds)
    framing.end(lines, options.save)


if __name__ == "__main__":
    main()
