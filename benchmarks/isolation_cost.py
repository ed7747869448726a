"""Cost of forgetting by deletion, and of what makes it possible while a stream is learnt.

    python benchmarks/isolation_cost.py [--rounds 5] [--steps 8] [--threads 1] [--strategies s_lora] [--save FILE]

Everything runs in one process on one machine: ``vit_nano`` with its packed weights, ten tasks of ten classes, batch 16,
crop and flip, strategies in turn once a round. Times are CPU seconds of the process.

``drop`` takes the second task of ten out of a learner in memory; ``request`` is that with the digests of everything
before and after it, as the certificate lists them. Each round starts from the same ten tasks.

``step`` is a training step in the tenth task, with what keeps tasks apart and without: without, all draws come from one
generator in place of one keyed by task and purpose, one matrix gives the logits of all tasks in place of a block for
each, no owner is recorded, and no write is held against the records. ``check`` is that last one, once a task: every
digest after it, and before it those of what was written to since the task before. ``ratio`` counts it as well, spread
over ``--task-steps`` steps. Ratios are medians of those of the rounds.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import framing
import lightning as L
import torch
from step_cost import BATCH, StepTimer, random_stream
from torch import nn

from cl_platform import random_streams
from cl_platform.building import build_learner
from cl_platform.cli.compose import compose
from cl_platform.heads import Head
from cl_platform.ownership import Ownership
from cl_platform.run_config import parse
from cl_platform.scenarios import Stream, Task, TaskLoader
from cl_platform.unlearning.drop import drop
from cl_platform.unlearning.lineage import WriteCheck
from cl_platform.unlearning.pieces import Before

TASKS, CLASSES, GONE = 10, 100, 1
STRATEGIES = "s_lora,s_prompt,coda_prompt,dual_prompt,l2p,lora,l2p_lora,olora,inflora,er,finetune"
WARM_UP = 3


class Timed:
    """A learner of ten tasks, brought back to that state for each measurement."""

    def __init__(self, name: str, stream: Stream, few: Stream) -> None:
        config = parse(compose([f"strategy={name}", "trainer.accelerator=cpu", f"trainer.batch_size={BATCH}"]))
        self.stream, self.learner = stream, build_learner(config, stream)
        self.trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
            enable_model_summary=False,
        )  # fmt: skip
        self.learner.trainer, self.epochs = self.trainer, 0
        for task in few.tasks[:-1]:
            self._train(task)
            self.learner.end_task(task)
        self.nine = self._noted()
        self._train(few.tasks[-1])
        self.learner.end_task(few.tasks[-1])
        self.ten = self._noted()

    def _noted(self) -> tuple[dict[str, torch.Tensor], list[int], bool]:
        state = {name: tensor.clone() for name, tensor in self.learner.learnt_state().items()}
        return state, list(self.learner.learnt), self.learner.backbone.frozen

    def _back_to(self, noted: tuple[dict[str, torch.Tensor], list[int], bool]) -> None:
        state, learnt, frozen = noted
        self.learner.restore({name: tensor.clone() for name, tensor in state.items()}, learnt, frozen)

    def _train(self, task: Task) -> StepTimer:
        timer = StepTimer()
        self.trainer.callbacks.append(timer)  # type: ignore[attr-defined]
        self.learner.begin_task(task, 1, self.epochs)
        self.epochs += 1
        self.trainer.fit_loop.max_epochs = self.epochs
        self.trainer.fit(self.learner, TaskLoader(task.train, task.task_id, BATCH, 0, drop_last=True))
        self.trainer.callbacks.remove(timer)  # type: ignore[attr-defined]
        return timer

    def dropping(self) -> tuple[float, float]:
        """Seconds of the drop itself, and of the request without its files."""
        self._back_to(self.ten)
        start = time.process_time()
        self.learner.drop_task(GONE)
        bare = time.process_time() - start
        self._back_to(self.ten)
        start = time.process_time()
        drop(self.learner, GONE, Before.of(self.learner, b"salt"))
        return bare, time.process_time() - start

    def task(self, apart: bool) -> tuple[float, float]:
        """Seconds of a step in the tenth task, and of the check of writes around it."""
        self._back_to(self.nine)
        task, check = self.stream.tasks[-1], WriteCheck()
        if apart:
            check.before(self.learner)
            check.after(self.learner)  # as behind the ninth task
        start = time.process_time()
        if apart:
            check.before(self.learner)
        spent = time.process_time() - start
        timer = self._train(task)
        self.learner.end_task(task)
        start = time.process_time()
        if apart:
            assert not check.after(self.learner, task.task_id)
        return timer.median(), spent + time.process_time() - start


@contextmanager
def mixed() -> Iterator[None]:
    """Nothing keeps tasks apart inside the block."""
    one = torch.Generator().manual_seed(0)
    keyed, seed_of = random_streams.stream, random_streams.stream_seed
    patches: list[tuple[Any, str, Any]] = []

    def patch(owner: Any, name: str, value: Any) -> None:
        patches.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    matrices: dict[int, nn.Linear] = {}

    def whole(head: Head, features: torch.Tensor) -> torch.Tensor:
        columns = len(head.classes)
        matrix = matrices.setdefault(columns, nn.Linear(head.feature_dim, columns))
        return matrix(features)

    for module in [m for name, m in sys.modules.items() if name.startswith("cl_platform")]:
        if getattr(module, "stream", None) is keyed:
            patch(module, "stream", lambda *key: one)
        if getattr(module, "stream_seed", None) is seed_of:
            patch(module, "stream_seed", lambda *key: 0)
    patch(Head, "forward", whole)
    patch(Ownership, "note_begin", lambda learner, task: [])
    patch(Ownership, "note_trained", lambda learner, behind: None)
    try:
        yield
    finally:
        for owner, name, value in reversed(patches):
            setattr(owner, name, value)


def median(values: list[float]) -> float:
    return statistics.median(values)


def main() -> None:
    parser = framing.parser(__doc__, 8, "timed steps of a task", STRATEGIES)
    parser.add_argument("--task-steps", type=int, default=100, help="steps of a task over which its check is shared")
    options = parser.parse_args()
    lines = framing.begin(options.threads)
    stream = random_stream(TASKS * BATCH * (options.steps + WARM_UP), classes=CLASSES, num_tasks=TASKS)
    few = random_stream(TASKS * 2 * BATCH, classes=CLASSES, num_tasks=TASKS)
    timed = {name: Timed(name, stream, few) for name in options.strategies.split(",")}
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in timed}
    for number in range(options.rounds):
        for name, entry in timed.items():
            order = (True, False) if number % 2 == 0 else (False, True)
            tasks = {}
            for apart in order:
                if apart:
                    tasks[apart] = entry.task(apart)
                else:
                    with mixed():
                        tasks[apart] = entry.task(apart)
            found[name].append((*entry.dropping(), tasks[True][0], tasks[False][0], tasks[True][1]))
    heads = ("drop s", "request s", "step s", "without s", "check s", "step ratio", "ratio")
    lines.append(f"{'strategy':12s}" + "".join(f" {head:>10s}" for head in heads))
    for name, rounds in found.items():
        bare, request, apart, without, check = (median(list(column)) for column in zip(*rounds, strict=True))
        steps = median([r[2] / r[3] for r in rounds])
        whole = median([(r[2] + r[4] / options.task_steps) / r[3] for r in rounds])
        values = (bare, request, apart, without, check, steps, whole)
        lines.append(f"{name:12s}" + "".join(f" {value:10.4f}" for value in values))
    framing.end(lines, options.save)


if __name__ == "__main__":
    main()
