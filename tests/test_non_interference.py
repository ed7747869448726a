"""Training must not notice that it is watched; four planted faults show that the comparison would see it if it did."""

import lightning as L
import numpy as np
import pytest
import torch
from fingerprints import differing_kinds, fingerprint
from tiny import SIDE, built, config_of, digits, trainer_for
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cl_platform.strategies  # noqa: F401  registers the strategies
from cl_platform import registry
from cl_platform.backbones.base import Backbone
from cl_platform.callbacks.continual_evaluation import ContinualEvaluation, GridSettings
from cl_platform.metrics.continual_log import parse
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.scenarios import TaskLoader
from cl_platform.strategies.phases import Phase

NAMES = registry.strategies.names()


def every_step(folder, updates, name="every_step", stream=None, **settings):
    chosen = {"k": 3, "images_per_task": 6, "max_overhead": 0.25, "max_rate": 0.5, "min_per_task": 3, "reserve": 0.2}
    grid = GridSettings(name=name, updates=tuple(updates), images_per_update=8, **{**chosen, **settings})
    evaluation = ContinualEvaluation(stream or digits(), 0, grid, folder)
    evaluation.open()
    return evaluation


def train(learner, config, evaluation=None, watchers=(), epochs=2, phases=None):
    """Both tasks the way a run does it; a fingerprint after each."""
    prints, trained = [], 0
    watching = [evaluation] if evaluation is not None else []
    trainer = trainer_for(config, *watching, *watchers)
    learner.trainer = trainer
    for phase in phases or learner.composition.arrange(digits().tasks):
        learner.begin_task(phase.task, epochs, trained)
        if evaluation is not None:
            evaluation.begin_task(learner, phase, learner.steps)
        if learner.composition.needs_gradient:
            trained += epochs
            trainer.fit_loop.max_epochs = trained
            images = learner.composition.training_set(phase.task)
            trainer.fit(learner, TaskLoader(images, phase.task.task_id, 8, 0))
        learner.end_task(phase.task)
        if evaluation is not None:
            evaluation.end_task(learner, phase, learner.steps)
        prints.append(fingerprint(learner))
    return prints


@pytest.mark.parametrize("name", NAMES)
def test_every_step_and_off_end_with_the_same_bytes_for_every_strategy(name, tmp_path):
    config = config_of(name)
    composition = built(config, digits()).composition
    arranged = composition.arrange(digits().tasks)
    updates = [0] * len(digits().tasks)
    for number, phase in enumerate(arranged):
        size = composition.training_size([before.task for before in arranged[: number + 1]])
        updates[phase.position] = 2 * -(-size // 8)
    evaluation = every_step(tmp_path, updates)
    learner = built(config, digits())
    watched = train(learner, config, evaluation)
    alone = train(built(config, digits()), config)
    assert len(watched) == len(arranged)
    assert [differing_kinds(one, other) for one, other in zip(watched, alone, strict=True)] == [set()] * len(arranged)
    log = parse((tmp_path / "continual_eval.csv").read_text(), task_ids=[0, 1])
    assert not log.bad_rows
    steps = {row.global_step for row in log.rows if row.event == "step"}
    assert learner.steps >= sum(updates) or name not in _GRADIENT
    assert steps == set(range(1, learner.steps + 1))


_GRADIENT = [name for name in NAMES if registry.strategies.get(name).needs.gradient]


# -- planted faults -------------------------------------------------------------------------------------------------


class Restless(Backbone):
    """Batch norm and dropout: what a careless evaluation disturbs."""

    def __init__(self) -> None:
        with seeded_globals(0, RUN_LEVEL, "restless"):
            model = nn.Sequential(
                nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2)
            )
        super().__init__(model, "other", 24, SIDE)


class Watcher(L.Callback):
    """Does something with six test images after every batch."""

    def __init__(self) -> None:
        task = digits().tasks[0]
        self.images, self.labels = task.test.images(slice(None)), task.test.labels

    def logits(self, learner):
        return learner.head(learner.backbone(learner.transforms.evaluate(self.images)))


class BatchNormInTrainMode(Watcher):
    def on_train_batch_end(self, trainer, learner, *rest):
        state = torch.get_rng_state()
        with torch.no_grad():
            self.logits(learner)
        torch.set_rng_state(state)


