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
    first_step,
    fit,
    images_of,
    learn,
    learnt,
    one_class,
    trainer_for,
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
def test_an_answer_depends_neither_on_batch_mates_nor_on_their_order_nor_on_the_batch_size(name):
    learner = ready(name)
    noise = torch.randint(0, 256, (33, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.cat([images_of(digits(), "train"), noise])
    expected = answers(learner, images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    top = expected.topk(2, dim=1).values
    clear = (top[:, 0] - top[:, 1]) > 1e-4
    assert clear.any()
    for size, rows in ((64, torch.arange(len(images))), (64, order), (7, order[:21]), (2, order[:8]), (1, order[:8])):
        found, wanted = answers(learner, images[rows], size), expected[rows]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.argmax(1)[clear[rows]], wanted.argmax(1)[clear[rows]])


@pytest.mark.parametrize("name", NAMES)
def test_an_image_alone_is_answered_as_among_copies_of_one_other_image(name):
    learner, images = ready(name), images_of(digits())
    crowd = torch.cat([images[:1], images[-1:].expand(40, -1, -1, -1)])
    torch.testing.assert_close(answers(learner, crowd)[0], answers(learner, images[:1])[0], rtol=1e-4, atol=1e-5)


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
def test_answers_stand_in_ascending_class_id_over_seen_classes_only(name):
    learner = begun(config_of(name), digits(3), 1)
    learner.end_task(learner.task)
    logits = answers(learner, images_of(digits()))
    assert learner.seen_classes() == [0, 1, 2, 3]
    assert logits.shape == (24, 4)
    assert logits.dtype == torch.float32


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
def test_evaluation_leaves_weights_random_numbers_modes_and_gradients_as_they_were(name):
    learner = begun(config_of(name), digits(), 0)
    learner.train()
    if learner.composition.needs_gradient:
        step, terms = first_step(learner, digits().tasks[0])
        sum(terms.values()).backward()
    else:
        learner.end_task(digits().tasks[0])
    weights = copy_of(learner.state_dict())
    modes = [module.training for module in learner.modules()]
    flags = [p.requires_grad for p in learner.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in learner.parameters()]
    random = torch.get_rng_state()
    with torch.enable_grad():
        counts = count_correct(learner, digits().tasks[:1])
        answers(learner, images_of(digits()))
        assert torch.is_grad_enabled()
    assert counts.total == [12]
    assert not differing(weights, learner.state_dict())
    assert modes == [module.training for module in learner.modules()]
    assert flags == [p.requires_grad for p in learner.parameters()]
    assert torch.equal(random, torch.get_rng_state())
    for before, parameter in zip(gradients, learner.parameters(), strict=True):
        assert (before is None) == (parameter.grad is None)
        assert before is None or torch.equal(before, parameter.grad)


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


@pytest.mark.parametrize("name", NAMES)
def test_evaluating_in_the_middle_of_training_changes_no_byte_of_what_is_learnt(name):
    class Evaluate(L.Callback):
        def on_train_batch_end(self, trainer, learner, *rest):
            count_correct(learner, [learner.task])

    config, tasks = config_of(name), tasks_of(name)
    with_it = learn(built(config, digits()), config, tasks, Evaluate())
    assert not differing(learn(built(config, digits()), config, tasks).state_dict(), with_it.state_dict())


# -- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["state_dict", "learnt_state"])
@pytest.mark.parametrize("name", NAMES)
def test_the_state_alone_gives_a_newly_built_learner_the_same_bits(name, way):
    learner = ready(name)
    other = built(config_of(name), digits())
    if way == "state_dict":
        other.load_state_dict(copy_of(learner.state_dict()))
    else:
        other.load_learnt_state(copy_of(learner.learnt_state()))
    assert not differing(learner.state_dict(), other.state_dict())
    assert other.seen_classes() == learner.seen_classes()
    assert torch.equal(answers(other, images_of(digits())), answers(learner, images_of(digits())))


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_learner_goes_on_with_the_same_bytes(name):
    config, tasks = config_of(name), digits().tasks
    straight = built(config, digits())
    learn(straight, config, tasks[:1])
    resumed = built(config, digits())
    resumed.load_state_dict(copy_of(straight.state_dict()))
    resumed.further_updates = straight.further_updates  # a counter, as the trainer's: a checkpoint keeps it beside
    learn(straight, config, tasks[1:])
    learn(resumed, config, tasks[1:])
    assert not differing(straight.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_what_a_task_owns_alone_keeps_its_bits_when_the_next_is_learnt(name):
    config, tasks = config_of(name, optimizer={"weight_decay": 0.1}), digits().tasks
    learner = learn(built(config, digits()), config, tasks[:1])
    before = _owned_by_the_first(learner)
    learn(learner, config, tasks[1:])
    after = _owned_by_the_first(learner)  # fewer where a part is shared: then the second task owns it as well
    assert not differing({n: before[n] for n in after}, after)


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


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(name):
    config = config_of(name)
    state = torch.get_rng_state()
    torch.manual_seed(5)  # must not matter
    again = learnt(config, digits())
    torch.set_rng_state(state)
    assert not differing(ready(name).state_dict(), again.state_dict())
    other = learnt(config, digits(), seed=1)
    images = images_of(digits())
    differs = not torch.equal(answers(other, images), answers(again, images))
    assert differs == registry.strategies.get(name).draws


@pytest.mark.parametrize("name", NAMES)
def test_the_bounds_of_a_task_draw_nothing_from_the_global_generator(name):
    learner, task = built(config_of(name), digits()), tasks_of(name)[0]
    state = torch.get_rng_state()
    learner.begin_task(task, 1)
    learner.end_task(task)
    assert torch.equal(state, torch.get_rng_state())


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
def test_every_loss_term_of_a_strategy_changes_a_gradient(name):
    learner = begun(config_of(name), digits(), 1)
    trained = [p for p in learner.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(0)
    for parameter in trained:  # what protects pulls nowhere as long as nothing has moved
        parameter.data.add_(0.01 * torch.randn(parameter.shape, generator=draw))
    _, terms = first_step(learner, digits().tasks[1])
    assert terms
    for term, value in terms.items():
        assert value.dim() == 0 and torch.isfinite(value)
        gradients = torch.autograd.grad(value, trained, allow_unused=True, retain_graph=True)
        assert any(g is not None and bool(g.any()) for g in gradients), term


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


@pytest.mark.parametrize("name", GRADIENT)
def test_training_lowers_the_loss_on_its_own_batch(name):
    rule = {"name": "adam", "lr": 0.003, "lr_per_256": None, "schedule": "constant"}
    config, task = config_of(name, optimizer=rule), tasks_of(name)[0]
    losses = []

    class Note(L.Callback):
        def on_before_backward(self, trainer, learner, loss):  # what protects comes later, and on other images
            own = [value for term, value in learner.terms.items() if term not in learner.composition.stability]
            losses.append(float(sum(own)))

    learner = built(config, digits())
    fit(learner, config, task, Note(), epochs=6)
    steps = len(losses) // 6
    assert sum(losses[-steps:]) < sum(losses[:steps])


@pytest.mark.parametrize("name", NAMES)
def test_a_task_of_one_class_and_a_task_of_one_batch_work(name):
    first, second = digits().tasks
    narrow = one_class(first, first.classes[0])
    rows = torch.cat([(second.train.labels == c).nonzero()[:2, 0] for c in second.classes])
    short = dataclasses.replace(second, train=second.train.select(rows))
    stream = dataclasses.replace(digits(), tasks=(narrow, short))
    learner = built(config_of(name), stream)
    learn(learner, config_of(name), [narrow])
    alone = answers(learner, images_of(digits()))
    assert alone.shape == (24, 1)
    assert count_correct(learner, [narrow]).correct["cil"] == [len(narrow.test)]
    learn(learner, config_of(name), [short])
    logits = answers(learner, images_of(digits()))
    assert logits.shape == (24, 3)
    assert bool(torch.isfinite(logits).all())
    assert all(bool(torch.isfinite(t).all()) for t in learner.state_dict().values() if t.is_floating_point())


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


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_trains_and_answers_with_finite_numbers(name):
    config = config_of(name, trainer={"precision": "bf16-mixed"})
    learner = built(config, digits())
    losses = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, learner, outputs, batch, batch_idx):
            losses.append(outputs["loss"])

    learn(learner, config, tasks_of(name), Note())
    assert all(loss.dtype == torch.float32 and bool(torch.isfinite(loss)) for loss in losses)
    logits = answers(learner, images_of(digits()))
    assert logits.dtype == torch.float32
    assert bool(torch.isfinite(logits).all())
    assert all(t.dtype not in (torch.bfloat16, torch.float16) for t in learner.state_dict().values())
    learner.trainer = trainer_for(config_of(name))
    learner.cache.forget(0)
    full = answers(learner, images_of(digits()))
    scale = 0.1 * float(full.amax(1).abs().max())
    near = torch.isclose(logits, full, rtol=0.05, atol=scale).all(dim=1)
    assert near.float().mean() >= 0.9  # half precision may tip the hard choice of an image that stands between two


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
