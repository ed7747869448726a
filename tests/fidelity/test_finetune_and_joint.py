"""Finetuning trains everything on one task after the other; joint training does so on the mixed data of all tasks."""

import dataclasses

import pytest
import torch
from tiny import built, config_of, copy_of, differing, digits, fit, learn
from torch.nn import functional as F

from cl_platform.heads import Head
from cl_platform.scenarios import TaskLoader
from cl_platform.strategies.phases import growing_union, union

ADAM = {"name": "adam", "lr": 1e-3}


def trained_by_hand(bench, task, epochs):
    """Ordinary training of the trunk and a head; state of both."""
    head = Head(32, seed=0)
    head.begin_task(task.task_id, task.classes)
    vit = bench.vit
    vit.unfreeze()
    vit.train()
    rule = torch.optim.Adam([*vit.parameters(), *head.parameters()], lr=1e-3)
    loader = TaskLoader(task.train, task.task_id, 8, 0)
    for _ in range(epochs):
        for batch in loader:
            rule.zero_grad()
            logits = head(vit(bench.learner.transforms.evaluate(batch.images)))
            F.cross_entropy(logits, batch.labels - min(task.classes)).backward()
            rule.step()
    return {**vit.state_dict(), **head.state_dict()}


# -- finetune -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["finetune", "joint"])
def test_a_stream_of_one_task_is_ordinary_training_bit_for_bit(learner_of, name):
    bench = learner_of({name: {}}, stream={"tasks": 1}, **ADAM).learn(0, epochs=2)
    expected = trained_by_hand(learner_of({name: {}}, stream={"tasks": 1}), bench.stream.tasks[0], 2)
    assert not differing(expected, {**bench.vit.state_dict(), **bench.learner.head.state_dict()})


def test_everything_is_trained_in_every_task(learner_of):
    bench = learner_of({"finetune": {}}, **ADAM).learn(0)
    before = copy_of(bench.learner.state_dict())
    assert all(p.requires_grad for p in bench.learner.parameters())
    bench.learn(1)
    unmoved = {n for n, t in before.items() if torch.equal(t, bench.learner.state_dict()[n])}
    assert {n for n in unmoved if not n.startswith("owners.")} == {"head.blocks.tasks.0.classes"}


def test_the_loss_runs_over_all_seen_classes_or_over_the_tasks_own(learner_of):
    for loss, moves in (("seen", True), ("task", False)):
        bench = learner_of({"finetune": {"loss": loss}}, **ADAM).learn(0).begin(1)
        step, terms = bench.step()
        candidates = step.logits if loss == "seen" else step.logits[:, 2:]
        labels = step.batch.labels - (0 if loss == "seen" else 2)
        assert torch.equal(terms["finetune/ce"], F.cross_entropy(candidates, labels))
        terms["finetune/ce"].backward()
        gradients = [p.grad for p in bench.learner.head.blocks.parameters_of(0).values()]
        assert all(bool(g.any()) == moves for g in gradients)


def test_old_rows_keep_their_bits_where_the_loss_is_the_tasks_own(learner_of):
    bench = learner_of({"finetune": {"loss": "task"}}, **ADAM).learn(0)
    before = copy_of(bench.learner.head.state_dict())
    bench.learn(1)
    assert not differing(before, {n: bench.learner.head.state_dict()[n] for n in before})


def test_a_task_starts_with_a_fresh_optimizer(learner_of):
    bench = learner_of({"finetune": {}}, **ADAM).learn(0)
    first = bench.trainer.optimizers[0]
    bench.learn(1)
    second = bench.trainer.optimizers[0]
    assert first is not second
    steps = {int(second.state[p]["step"]) for p in bench.vit.parameters()}
    assert steps == {4}  # two epochs of two batches, none of the first task's


def test_dropout_is_active_in_training_drawn_per_task_and_off_in_answers(learner_of):
    dropouts = {"proj_drop_rate": 0.3}
    bench = learner_of({"finetune": {}}, vit=dropouts, **ADAM).learn(0)
    plain = learner_of({"finetune": {}}, **ADAM).learn(0)
    assert differing(dict(bench.vit.state_dict()), dict(plain.vit.state_dict()))
    torch.manual_seed(123)
    again = learner_of({"finetune": {}}, vit=dropouts, **ADAM).learn(0)
    assert not differing(bench.learner.state_dict(), again.learner.state_dict())
    assert torch.equal(bench.logits(), bench.logits())


