"""Learners of a few hundred numbers on coloured noise, taught in a blink, and requests to forget a task of theirs."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import nn

from cl_platform.backbones import Backbone
from cl_platform.copies import copied
from cl_platform.learner import ContinualLearner, LearnerOptions
from cl_platform.optimizers import OptimizerConfig
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.scenarios import ImageSet, Stream, Task, TransformConfig, Transforms
from cl_platform.strategies import build_strategies
from cl_platform.unlearning.approximate import ApproximateRequest, build_method
from cl_platform.unlearning.approximate.work import Work

SIDE, WIDTH, PER_CLASS = 8, 12, 10


@functools.cache
def noise_stream(tasks=3, setting="class", classes_per_task=2, per_class=PER_CLASS) -> Stream:
    """Every class has a colour and noise of its own; with ``setting=domain`` the classes come again in every task."""
    again = setting == "domain"
    count = classes_per_task * (1 if again else tasks)
    draw = np.random.default_rng(3)
    colours = draw.permutation(np.linspace(20, 235, 3 * count)).reshape(count, 3)
    labels = np.repeat(np.arange(count), per_class * (tasks if again else 1))
    pixels = colours[labels][:, :, None, None] + draw.normal(0, 20, (len(labels), 3, SIDE, SIDE))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    parts = []
    for t in range(tasks):
        classes = tuple(range(count)) if again else tuple(range(t * classes_per_task, (t + 1) * classes_per_task))
        rows = np.flatnonzero(np.isin(labels, classes))
        if again:
            rows = rows[t::tasks]
        images = ImageSet(torch.from_numpy(labels[rows]), torch.from_numpy(rows), pixels)
        nothing = images.select(torch.arange(0))
        parts.append(Task(t, t, classes, images, nothing, images))
    names = tuple(str(c) for c in range(count))
    shape = (3, SIDE, SIDE)
    return Stream("noise", tuple(parts), setting, count, names, tuple(range(count)), "", shape, False, 0, "")


def perceptron(norm=False) -> Backbone:
    """Two layers; with ``norm`` a layer with running statistics between them."""
    with seeded_globals(0, RUN_LEVEL, "perceptron"):
        layers = [nn.Flatten(), nn.Linear(3 * SIDE * SIDE, WIDTH)]
        layers += [nn.BatchNorm1d(WIDTH)] if norm else []
        model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    return Backbone(model.eval(), "other", WIDTH, SIDE)


def taught(strategy="finetune", setting="class", **keys) -> ContinualLearner:
    """A learner of its own that knows all tasks of :func:`noise_stream`."""
    return copied(_taught(strategy, setting, tuple(sorted(keys.items()))))


@functools.cache
def _taught(strategy, setting, keys) -> ContinualLearner:
    return teach(strategy, noise_stream(setting=setting), **dict(keys))


def teach(strategy, stream, norm=False, updates=40, augment="none", **keys) -> ContinualLearner:
    """A learner that knows all tasks of a stream: its trained parameters are fitted to all images at once."""
    transforms = Transforms(TransformConfig(augment=augment), SIDE, (0.5,) * 3, (0.5,) * 3)
    learner = ContinualLearner(
        perceptron(norm), build_strategies({strategy: keys}), transforms, stream,
        OptimizerConfig(name="sgd", lr=0.1), LearnerOptions(seed=5, batch_size=8),
    )  # fmt: skip
    for task in stream.tasks:
        learner.begin_task(task, 1)
        learner.end_task(task)
    images = torch.cat([transforms.evaluate(task.train.images(slice(None))) for task in stream.tasks])
    labels = torch.cat([task.train.labels for task in stream.tasks])
    trained = [p for p in learner.parameters() if p.requires_grad] + list(learner.head.parameters())
    trained = list({id(p): p.requires_grad_() for p in trained}.values())
    rule = torch.optim.Adam(trained, 0.02)
    learner.eval()
    for _ in range(updates):
        rule.zero_grad()
        nn.functional.cross_entropy(learner.head(learner.backbone(images)), labels).backward()
        rule.step()
    learner.zero_grad(set_to_none=True)
    return learner


def asked(stream=None, task_id=1, **changes) -> ApproximateRequest:
    """A request to forget a task, with the training images of all others to retain."""
    stream = noise_stream() if stream is None else stream
    task = stream.task(task_id)
    retain = {t.task_id: t.train for t in stream.tasks if t.task_id != task_id}
    given = {"task": task, "forget": task.train, "retain": retain, "seed": 5, **changes}
    return ApproximateRequest(**given)


def at_work(name="grad_ascent", learner=None, stream=None, **changes) -> Work:
    """The copy that a method would get."""
    stream = noise_stream() if stream is None else stream
    return Work(taught() if learner is None else learner, asked(stream, **changes), name)


def method(name, **values):
    """A method with some of its keys changed."""
    return build_method(name, {key.removesuffix("_"): value for key, value in values.items()})


def accuracy(learner, images) -> float:
    """Share of an image set that is answered right among all seen classes."""
    seen = torch.tensor(learner.seen_classes())
    answers = seen[learner.logits_of_images(images.images(slice(None))).argmax(1)]
    return float((answers == images.labels).float().mean())


def state_of(learner) -> dict[str, torch.Tensor]:
    """A copy of the whole state."""
    return {name: value.clone() for name, value in learner.state_dict().items()}


def changed(learner, before) -> set[str]:
    """Names of what is not bit-identical to ``before``, owner records apart."""
    now = learner.state_dict()
    assert now.keys() == before.keys()
    return {n for n, v in now.items() if not n.startswith("owners.") and not torch.equal(v, before[n])}


def record(monkeypatch, where, name):
    """The arguments of each call of a function or method, in order."""
    calls, original = [], getattr(where, name)

    def noted(*args, **keys):
        calls.append(args)
        return original(*args, **keys)

    monkeypatch.setattr(where, name, noted)
    return calls


def shorter(images, count):
    """The first images of a set."""
    return images.select(torch.arange(count))


def replaced(request, **changes):
    """A request with other values."""
    return dataclasses.replace(request, **changes)
