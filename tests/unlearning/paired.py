"""Two learners of one seed: one that learnt a task and dropped it, and one whose stream never had the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from tiny import built, config_of, digits, learn, tiny_vit

import cl_platform.strategies  # noqa: F401
from cl_platform import registry
from cl_platform.config import typed
from cl_platform.learner import ContinualLearner, LearnerOptions
from cl_platform.run_config import RunConfig
from cl_platform.scenarios import Stream, Transforms
from cl_platform.strategies.base import Strategy
from cl_platform.strategies.composition import Composition
from cl_platform.unlearning.canonical import Comparison, compare, digests
from cl_platform.unlearning.lineage import learnt_state

GONE = 1
FIXED = {"passes": 1, "buffer": {"policy": "greedy", "mode": "first_k", "size": 40, "fixed_classes": 10}}
CASES = [(name, {}) for name in registry.strategies.names() if not registry.strategies.get(name).leaks]
CASES += [
    ("linear_probe", {"loss": "task"}),
    ("dual_prompt", {"isolated": True}),
    ("dual_prompt", {"g_length": 0, "copy_previous": False}),
    ("gdumb", FIXED),
    ("gdumb", {**FIXED, "buffer": {"policy": "class_balanced", "size": 40, "fixed_classes": 10}}),
    ("gdumb", {**FIXED, "buffer": {"policy": "ring", "size": 40}}),
    ("slda", {"epsilon": 0.5}),
    ("s_prompt", {"router": "class_mean", "length": 0}),
]
IDS = [f"{name}-{'-'.join(map(str, keys)) or 'default'}" for name, keys in CASES]
"""Strategies, with keys, that learn every task apart from the others."""


def quick(name: str) -> RunConfig:
    """What a user gets who types ``strategy=...``, with one update a task and few passes of its own."""
    own = {"gdumb": {"passes": 1}, "fpf": {"steps": 1}, "k_fpf": {"steps": 1}}.get(name, {})
    return config_of(name, strategy=own, trainer={"batch_size": 16})


def without(stream: Stream, *gone: int) -> Stream:
    """The stream as ``scenario.skip_tasks`` gives it: ids, classes and order of the others stay."""
    kept = [task for task in stream.tasks if task.task_id not in gone]
    tasks = tuple(dataclasses.replace(task, position=place) for place, task in enumerate(kept))
    return dataclasses.replace(stream, tasks=tasks, left_out=gone)


def trained(config: RunConfig, stream: Stream, learner: ContinualLearner | None = None) -> ContinualLearner:
    """A learner that has learnt the whole stream as its strategy arranges it."""
    learner = built(config, stream) if learner is None else learner
    return learn(learner, config, learner.composition.arrange(stream.tasks))


def forgot(
    config: RunConfig, stream: Stream, gone: int = GONE, learner: ContinualLearner | None = None
) -> ContinualLearner:
    """A learner that has learnt the whole stream and dropped one task of it."""
    learner = trained(config, stream, learner)
    learner.drop_task(gone)
    return learner


def forgot_between(config: RunConfig, stream: Stream, gone: int = GONE) -> ContinualLearner:
    """A learner that dropped a task before it learnt the last one."""
    learner = learn(built(config, stream), config, stream.tasks[:-1])
    learner.drop_task(gone)
    return learn(learner, config, stream.tasks[-1:])


def compared(one: ContinualLearner, other: ContinualLearner) -> Comparison:
    """Every byte that both have learnt."""
    return compare(learnt_state(one), learnt_state(other))


def names_that_differ(one: ContinualLearner, other: ContinualLearner, among: Iterable[str] = ("",)) -> set[str]:
    """Keys at which the learnt states differ, of those that begin with one of ``among``."""
    first, second = digests(learnt_state(one)), digests(learnt_state(other))
    names = {name for name in {*first, *second} if name.startswith(tuple(among))}
    return {name for name in names if first.get(name) != second.get(name)}


def built_with(cls: type[Strategy], config: RunConfig, stream: Stream, backbone=None) -> ContinualLearner:
    """As :func:`tiny.built`, with a strategy that no registry knows."""
    backbone = tiny_vit() if backbone is None else backbone
    (given,) = config.strategy.values()
    fields = {field.name.rstrip("_") for field in dataclasses.fields(cls.Config)}
    keys = {name: value for name, value in given.items() if name in fields}
    transforms = Transforms.from_scenario(config.scenario, backbone.input_size, backbone.mean, backbone.std)
    options = LearnerOptions(0, config.trainer.batch_size, config.head.init, config.evaluation.cache_bytes)
    composition = Composition([cls(typed(cls.Config, keys, "strategy.test"))])
    return ContinualLearner(backbone, composition, transforms, stream, config.optimizer, options)


def pair(cls: type[Strategy], config: RunConfig, make_backbone=tiny_vit, stream: Stream | None = None):
    """Learners with a given strategy: one that dropped a task, and one that never saw it."""
    stream = digits(4) if stream is None else stream
    reduced = without(stream, GONE)
    dropped = forgot(config, stream, GONE, built_with(cls, config, stream, make_backbone()))
    return dropped, trained(config, reduced, built_with(cls, config, reduced, make_backbone()))
