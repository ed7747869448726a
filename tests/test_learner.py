"""What holds for every strategy, whatever it is: a new one is tested here by being registered.

A strategy that reads the frozen trunk's features (``query``), or adds prompts or adapters to its blocks, must leave the
trunk as it was; one that learns in closed form has no gradient to look at, and says whether it draws. Nothing else is
asked about which strategy it is.
"""

import dataclasses
import inspect

import lightning as L
import pytest
import torch
from tiny import (
    answers,
    begun,
    built,
    config_of,
    copy_of,
    differing,
    digits,
    fit,
    images_of,
    learn,
    learnt,
    one_class,
)

import cl_platform.strategies  # noqa: F401  registers the strategies
from cl_platform import registry
from cl_platform.backbones import BackboneConfig, build_backbone
from cl_platform.evaluation import count_correct
from cl_platform.scenarios import TaskLoader
from cl_platform.strategies import Strategy

NAMES = registry.strategies.names()
GRADIENT = [name for name in NAMES if registry.strategies.get(name).needs.gradient]
FROZEN = [n for n in NAMES if registry.strategies.get(n).query != "none" or registry.strategies.get(n).needs.prompts]
TRAINED = [name for name in GRADIENT if name not in FROZEN]
AT_ONCE = [name for name in NAMES if name not in FROZEN + TRAINED]  # trained between tasks, on no batch of the stream

_LEARNT: dict = {}


def ready(name):
    """One learner per strategy that has learnt two tasks; for tests that only ask it."""
    if name not in _LEARNT:
        _LEARNT[name] = learnt(config_of(name), digits())
    return _LEARNT[name]


def tasks_of(name):
    """What the strategy is trained on: the tasks, or their union."""
    return [phase.task for phase in built(config_of(name), digits()).composition.arrange(digits().tasks)]


def test_every_strategy_is_covered():
    assert set(NAMES) == set(FROZEN) | set(TRAINED) | set(AT_ONCE)
    assert FROZEN and TRAINED


# -- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_task_id_and_no_label_reaches_what_answers(name, monkeypatch):
    learner, seen = ready(name), []
    assert list(inspect.signature(learner.logits_of_images).parameters) == ["images"]
    assert list(inspect.signature(Strategy.predict).parameters) == ["self", "batch"]
    for strategy in learner.composition.strategies:
        assert list(inspect.signature(type(strategy).predict).parameters) == ["self", "batch"]
        assert list(inspect.signature(type(strategy).forward).parameters) == ["self", "batch"]
    real = learner.composition.predict
    monkeypatch.setattr(learner.composition, "predict", lambda batch: seen.append(batch) or real(batch))
    task = digits().tasks[0]
    with learner.answering():
        by_id = [learner.logits_of(task_id, "elsewhere", task.test, torch.arange(12)) for task_id in (0, 1, 77)]
    assert torch.equal(by_id[0], by_id[1])
    assert torch.equal(by_id[0], by_id[2])
    answers(learner, task.test.images(slice(None)))
    for batch in seen:
        assert set(batch.extra) <= {"query"}
        for column in (batch.task_ids, batch.labels, batch.example_ids):
            assert bool((column == -1).all())


