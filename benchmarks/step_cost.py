"""Cost of a training step and of an evaluation, as ratios to plain forward and training passes of the same network.

    python benchmarks/step_cost.py [--steps 12] [--threads 1]

Everything runs in one process on one machine: a ViT of 65 tokens (32 px, patches of 4, width 192, 6 blocks, random
weights), batch 16. ``F`` is a forward pass of a batch without gradients, ``T`` forward and backward of the whole
network. Times are CPU seconds of the process, medians after two warm-ups, all parts measured in turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning as L
import torch
from timm.models.vision_transformer import VisionTransformer

from cl_platform.backbones import PromptedViT
from cl_platform.cli.compose import compose
from cl_platform.learner import ContinualLearner, LearnerOptions
from cl_platform.run_config import parse
from cl_platform.scenarios import Stream, TaskLoader, TransformConfig, Transforms, stream_from_datasets
from cl_platform.strategies import build_strategies
from cl_platform.trainer import quiet_libraries

BATCH = 16


def median_cpu(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times[2:])


def small_vit() -> PromptedViT:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, num_classes=0)
    return PromptedViT(model, 32, tag="random 65-token ViT")


def random_stream(train: int, test: int = 200, classes: int = 20, num_tasks: int = 2) -> Stream:
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> list[tuple[torch.Tensor, int]]:
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return [(image, i % classes) for i, image in enumerate(pixels)]

    return stream_from_datasets(images(train), images(test), num_tasks=num_tasks)


PUBLISHED_BY_OTHERS = {"l2p": ("strategy.l2p.length=5", "strategy.l2p.top_k=5")}
"""Keys other than the defaults: 25 prompt tokens, as most other codes of L2P have for this size of image."""


class StepTimer(L.Callback):
    """CPU seconds from one batch's start to the next one's."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *args: object) -> None:
        self.marks.append(time.process_time())

    def median(self) -> float:
        return statistics.median(b - a for a, b in zip(self.marks[2:], self.marks[3:], strict=False))


def learner_of(strategy: str, stream: Stream, augment: str, *overrides: str) -> ContinualLearner:
    config = parse(compose([f"strategy={strategy}", *overrides]))
    backbone = small_vit()
    transforms = Transforms(TransformConfig(augment=augment), 32, backbone.mean, backbone.std)
    composition = build_strategies(config.strategy)
    return ContinualLearner(
        backbone, composition, transforms, stream, config.optimizer, LearnerOptions(batch_size=BATCH)
    )


def step_seconds(strategy: str, stream: Stream, augment: str, steps: int) -> tuple[float, ContinualLearner]:
    learner, timer = learner_of(strategy, stream, augment, *PUBLISHED_BY_OTHERS.get(strategy, ())), StepTimer()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=50,
        max_steps=steps + 3,
        logger=False,
        callbacks=[timer],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    learner.trainer = trainer
    task = stream.tasks[0]
    learner.begin_task(task, epochs=50)
    trainer.fit(learner, TaskLoader(task.train, 0, BATCH, 0, drop_last=True))
    learner.end_task(task)
    return timer.median(), learner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_libraries()
    warnings.filterwarnings("ignore")
    print(f"command: python {' '.join(sys.argv)}")
    print(
        f"machine: {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {options.threads} thread(s)"
    )
    stream = random_stream(320)
    vit, images = small_vit(), torch.randn(BATCH, 3, 32, 32)

    def train_pass() -> None:
        vit(images).sum().backward()
        vit.zero_grad()

    with torch.no_grad():
        forward = median_cpu(lambda: vit(images), options.steps)
    whole = median_cpu(train_pass, options.steps)
    print(f"F = {forward:.4f} s, T = {whole:.4f} s = {whole / forward:.2f} F")
    print(
        f"{'strategy':14s} {'step / F':>9s} {'kept queries':>13s} {'step / T':>9s} "
        f"{'evaluation / F':>15s} {'fresh query':>12s}"
    )
    for strategy in ("coda_prompt", "dual_prompt", "l2p", "finetune"):
        with torch.no_grad():
            forward = median_cpu(lambda: vit(images), options.steps)
        whole = median_cpu(train_pass, options.steps)
        step, learner = step_seconds(strategy, stream, "crop_flip", options.steps)
        kept, _ = step_seconds(strategy, stream, "none", options.steps)
        test = stream.tasks[0].test
        rows = torch.arange(BATCH)
        with learner.answering():
            learner.logits_of(0, "test", test, rows)
            answer = median_cpu(lambda: learner.logits_of(0, "test", test, rows), options.steps)  # noqa: B023
        fresh = median_cpu(lambda: learner.logits_of_images(test.images(rows)), options.steps)  # noqa: B023
        grads = sum(p.grad is not None for p in learner.backbone.parameters())
        print(
            f"{strategy:14s} {step / forward:9.2f} {kept / forward:13.2f} {step / whole:9.2f} "
            f"{answer / forward:15.2f} {fresh / forward:12.2f}   trunk tensors with gradient: {grads}"
        )


if __name__ == "__main__":
    main()
