"""Small learners on a few digits, built the way a run builds them, for tests that train in well under a second."""

from __future__ import annotations

import dataclasses
import functools
import logging
import warnings

import lightning as L
import torch

from cl_platform import registry
from cl_platform.backbones import Backbone, PromptedViT
from cl_platform.backbones.nano import nano_model
from cl_platform.batch import Batch
from cl_platform.cli.compose import compose
from cl_platform.learner import ContinualLearner, LearnerOptions
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.run_config import RunConfig, parse
from cl_platform.scenarios import Stream, Task, TaskLoader, Transforms, build_stream
from cl_platform.strategies import Step, Strategy, build_strategies
from cl_platform.strategies.phases import Phase

SMALL = (
    "scenario.train_per_class=8", "scenario.test_per_class=6", "trainer.accelerator=cpu", "trainer.batch_size=8",
    "trainer.max_epochs=1", "trainer.progress=false",
)  # fmt: skip
WIDTH, SIDE = 32, 16
# recommended values do not fit so small a trunk, or cost too much
SHAPED = {
    "num_components": 12, "projections": 64, "rows": "current_only", "steps": 3, "passes": 2,
    "layers": [0, 1, 2], "g_layers": [0], "e_layers": [1, 2],
}  # fmt: skip


@functools.cache
def _composed(strategy: str) -> RunConfig:
    fields = {field.name for field in dataclasses.fields(registry.strategies.get(strategy).Config)}
    fitting = [f"strategy.{strategy}.{k}={v}" for k, v in SHAPED.items() if k in fields]
    needs = registry.strategies.get(strategy).needs
    beside = f"[er,{strategy}]" if needs.buffer and "rows" not in fields else strategy
    return parse(compose([f"strategy={beside}", *SMALL, *fitting]))


def config_of(name: str, **groups: dict[str, object]) -> RunConfig:
    """What a user gets who types ``strategy=...``, made to fit :func:`tiny_vit`.

    Args:
        name: the strategy's.
        groups: changed keys; those of ``strategy`` are the strategy's own.
    """
    config = _composed(name)
    own = {**config.strategy, name: {**config.strategy[name], **groups.pop("strategy", {})}}
    changed = {group: dataclasses.replace(getattr(config, group), **keys) for group, keys in groups.items()}
    return dataclasses.replace(config, strategy=own, **changed)


@functools.cache
def digits(num_tasks: int = 2, setting: str = "class") -> Stream:
    """The first tasks of the digits: two classes each, 8 training and 6 test images a class."""
    config = config_of("finetune")
    stream = build_stream(dataclasses.replace(config.scenario, setting=setting), config.data, 0)
    return dataclasses.replace(stream, tasks=stream.tasks[:num_tasks])


def tiny_vit(**changes: object) -> PromptedViT:
    """Three blocks of width 32 with random weights, in eval mode; 5 tokens at 16 pixels."""
    with seeded_globals(0, RUN_LEVEL, "tiny"):
        model = nano_model(SIDE, **{"embed_dim": WIDTH, "depth": 3, "num_heads": 2, **changes})
        for parameter in model.parameters():  # zero biases and tiny tokens would hide an error
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return PromptedViT(model.eval(), SIDE)


def built(config: RunConfig, stream: Stream, seed: int = 0, backbone: Backbone | None = None) -> ContinualLearner:
    """A learner that has learnt nothing, on :func:`tiny_vit` or another backbone."""
    backbone = tiny_vit() if backbone is None else backbone
    transforms = Transforms.from_scenario(config.scenario, backbone.input_size, backbone.mean, backbone.std)
    options = LearnerOptions(seed, config.trainer.batch_size, config.head.init, config.evaluation.cache_bytes)
    return ContinualLearner(
        backbone, build_strategies(config.strategy), transforms, stream, config.optimizer, options
    )  # fmt: skip


def trainer_for(config: RunConfig, *callbacks: L.Callback) -> L.Trainer:
    """A trainer of one epoch as a run makes it, without loggers and without its talk."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        precision=config.trainer.precision,
        gradient_clip_val=config.trainer.gradient_clip_val,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def fit(learner: ContinualLearner, config: RunConfig, task: Task, *callbacks: L.Callback, epochs: int = 1) -> None:
    """Begin and train one task without ending it."""
    learner.trainer = trainer_for(config, *callbacks)
    learner.begin_task(task, epochs)
    if learner.composition.needs_gradient:
        learner.trainer.fit_loop.max_epochs = epochs
        images = learner.composition.training_set(task)
        loader = TaskLoader(images, task.task_id, config.trainer.batch_size, learner.options.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner.trainer.fit(learner, train_dataloaders=loader)


def learn(learner: ContinualLearner, config: RunConfig, tasks, *callbacks: L.Callback, epochs: int = 1):
    """Train on tasks, or phases, one after the other; the learner."""
    for entry in tasks:
        task = entry.task if isinstance(entry, Phase) else entry
        fit(learner, config, task, *callbacks, epochs=epochs)
        learner.end_task(task)
    return learner


def learnt(config: RunConfig, stream: Stream, seed: int = 0, backbone: Backbone | None = None, epochs: int = 1):
    """A learner that has learnt the whole stream in the order in which its strategy takes it."""
    learner = built(config, stream, seed, backbone)
    return learn(learner, config, learner.composition.arrange(stream.tasks), epochs=epochs)


def begun(config: RunConfig, stream: Stream, position: int = 0, backbone: Backbone | None = None) -> ContinualLearner:
    """A learner at the first batch of a task, with those before it learnt."""
    learner = learn(built(config, stream, backbone=backbone), config, stream.tasks[:position])
    learner.trainer = trainer_for(config)
    learner.begin_task(stream.tasks[position], 1)
    return learner


def first_step(learner: ContinualLearner, task: Task, batch_size: int = 8) -> tuple[Step, dict[str, torch.Tensor]]:
    """What the first training step of a begun task computes: the step, and its losses by name."""
    batch: Batch = next(iter(TaskLoader(task.train, task.task_id, batch_size, learner.options.seed)))
    learner.training_step(batch, 0)
    step = learner._last_step
    assert step is not None
    return step, learner.composition.losses(step)


def only(learner: ContinualLearner) -> Strategy:
    """The one strategy of a learner."""
    (strategy,) = learner.composition.strategies
    return strategy


def one_class(task: Task, label: int) -> Task:
    """A task narrowed to one of its classes."""
    parts = {}
    for name in ("train", "test"):
        image_set = getattr(task, name)
        parts[name] = image_set.select((image_set.labels == label).nonzero()[:, 0])
    return dataclasses.replace(task, classes=(label,), **parts)


def answers(learner: ContinualLearner, images: torch.Tensor, size: int | None = None) -> torch.Tensor:
    """Logits of uint8 images, asked for in batches of ``size``."""
    return torch.cat([learner.logits_of_images(part) for part in images.split(size or len(images))])


def images_of(stream: Stream, split: str = "test") -> torch.Tensor:
    """All images of a split of a stream, uint8 (n, 3, H, W)."""
    sets = [getattr(task, split) for task in stream.tasks]
    return torch.cat([image_set.images(slice(None)) for image_set in sets])


def copy_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers in other memory."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equal names, types, shapes and bits."""
    if sorted(one) != sorted(other):
        return False
    return all(t.dtype == other[name].dtype and torch.equal(t, other[name]) for name, t in one.items())


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names that only one side has, or whose bits differ."""
    names = sorted(set(one) | set(other))
    return [n for n in names if n not in one or n not in other or not same_bytes({n: one[n]}, {n: other[n]})]
