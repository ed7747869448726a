"""What the checks note down while the shared training runs. Nothing here changes what is learnt."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from cl_platform.evaluation import count_correct
from cl_platform.learner import ContinualLearner
from cl_platform.scenarios import Task
from cl_platform.strategies.phases import Phase
from cl_platform.testing.small import Watch, answers
from cl_platform.unlearning.canonical import digests
from cl_platform.unlearning.lineage import Write, WriteCheck

GENERATORS = ("torch", "numpy", "random")


def tasks_in(phase: Phase) -> tuple[Task, ...]:
    """The tasks of the stream that a phase trains on."""
    return phase.task.parts or (phase.task,)


@dataclass(frozen=True)
class Snapshot:
    """A learner behind the end of a task.

    Attributes:
        state: a copy of its ``state_dict``.
        learnt: ids of the tasks that it knows.
        frozen: whether the backbone was out of training.
        further_updates: its counter of updates outside the trainer, which a checkpoint keeps beside the state.
    """

    state: dict[str, Tensor]
    learnt: tuple[int, ...]
    frozen: bool
    further_updates: int

    @classmethod
    def of(cls, learner: ContinualLearner) -> Snapshot:
        """The learner as it is."""
        state = {name: tensor.detach().clone() for name, tensor in learner.state_dict().items()}
        return cls(state, tuple(learner.learnt), learner.backbone.frozen, learner.further_updates)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each tensor by its key."""
        return digests(self.state)


class Snapshots(Watch):
    """A snapshot behind the end of every task."""

    def __init__(self) -> None:
        self.taken: list[Snapshot] = []

    def ended(self, learner: ContinualLearner, phase: Phase) -> None:
        """Take one."""
        self.taken.append(Snapshot.of(learner))