@pytest.mark.parametrize("name", NAMES)
def test_kept_features_and_fresh_ones_give_the_same_bits(name):
    learner, task = ready(name), digits().tasks[1]
    rows = torch.arange(len(task.test))
    learner.cache.forget(task.task_id)
    with learner.answering():
        missed = learner.logits_of(task.task_id, "test", task.test, rows)
        forwarded = learner.cache.images_forwarded
        hit = learner.logits_of(task.task_id, "test", task.test, rows)
        some = learner.logits_of(task.task_id, "test", task.test, rows[[7, 2]])
    assert learner.cache.images_forwarded == forwarded
    assert torch.equal(missed, hit)
    assert torch.equal(missed, answers(learner, task.test.images(rows)))
    torch.testing.assert_close(some, missed[[7, 2]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FROZEN)
def test_a_changed_trunk_misses_the_kept_features(name):
    learner, task = begun(config_of(name), digits()), digits().tasks[0]
    learner.end_task(task)
    before = learner.cache.features(0, "test", task.test).clone()
    next(learner.backbone.parameters()).data.add_(0.5)
    learner.cache.refresh()
    assert not torch.equal(learner.cache.features(0, "test", task.test), before)


@pytest.mark.parametrize("name", NAMES)
def test_other_images_under_the_same_name_are_not_answered_from_the_kept_features(name):
    learner, task = ready(name), digits().tasks[0]
    one, other = task.test.select(torch.arange(6)), task.test.select(torch.arange(6, 12))
    with learner.answering():
        learner.logits_of(5, "part", one, torch.arange(6))
        found = learner.logits_of(5, "part", other, torch.arange(6))
    assert torch.equal(found, answers(learner, other.images(slice(None))))


@pytest.mark.parametrize("name", NAMES)
def test_no_module_is_in_training_mode_while_it_answers(name, monkeypatch):
    learner, training = ready(name), []
    real = learner.composition.predict

    def spy(batch):
        training.append([m for m in learner.modules() if m.training])
        return real(batch)

    monkeypatch.setattr(learner.composition, "predict", spy)
    learner.backbone.unfreeze()  # so that it follows what is asked of all
    learner.train()
    answers(learner, images_of(digits()), 12)
    count_correct(learner, digits().tasks)
    assert training == [[]] * 4


# -- state ----------------------------------------------------------------------------------------------------------


def _owned_by_the_first(learner):
    found = {}
    for part in learner.composition.components():
        assert part.tensors, f"{part.name} declares no tensor"
        if part.tasks == (0,):
            found.update({f"{part.name}.{n}": t for n, t in part.tensors.items()})
    return copy_of(found)


@pytest.mark.parametrize("name", NAMES)
def test_state_keys_of_owned_parts_hold_the_task_id(name):
    learner = ready(name)
    for part in learner.composition.components():
        room = "composition" if part.name == "teacher" else "composition.members"
        keys = [k for k in learner.state_dict() if k.startswith(f"{room}.{part.name}")]
        assert keys, part.name
        if len(part.tasks) == 1:
            assert all(f".tasks.{part.tasks[0]}." in key for key in keys)


# -- training -------------------------------------------------------------------------------------------------------


class _Watch(L.Callback):
    """Notes, at every step, the trunk's modes, and which of its weights have a gradient."""

    def __init__(self):
        self.trunk_training, self.trunk_gradients, self.learner_training, self.optimizers = [], 0, [], []

    def on_train_batch_start(self, trainer, learner, batch, batch_idx):
        self.trunk_training.append(any(m.training for m in learner.backbone.modules()))
        self.learner_training.append(learner.head.training and all(s.training for s in learner.composition.strategies))
        self.optimizers.append(trainer.optimizers[0])

    def on_before_optimizer_step(self, trainer, learner, optimizer):
        self.trunk_gradients += sum(p.grad is not None for p in learner.backbone.parameters())


@pytest.mark.parametrize("name", [n for n in FROZEN if n in GRADIENT])
def test_the_trunk_is_in_eval_mode_in_every_step_and_none_of_its_bytes_move(name):
    config, watch = config_of(name), _Watch()
    learner = built(config, digits())
    before, digest = copy_of(learner.backbone.state_dict()), learner.backbone.digest()
    for task in digits().tasks:
        fit(learner, config, task, watch, epochs=2)
        learner.train()  # what a user or Lightning may call
        assert not any(m.training for m in learner.backbone.modules())
        learner.end_task(task)
    assert len(watch.trunk_training) == 2 * 2 * 2
    assert not any(watch.trunk_training)
    assert all(watch.learner_training)
    assert watch.trunk_gradients == 0
    assert all(p.grad is None and not p.requires_grad for p in learner.backbone.parameters())
    assert learner.backbone.digest() == digest
    assert not differing(before, learner.backbone.state_dict())


@pytest.mark.parametrize("name", [n for n in FROZEN if n not in GRADIENT])
def test_a_closed_form_moves_no_byte_of_the_trunk_and_takes_no_step(name):
    learner = built(config_of(name), digits())
    digest = learner.backbone.digest()
    learn(learner, config_of(name), digits().tasks)
    assert learner.backbone.digest() == digest
    assert learner.trainable_parameters() == 0
    assert not any(p.requires_grad for p in learner.parameters())


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_trunk_is_in_training_mode_in_every_step(name):
    config, watch = config_of(name), _Watch()
    learner = built(config, digits())
    digest = learner.backbone.digest()
    for phase in learner.composition.arrange(digits().tasks):
        fit(learner, config, phase.task, watch)
        learner.end_task(phase.task)
        count_correct(learner, digits().tasks[: phase.position + 1])
    assert all(watch.trunk_training)
    assert watch.trunk_gradients
    assert learner.backbone.digest() != digest


@pytest.mark.parametrize("name", GRADIENT)
def test_each_task_has_an_optimizer_of_its_own_over_what_it_trains_and_nothing_else(name):
    config, watch = config_of(name), _Watch()
    learner = built(config, digits())
    for task in digits().tasks:
        fit(learner, config, task, watch)
        inside = {id(p) for group in watch.optimizers[-1].param_groups for p in group["params"]}
        assert inside == {id(p) for p in learner.parameters() if p.requires_grad}
        assert learner.trainable_parameters() == sum(p.numel() for p in learner.parameters() if p.requires_grad)
        learner.end_task(task)
    assert len({id(o) for o in watch.optimizers}) == 2


@pytest.mark.parametrize("name", GRADIENT)
def test_the_loss_is_the_sum_of_the_terms_and_all_that_is_trained_moves(name):
    learner = begun(config_of(name), digits(), 0)
    task, seen = digits().tasks[0], []
    real = learner.composition.losses
    learner.composition.losses = lambda step: seen.append(real(step)) or seen[-1]
    batch = next(iter(TaskLoader(task.train, 0, 8, 0)))
    loss = learner.training_step(batch, 0)
    torch.testing.assert_close(loss, sum(v.float() for v in seen[-1].values()))
    loss.backward()
    del learner.composition.losses
    assert all(p.grad is not None for p in learner.parameters() if p.requires_grad)
    assert all(p.grad is None for p in learner.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_image_is_a_task(name):
    task = digits().tasks[0]
    single = dataclasses.replace(one_class(task, 0), train=task.train.select((task.train.labels == 0).nonzero()[:1, 0]))
    learner = learn(built(config_of(name), digits()), config_of(name), [single])
    assert bool(torch.isfinite(answers(learner, images_of(digits()))).all())


@pytest.mark.parametrize("setting", ["domain", "task"])
@pytest.mark.parametrize("name", NAMES)
def test_classes_that_come_back_and_known_tasks_work(name, setting):
    stream = digits(setting=setting)
    if setting == "domain":
        first, second = stream.tasks
        stream = dataclasses.replace(stream, tasks=(first, dataclasses.replace(first, task_id=1, position=1)))
    learner = built(config_of(name), stream)
    learn(learner, config_of(name), learner.composition.arrange(stream.tasks))
    counts = count_correct(learner, stream.tasks)
    assert counts.total == [len(task.test) for task in stream.tasks]
    assert learner.seen_classes() == sorted({c for task in stream.tasks for c in task.classes})


# -- the learner itself ---------------------------------------------------------------------------------------------


def test_a_learner_that_begins_no_task_trains_nothing():
    assert built(config_of(NAMES[0]), digits()).trainable_parameters() == 0


@pytest.mark.parametrize("name", [name for name in NAMES if not registry.strategies.get(name).needs.prompts])
def test_batch_norm_learns_its_statistics_where_the_backbone_is_trained_and_only_there(name):
    config = config_of(name)
    learner = built(config, digits(), backbone=build_backbone(BackboneConfig(kind="resnet18_slim")))
    before = copy_of(dict(learner.backbone.named_buffers()))
    learn(learner, config, digits().tasks[:1])
    assert bool(differing(before, dict(learner.backbone.named_buffers()))) == (name not in FROZEN)
