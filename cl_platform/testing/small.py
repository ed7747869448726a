"""A small stream, a small network and short trainings: the same ways as in a run, in a fraction of a second."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import lightning as L
import torch
from torch import Tensor

from cl_platform.backbones import PromptedViT
from cl_platform.backbones.nano import nano_model
from cl_platform.learner import ContinualLearner, LearnerOptions
from cl_platform.optimizers import OptimizerConfig
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.run_config import TrainerConfig
from cl_platform.scenarios import DataConfig, ScenarioConfig, Stream, TaskLoader, Transforms, build_stream
from cl_platform.strategies.composition import Composition
from cl_platform.strategies.phases import Phase
from cl_platform.trainer import build_trainer, quiet_libraries

TASKS, BATCH, SIDE = 3, 16, 8
SCENARIO = ScenarioConfig(kind="split_digits", train_per_class=16, test_per_class=30)
SHAPE = {"embed_dim": 48, "depth": 5, "num_heads": 3, "global_pool": "avg"}


class Watch(L.Callback):
    """Looks on while tasks are learnt: a callback of the trainer that also hears of the bounds of a task."""

    def before(self, learner: ContinualLearner, phase: Phase) -> None:
        """Ahead of the start of a task."""

    def begun(self, learner: ContinualLearner, phase: Phase) -> None:
        """Between the start of a task and its first batch."""

    def trained(self, learner: ContinualLearner, phase: Phase) -> None:
        """Between the last batch of a task and its end."""

    def ended(self, learner: ContinualLearner, phase: Phase) -> None:
        """Behind the end of a task."""


@functools.cache
def small_stream() -> Stream:
    """The first tasks of the digits: two classes each, 16 training and 30 test images a class, 8 x 8 pixels."""
    stream = build_stream(SCENARIO, DataConfig(), 0)
    return replace(stream, tasks=stream.tasks[:TASKS])


def without(stream: Stream, gone: int) -> Stream:
    """The stream as ``scenario.skip_tasks`` gives it: ids, classes and order of the others stay."""
    kept = [task for task in stream.tasks if task.task_id != gone]
    tasks = tuple(replace(task, position=place) for place, task in enumerate(kept))
    return replace(stream, tasks=tasks, left_out=(gone,))


def narrow_stream() -> Stream:
    """A task of one class, then a task of one batch."""
    stream = small_stream()
    one, batch = stream.tasks[:2]
    label = one.classes[0]
    train, test = ((part.labels == label).nonzero()[:, 0] for part in (one.train, one.test))
    narrow = replace(one, classes=(label,), train=one.train.select(train), test=one.test.select(test))
    rows = torch.cat([(batch.train.labels == c).nonzero()[:2, 0] for c in batch.classes])
    return replace(stream, tasks=(narrow, replace(batch, train=batch.train.select(rows))))


def small_backbone() -> PromptedViT:
    """A ViT of five narrow blocks with random weights, in eval mode: the image is one patch beside the class token.

    The patch's own token is read, so that the features tell digits apart before anything is trained.
    """
    return copy.deepcopy(_first_backbone())


@functools.cache
def _first_backbone() -> PromptedViT:
    with seeded_globals(0, RUN_LEVEL, "small_backbone"):
        model = nano_model(SIDE, **SHAPE)
        for parameter in model.parameters():  # biases of zero would hide an error
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return PromptedViT(model.eval(), SIDE)


def small_learner(composition: Composition, stream: Stream, optimizer: OptimizerConfig, seed: int) -> ContinualLearner:
    """A learner that has learnt nothing."""
    backbone = small_backbone()
    transforms = Transforms.from_scenario(SCENARIO, backbone.input_size, backbone.mean, backbone.std)
    return ContinualLearner(backbone, composition, transforms, stream, optimizer, LearnerOptions(seed, BATCH))


def learn(
    learner: ContinualLearner,
    phases: Sequence[Phase],
    epochs: Sequence[int],
    watches: Sequence[Watch] = (),
    precision: str = "32-true",
) -> ContinualLearner:
    """Train as a run does, phase after phase; the learner.

    The global generators stand where they always stand at the start of a task, whatever was drawn before, so that what
    draws from them is not told by its numbers.
    """
    for phase, count in zip(phases, epochs, strict=True):
        with quiet(), seeded_globals(0, phase.task.task_id, "small_task"):
            _learn(learner, phase, count, watches, precision)
    return learner


def _learn(learner: ContinualLearner, phase: Phase, epochs: int, watches: Sequence[Watch], precision: str) -> None:
    learner.trainer = trainer = trainer_of(watches, precision)
    for watch in watches:
        watch.before(learner, phase)
    learner.begin_task(phase.task, epochs)
    for watch in watches:
        watch.begun(learner, phase)
    if learner.composition.needs_gradient:
        trainer.fit_loop.max_epochs = epochs
        images = learner.composition.training_set(phase.task)
        trainer.fit(learner, train_dataloaders=TaskLoader(images, phase.task.task_id, BATCH, learner.options.seed))
    for watch in watches:
        watch.trained(learner, phase)
    learner.end_task(phase.task)
    for watch in watches:
        watch.ended(learner, phase)


def trainer_of(watches: Sequence[Watch] = (), precision: str = "32-true") -> L.Trainer:
    """A trainer on the CPU, as a run makes it."""
    settings = TrainerConfig(batch_size=BATCH, accelerator="cpu", precision=precision, deterministic=False)
    return build_trainer(settings, list(watches))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's and the platform's talk out of the block."""
    names = ("cl_platform", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    with warnings.catch_warnings():
        quiet_libraries()
        warnings.simplefilter("ignore")
        for log, _ in levels:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in levels:
                log.setLevel(level)


def images_of(stream: Stream, split: str = "test") -> Tensor:
    """All images of a split of a stream, uint8 (n, 3, H, W)."""
    return torch.cat([getattr(task, split).images(slice(None)) for task in stream.tasks])


def answers(learner: ContinualLearner, images: Tensor, size: int | None = None) -> Tensor:
    """Logits (n, S) of uint8 images, asked for in batches of ``size``; all at once by default."""
    return torch.cat([learner.logits_of_images(part) for part in images.split(size or len(images))])