class Draws(Watch):
    """Where a global generator was drawn from; its seeding at the start of an epoch is the learner's own."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}  # generator -> where
        self._before: dict[str, Any] = {}

    def before(self, learner: ContinualLearner, phase: Phase) -> None:
        """Note the states ahead of the start of a task."""
        self._before = _states()

    def begun(self, learner: ContinualLearner, phase: Phase) -> None:
        """Compare."""
        self._compare("begin_task, training_set or trainable")

    def on_train_batch_start(self, trainer: Any, learner: Any, batch: Any, batch_idx: int) -> None:
        """Compare with the end of the step before; the first one follows the seeding."""
        if batch_idx:
            self._compare_step(learner)
        self._before = _states()

    def on_train_epoch_end(self, trainer: Any, learner: Any) -> None:
        """Compare."""
        self._compare_step(learner)

    def trained(self, learner: ContinualLearner, phase: Phase) -> None:
        """Note the states ahead of the end of a task."""
        self._before = _states()

    def ended(self, learner: ContinualLearner, phase: Phase) -> None:
        """Compare."""
        self._compare("refine or end_task")

    def _compare_step(self, learner: ContinualLearner) -> None:
        dropout = any(isinstance(m, _DropoutNd) and m.p > 0 for m in learner.composition.modules())
        self._compare("a training step", GENERATORS[1:] if dropout else GENERATORS)

    def _compare(self, where: str, generators: tuple[str, ...] = GENERATORS) -> None:
        now = _states()
        for name in generators:
            if repr(now[name]) != repr(self._before[name]):
                self.found.setdefault(name, where)
        self._before = now


def _states() -> dict[str, Any]:
    legacy: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": (legacy[1].tobytes(), legacy[2]),
        "random": random.getstate(),
    }


class Terms(Watch):
    """Which loss terms move a gradient, and which trained parameters get one."""

    def __init__(self) -> None:
        self.moving: dict[str, bool] = {}  # term -> whether it has moved the gradient of a trained parameter
        self.odd: dict[str, str] = {}  # term -> what is wrong with its value
        self.untouched: dict[str, tuple[int, ...]] = {}  # trained parameters without a gradient -> shape

    def on_before_backward(self, trainer: Any, learner: Any, loss: Tensor) -> None:
        """Ask each term that was not seen to move one yet for its gradients."""
        parameters = _trained(learner)
        for name, value in learner.terms.items():
            if value.dim() or not bool(torch.isfinite(value)):
                self.odd.setdefault(name, f"shape {tuple(value.shape)}, value {value.detach().flatten()[:3].tolist()}")
            if not self.moving.get(name):
                self.moving[name] = _moves(value.sum(), parameters)

    def on_before_optimizer_step(self, trainer: Any, learner: Any, optimizer: Any) -> None:
        """Look for parameters that the backward pass did not reach."""
        trained = {id(p) for p in _trained(learner)}
        for name, parameter in learner.named_parameters():
            if id(parameter) in trained and parameter.grad is None:
                self.untouched[name] = tuple(parameter.shape)


def _trained(learner: ContinualLearner) -> list[nn.Parameter]:
    return [p for group in learner.groups for p in group.parameters]


def _moves(value: Tensor, parameters: list[nn.Parameter]) -> bool:
    if not value.requires_grad:
        return False
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return any(gradient is not None and bool(gradient.any()) for gradient in found)


class Frozen(Watch):
    """Which parameters moved although nothing says that they are trained, and which are trained outside the state."""

    def __init__(self) -> None:
        self.moved: dict[str, int] = {}  # name -> task id
        self.outside: list[tuple[int, ...]] = []  # shapes
        self._before: dict[str, str] = {}

    def begun(self, learner: ContinualLearner, phase: Phase) -> None:
        """Note what is frozen."""
        own = {id(p) for p in learner.parameters()}
        self.outside += [tuple(p.shape) for p in _trained(learner) if id(p) not in own]
        self._before = digests(dict(_still(learner)))

    def trained(self, learner: ContinualLearner, phase: Phase) -> None:
        """Compare."""
        named = dict(learner.named_parameters())
        now = digests({name: named[name].detach() for name in self._before if name in named})
        for name, digest in now.items():
            if digest != self._before[name]:
                self.moved.setdefault(name, phase.task.task_id)


def _still(learner: ContinualLearner) -> Iterator[tuple[str, Tensor]]:
    free = {id(p) for p in _trained(learner)}
    free |= {id(p) for strategy in learner.composition.strategies for p in strategy.further_parameters()}
    for name, parameter in learner.named_parameters():
        if id(parameter) not in free:
            yield name, parameter.detach()


class Writes(Watch):
    """What changed while a task was learnt whose owner record lacks the task."""

    def __init__(self) -> None:
        self.found: list[Write] = []
        self._check = WriteCheck()

    def before(self, learner: ContinualLearner, phase: Phase) -> None:
        """Note what there is."""
        self._check.before(learner)

    def ended(self, learner: ContinualLearner, phase: Phase) -> None:
        """Compare with the owner records."""
        self.found += self._check.after(learner, *(task.task_id for task in tasks_in(phase)))


class Evaluating(Watch):
    """Evaluates the tasks so far around each task and behind each batch, as a run does.

    Args:
        images: uint8, to be answered behind each task.

    Attributes:
        answers: their logits, an entry a task.
    """

    def __init__(self, images: Tensor) -> None:
        self._images, self._tasks = images, list[Task]()
        self.answers: list[Tensor] = []

    def begun(self, learner: ContinualLearner, phase: Phase) -> None:
        """Look once, in the midst of a task from here on."""
        self._tasks += tasks_in(phase)
        count_correct(learner, self._tasks)

    def on_train_batch_end(self, trainer: Any, learner: Any, *rest: Any) -> None:
        """Look again."""
        count_correct(learner, self._tasks[-1:])

    def ended(self, learner: ContinualLearner, phase: Phase) -> None:
        """Look at all."""
        count_correct(learner, self._tasks)
        self.answers.append(answers(learner, self._images))