class GlobalGenerator(Watcher):
    def on_train_batch_end(self, trainer, learner, *rest):
        with learner.answering():
            for images, _ in DataLoader(TensorDataset(self.images, self.labels), batch_size=6):
                learner.head(learner.backbone(learner.transforms.evaluate(images)))


class GradientLeft(Watcher):
    def on_train_batch_end(self, trainer, learner, *rest):
        modes = [(m, m.training) for m in learner.modules()]
        learner.eval()
        F.cross_entropy(self.logits(learner), self.labels).backward()
        for module, mode in modes:
            module.training = mode


class ModeNotRestored(Watcher):
    def on_train_batch_end(self, trainer, learner, *rest):
        learner.eval()
        with torch.no_grad():
            self.logits(learner)


class NumpyDrawn(Watcher):
    def on_train_batch_end(self, trainer, learner, *rest):
        np.random.permutation(6)


RULE = {"name": "adamw", "lr": 0.01, "lr_per_256": None, "schedule": "constant"}


def restless(*watchers, evaluation=None):
    config = config_of("finetune", optimizer=RULE, trainer={"accumulate_grad_batches": 2})
    learner = built(config, digits(), backbone=Restless())
    return train(learner, config, evaluation, watchers, epochs=6)


def test_accumulated_batches_batch_norm_and_dropout_do_not_notice_the_evaluation(tmp_path):
    evaluation = every_step(tmp_path, [6, 6])
    watched, alone, again = restless(evaluation=evaluation), restless(), restless()
    assert [differing_kinds(a, b) for a, b in zip(alone, again, strict=True)] == [set(), set()]
    assert [differing_kinds(a, b) for a, b in zip(watched, alone, strict=True)] == [set(), set()]
    log = parse((tmp_path / "continual_eval.csv").read_text())
    assert {row.global_step for row in log.rows if row.event == "step"} == set(range(1, 13))


@pytest.mark.parametrize(
    ("fault", "seen_in"),
    [
        (BatchNormInTrainMode, {"buffers"}),
        (GlobalGenerator, {"random"}),
        (GradientLeft, {"weights", "optimizer"}),
        (ModeNotRestored, {"modes", "random", "weights", "buffers", "optimizer"}),
        (NumpyDrawn, {"random"}),
    ],
)
def test_the_comparison_sees_a_planted_fault(fault, seen_in):
    planted, alone = restless(fault()), restless()
    found = set.union(*(differing_kinds(a, b) for a, b in zip(planted, alone, strict=True)))
    assert seen_in <= found, found
    if fault is BatchNormInTrainMode:
        assert "weights" not in differing_kinds(planted[0], alone[0])  # a test of parameters alone would miss it


def test_a_failing_evaluation_puts_modes_back(tmp_path, monkeypatch):
    config = config_of("finetune")
    learner = built(config, digits(), backbone=Restless())
    learner.trainer = trainer_for(config)
    learner.begin_task(digits().tasks[0], 1)
    evaluation = every_step(tmp_path, [2, 2])
    monkeypatch.setattr(learner.composition, "predict", lambda batch: 1 / 0)
    before = [m.training for m in learner.modules()]
    with pytest.raises(ZeroDivisionError):
        evaluation.begin_task(learner, Phase(digits().tasks[0], 0), 0)
    assert [m.training for m in learner.modules()] == before
    assert torch.is_grad_enabled()


def test_evaluation_asks_for_no_gradient(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was asked for or cleared")

    config = config_of("finetune")
    learner = built(config, digits(), backbone=Restless())
    learner.trainer = trainer_for(config)
    learner.begin_task(digits().tasks[0], 1)
    evaluation = every_step(tmp_path, [2, 2])
    for owner, name in ((torch.Tensor, "backward"), (torch.optim.Optimizer, "zero_grad"), (nn.Module, "zero_grad")):
        monkeypatch.setattr(owner, name, refuse)
    evaluation.begin_task(learner, Phase(digits().tasks[0], 0), 0)
    assert not any(t.requires_grad for t in evaluation._ready.columns.values())
