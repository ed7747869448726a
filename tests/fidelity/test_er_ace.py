"""ER-ACE is ER-ACE because incoming images compete among their own batch's classes, and replayed ones among all."""

import dataclasses

import pytest
import torch
from tiny import differing
from torch.nn import functional as F

from cl_platform.heads import cross_entropy

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.0}
F64 = torch.float64


def of(bench):
    return bench.learner.composition.members["er_ace"]


def grads(bench, value):
    bench.learner.zero_grad(set_to_none=True)
    value.backward(retain_graph=True)
    return {n: p.grad.clone() for n, p in bench.learner.named_parameters() if p.grad is not None}


# -- the formula ------------------------------------------------------------------------------------------------------


def test_the_two_terms():
    logits = torch.tensor([[1.0, 2, 3, 0], [0, 1, 2, 2]], dtype=F64)
    labels = torch.tensor([2, 3])
    incoming = cross_entropy(logits, labels, range(4), [2, 3])
    assert incoming.item() == pytest.approx(0.370867266, abs=1e-7)
    assert cross_entropy(logits, labels, range(4)).item() == pytest.approx(0.678882747, abs=1e-7)  # unmasked
    replayed = cross_entropy(torch.tensor([[2.0, 1, 0, 1]], dtype=F64), torch.tensor([0]), range(4))
    assert (incoming + replayed).item() == pytest.approx(0.997390641, abs=1e-7)


def test_the_order_of_classes_does_not_matter():
    """Class 1 arrives after class 3: comparing numbers, as released code does, would let column 3 compete."""
    logits = torch.tensor([[2.0, 0.0]], dtype=F64)  # of the seen classes 1 and 3
    label = torch.tensor([1])
    assert cross_entropy(logits, label, [1, 3], [1]).item() == 0
    assert cross_entropy(logits, label, [1, 3], [1, 3]).item() == pytest.approx(0.126928011, abs=1e-7)


# -- in training ------------------------------------------------------------------------------------------------------


def test_incoming_images_send_no_gradient_to_absent_classes(learner_of):
    bench = learner_of({"er_ace": {}}, **SGD).learn(0).begin(1)
    _, terms = bench.step()
    assert set(terms) == {"er_ace/ce", "er_ace/replay"}
    incoming = grads(bench, terms["er_ace/ce"])
    rows = {n: g for n, g in incoming.items() if n.startswith("head.blocks.tasks.0.")}
    assert all(not g.any() for g in rows.values())
    assert all(g.any() for n, g in incoming.items() if n.startswith("head.blocks.tasks.1."))
    replayed = grads(bench, terms["er_ace/replay"])
    assert all(g.any() for n, g in replayed.items() if n.startswith("head."))


def test_the_mask_follows_the_batch_and_not_the_task(learner_of):
    bench = learner_of({"er_ace": {"task_free": True}}, **SGD).begin(0)
    step, _ = bench.step()
    alone = step.host.replace(labels=torch.zeros_like(step.host.labels))
    batch = step.batch.replace(labels=torch.zeros_like(step.batch.labels))
    narrowed = dataclasses.replace(step, host=alone, passes=[dataclasses.replace(step.passes[0], batch=batch)])
    loss = of(bench).losses(narrowed)["ce"]
    assert loss.item() == 0  # a batch of one class has nothing to tell apart
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in bench.learner.parameters())


def test_with_all_seen_classes_in_the_batch_it_is_er_with_a_mean_each(learner_of):
    ace = learner_of({"er_ace": {"task_free": True}}, **SGD).learn(0, epochs=1)
    ace.begin(0)
    step, terms = ace.step()
    assert set(step.host.labels.tolist()) == set(step.seen_classes)
    replayed = step.passes[-1]
    plain = F.cross_entropy(step.logits, step.batch.labels) + F.cross_entropy(replayed.logits, replayed.batch.labels)
    assert sum(terms.values()).item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize(("task_free", "online", "masked"), [(None, False, 0), (None, True, 1), (False, True, 0)])
def test_the_first_task_is_plain_unless_boundaries_play_no_role(learner_of, task_free, online, masked):
    bench = learner_of({"er_ace": {"task_free": task_free}}, **SGD)
    bench.learner.context.online = online
    bench.learn(0, epochs=1).begin(0)
    step, terms = bench.step()
    assert ("er_ace/replay" in terms) == bool(masked)
    assert len(step.passes) > masked


def test_numbers_given_to_classes_change_nothing(learner_of):
    """The same images and head rows, classes counted from the other end."""
    one, other = (learner_of({"er_ace": {}}, **SGD) for _ in range(2))
    stream = other.stream
    last = stream.num_classes - 1
    tasks = []
    for task in stream.tasks:
        sets = {}
        for name in ("train", "validation", "test"):
            images = getattr(task, name)
            sets[name] = dataclasses.replace(images, labels=last - images.labels)
        tasks.append(dataclasses.replace(task, classes=tuple(sorted(last - c for c in task.classes)), **sets))
    other.stream = dataclasses.replace(stream, tasks=tuple(tasks))
    for bench in (one, other):
        bench.begin(0)
    rows = one.learner.head.blocks
    for name in ("weight", "bias"):
        other.learner.head.blocks.get(0, name).data.copy_(rows.get(0, name).flip(0))
    values = []
    for bench in (one, other):
        bench.learn(0, epochs=1).begin(1)
        if bench is other:
            for name in ("weight", "bias"):
                other.learner.head.blocks.get(1, name).data.copy_(rows.get(1, name).flip(0))
        values.append({name: value.item() for name, value in bench.step()[1].items()})
    assert values[0].keys() == values[1].keys() == {"er_ace/ce", "er_ace/replay"}
    for name, value in values[0].items():
        assert values[1][name] == pytest.approx(value, rel=1e-5)


def test_an_empty_buffer_costs_no_pass(learner_of):
    step, terms = learner_of({"er_ace": {"task_free": True}}, **SGD).begin(0).step()
    assert set(terms) == {"er_ace/ce"}
    assert len(step.passes) == 1


def test_the_first_task_without_replay_is_finetuning_bit_for_bit(learner_of):
    ace = learner_of({"er_ace": {}}, **SGD).learn(0)
    plain = learner_of({"finetune": {}}, **SGD).learn(0)
    mine = {n: t for n, t in ace.learner.state_dict().items() if ".er_ace." not in n}
    assert not differing(mine, plain.learner.state_dict())
    assert len(of(ace).buffer) == 16
