"""L2 is L2 because every entry is drawn to one known place with the same strength."""

import pytest
import torch
from tiny import copy_of, differing

from cl_platform.errors import UserError
from cl_platform.strategies.l2 import penalty

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}


def of(bench):
    return bench.learner.composition.members["l2"]


def nudged(bench, scale=0.01):
    draw = torch.Generator().manual_seed(5)
    for parameter in bench.learner.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=draw))
    return bench


def without_records(bench):
    return {n: t for n, t in bench.learner.state_dict().items() if ".records." not in n}


def term(bench):
    return bench.step()[1]["l2/penalty"]


def test_the_formula():
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    anchor = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64)
    value = penalty([theta], [anchor], 4.0)
    assert value.item() == pytest.approx(2.5, abs=1e-12)
    value.backward()
    assert torch.equal(theta.grad, 4.0 * (theta - anchor).detach())


def test_it_equals_ewc_with_a_fisher_information_of_one_bit_for_bit(learner_of):
    l2 = learner_of({"l2": {"lambda": 0.7}}, **SGD).learn(0, 1, 2)
    ewc = learner_of({"ewc": {"lambda": 0.7, "gamma": 0.0}}, **SGD)
    strategy = ewc.learner.composition.members["ewc"]
    strategy.estimate = lambda task: {n: torch.ones_like(p) for n, p in strategy.context.trained().items()}
    ewc.learn(0, 1, 2)
    assert not differing(without_records(l2), without_records(ewc))
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1, 2)
    assert differing(without_records(l2), plain.learner.state_dict())


def test_alone_and_beside_finetune_it_is_the_same_and_without_weight_it_is_finetuning(learner_of):
    alone = learner_of({"l2": {}}, **SGD).learn(0, 1)
    beside = learner_of({"finetune": {}, "l2": {}}, **SGD).learn(0, 1)
    assert not differing(alone.learner.state_dict(), beside.learner.state_dict())
    off, plain = learner_of({"l2": {"lambda": 0}}, **SGD).learn(0, 1), learner_of({"finetune": {}}, **SGD).learn(0, 1)
    assert not differing(without_records(off), plain.learner.state_dict())


def test_the_anchor_is_the_end_of_the_task_before_and_the_penalty_is_zero_there(learner_of):
    bench = learner_of({"l2": {"lambda": 3.0}}, **SGD).begin(0)
    assert set(bench.step()[1]) == {"learner/ce"}
    bench.learn(0, 1)
    end = copy_of(dict(bench.learner.named_parameters()))
    bench.begin(2)
    assert of(bench).records.task_ids == [1]
    assert not differing(end, of(bench).records.read(1, "anchor"))
    assert term(bench).item() == 0.0
    value = term(nudged(bench))
    live = dict(bench.learner.named_parameters())
    assert value.item() == pytest.approx(
        1.5 * sum(float((live[n] - a).square().sum()) for n, a in end.items()), rel=1e-4
    )
    assert bench.learner.composition.stability == {"l2/penalty"}


def test_rows_of_new_classes_are_not_drawn_anywhere(learner_of):
    bench = nudged(learner_of({"l2": {}}, **SGD).learn(0).begin(1))
    term(bench).backward()
    blocks = bench.learner.head.blocks
    assert all(p.grad is None for p in blocks.parameters_of(1).values())
    assert all(bool(p.grad.any()) for p in blocks.parameters_of(0).values())


def test_a_narrow_scope_trains_and_holds_the_attention_and_trains_the_head_beside_it(learner_of):
    bench = learner_of({"l2": {"scope": "qkv"}}, **{**SGD, "weight_decay": 0.1})
    before = copy_of(bench.vit.state_dict())
    bench.learn(0, 1)
    moved = differing(before, bench.vit.state_dict())
    assert moved and all(".attn.qkv." in name for name in moved) and len(moved) == 8
    assert set(of(bench).records.read(1, "anchor")) == {f"backbone.{name}" for name in moved}
    held, head = bench.learner.groups
    assert held.weight_decay == 0.0 and head.weight_decay is None
    assert {id(p) for p in head.parameters} == {id(p) for p in bench.learner.head.parameters()}
    bench.begin(2)
    term(nudged(bench)).backward()
    assert all(p.grad is None for p in bench.learner.head.parameters())


def test_patterns_choose_what_is_held(learner_of):
    bench = learner_of({"l2": {"scope": ["blocks.3.*", "norm.*"]}}, **SGD)
    before = copy_of(bench.vit.state_dict())
    bench.learn(0)
    moved = differing(before, bench.vit.state_dict())
    assert {name.split(".")[1] for name in moved} == {"blocks", "norm"}
    assert {f"backbone.{n}" for n in moved} == set(of(bench).records.read(0, "anchor"))
    assert all(name.startswith(("model.blocks.3.", "model.norm.")) for name in moved)


def test_the_anchor_can_be_the_start_of_the_run(learner_of):
    bench = learner_of({"l2": {"anchor": "pretrained", "lambda": 2.0}}, **SGD)
    start = {f"backbone.{n}": p for n, p in copy_of(dict(bench.vit.named_parameters())).items()}
    assert term(bench.begin(0)).item() == 0.0
    bench.learn(0, 1).begin(2)
    assert not differing(start, of(bench).records.read(-1, "anchor"))
    live = dict(bench.learner.named_parameters())
    expected = sum(float((live[n] - a).square().sum()) for n, a in start.items())
    assert term(bench).item() == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    assert [c.tasks for c in of(bench).components()] == [()]
    other = learner_of({"l2": {"anchor": "pretrained"}}, **SGD)
    other.learner.load_learnt_state(copy_of(bench.learner.learnt_state()))
    assert not differing(start, of(other).records.read(-1, "anchor"))


@pytest.mark.parametrize("scope", ["head", [], ["blocks.9.*"]])
def test_a_scope_that_names_nothing_is_refused(learner_of, scope):
    with pytest.raises(UserError, match=r"strategy\.l2\.scope"):
        learner_of({"l2": {"scope": scope}}, **SGD)


def test_two_that_choose_what_is_trained_are_refused(learner_of):
    with pytest.raises(UserError, match="finetune and l2 both own the trainable"):
        learner_of({"finetune": {}, "l2": {"scope": "qkv"}}, **SGD)


def test_dropping_a_task_takes_its_head_rows_out_of_the_anchor(learner_of):
    bench = learner_of({"l2": {}}, **SGD).learn(0, 1)
    of(bench).drop_task(0)
    names = set(of(bench).records.read(1, "anchor"))
    assert "head.blocks.tasks.1.weight" in names and not any(".tasks.0." in n for n in names)