# -- joint ----------------------------------------------------------------------------------------------------------


def test_the_union_holds_every_image_of_every_task_once():
    stream = digits(3)
    whole = union(stream.tasks)
    assert whole.classes == (0, 1, 2, 3, 4, 5)
    assert len(whole.train) == 48
    rows = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    mixed = whole.train.images(rows)
    parts = torch.cat([task.train.images(slice(None)) for task in stream.tasks])
    labels = torch.cat([task.train.labels for task in stream.tasks])
    assert torch.equal(mixed, parts[rows])
    assert torch.equal(whole.train.labels, labels)
    assert torch.equal(whole.test.labels, stream.tasks[-1].test.labels)  # no test image is trained on


def test_batches_mix_the_images_of_all_tasks():
    whole = union(digits(3).tasks)
    first = next(iter(TaskLoader(whole.train, whole.task_id, 16, 0)))
    assert len({int(label) // 2 for label in first.labels}) == 3


def test_once_is_one_training_and_leaves_earlier_rows_of_the_matrix_empty():
    learner = built(config_of("joint"), digits(3))
    (phase,) = learner.composition.arrange(digits(3).tasks)
    assert (phase.position, phase.fresh, len(phase.task.train)) == (2, False, 48)


def test_scratch_starts_anew_for_each_row_and_continue_goes_on():
    for mode, fresh in (("scratch", [False, True, True]), ("continue", [False, False, False])):
        learner = built(config_of("joint", strategy={"mode": mode}), digits(3))
        phases = learner.composition.arrange(digits(3).tasks)
        assert [p.fresh for p in phases] == fresh
        assert [p.position for p in phases] == [0, 1, 2]
        assert [len(p.task.train) for p in phases] == [16, 32, 48]


@pytest.mark.parametrize("position", [0, 1])
def test_a_row_from_scratch_equals_one_training_on_the_shorter_stream_bit_for_bit(position):
    config = config_of("joint", strategy={"mode": "scratch"})
    phase = growing_union(digits(3).tasks, fresh=True)[position]
    of_long = learn(built(config, digits(3)), config, [phase])
    once = config_of("joint")
    short = dataclasses.replace(digits(3), tasks=digits(3).tasks[: position + 1])
    of_short = built(once, short)
    learn(of_short, once, of_short.composition.arrange(short.tasks))
    assert not differing(of_long.state_dict(), of_short.state_dict())


def test_continue_keeps_the_weights_and_adds_a_block_for_the_new_classes_alone():
    config = config_of("joint", strategy={"mode": "continue"})
    learner = built(config, digits())
    first, second = learner.composition.arrange(digits().tasks)
    learn(learner, config, [first])
    before = {n: t for n, t in copy_of(learner.state_dict()).items() if not n.startswith("owners.")}
    learner.begin_task(second.task, 1)
    assert not differing(before, {n: learner.state_dict()[n] for n in before})
    assert learner.head.blocks.get(1, "classes").tolist() == [2, 3]
    fit(learner, config, second.task)
    assert learner.seen_classes() == [0, 1, 2, 3]
    assert differing(before, {n: learner.state_dict()[n] for n in before})


def test_the_loss_runs_over_all_classes_of_the_union(learner_of):
    bench = learner_of({"joint": {}}, **ADAM)
    (phase,) = bench.learner.composition.arrange(bench.stream.tasks)
    bench.learner.begin_task(phase.task, 1)
    step, terms = bench.step()
    assert step.seen_classes == list(range(6))
    assert torch.equal(terms["joint/ce"], F.cross_entropy(step.logits, step.batch.labels))


def test_joint_training_ends_above_finetuning_on_the_first_task(learner_of):
    right = {}
    for name in ("joint", "finetune"):
        bench = learner_of({name: {}}, **ADAM)
        first = bench.stream.tasks[0].train
        tasks = [phase.task for phase in bench.learner.composition.arrange(bench.stream.tasks)]
        bench.stream = dataclasses.replace(bench.stream, tasks=tuple(tasks))
        bench.learn(*(task.task_id for task in tasks), epochs=8)
        right[name] = int((bench.logits(first.images(slice(None))).argmax(1) == first.labels).sum())
    assert right["joint"] >= 14
    assert right["finetune"] <= 4
