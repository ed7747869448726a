"""DER is DER because raw logits, stored when an example came and never again, are matched on a new view of it."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny import differing
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.strategies.der import logit_distance

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.0}
F64 = torch.float64


def of(bench):
    return next(iter(bench.learner.composition.members.values()))


def learnt(bench, name):
    return {n: t for n, t in bench.learner.state_dict().items() if f".{name}." not in n}


# -- the formula ------------------------------------------------------------------------------------------------------


def test_the_terms_of_der_and_of_its_extension():
    current = F.cross_entropy(torch.tensor([[2.0, 0, 1], [0, 0, 3]], dtype=F64), torch.tensor([0, 2]))
    known = torch.ones(1, 3, dtype=torch.bool)
    first = logit_distance(torch.tensor([[1.0, 2, 0]]), torch.tensor([[0.0, 2, 1]]), known)
    second = F.cross_entropy(torch.tensor([[0.0, 1, 1]], dtype=F64), torch.tensor([1]))
    assert first.item() == pytest.approx(0.666666667, abs=1e-7)
    assert (current + 0.3 * first).item() == pytest.approx(0.451264460, abs=1e-7)
    assert (current + 0.1 * first + 0.5 * second).item() == pytest.approx(0.748928529, abs=1e-7)


def test_columns_that_came_later_are_left_out_of_the_sum_and_counted_in_the_mean():
    logits, stored = torch.tensor([[1.0, 2, 7, 9]]), torch.tensor([[0.0, 0, 0, 0]])
    known = torch.tensor([[True, True, False, False]])
    assert logit_distance(logits, stored, known).item() == pytest.approx((1 + 4) / 4)


def test_the_mean_may_divide_by_all_classes_of_the_stream(learner_of):
    logits, known = torch.tensor([[1.0, 2]]), torch.ones(1, 2, dtype=torch.bool)
    assert logit_distance(logits, torch.zeros(1, 2), known, 4).item() == pytest.approx((1 + 4) / 4)
    bench = learner_of({"der": {"columns": "all", "alpha": 2.0}}, **SGD).learn(0).begin(1)
    step, terms = bench.step()
    replayed = step.passes[-1]
    difference = replayed.logits[:, :2] - replayed.batch.extra["stored"][:, :2]  # 2 of the 6 classes were stored
    assert terms["der/logits"].item() == pytest.approx(2 * (difference.square().sum() / (8 * 6)).item(), rel=1e-5)


def test_a_constant_added_to_all_logits_of_a_row_changes_the_loss():
    logits, known = torch.tensor([[1.0, 2, 0]]), torch.ones(1, 3, dtype=torch.bool)
    assert logit_distance(logits, logits, known) == 0
    assert logit_distance(logits + 1, logits, known) == 1  # a divergence of softmaxes would not see it


# -- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["der", "derpp"])
def test_what_is_stored_is_what_the_step_of_insertion_gave_before_its_update(learner_of, name):
    bench = learner_of({name: {"insert": "first_epoch", "buffer": {"size": 60}}}, **SGD)
    given = {}
    after_batch = of(bench).after_batch

    def watched(step):
        if step.epoch == 0:
            logits = step.logits[: step.current].detach().clone()
            assert step.features.shape[0] >= step.current
            given.update(dict(zip(step.host.example_ids.tolist(), logits, strict=True)))
        after_batch(step)

    of(bench).after_batch = watched
    bench.learn(0, 1, 2)
    buffer = of(bench).buffer
    assert len(buffer) == len(given) == 48
    for slot in range(48):
        logits, raw = buffer.logits[slot], given[buffer.example_ids[slot].item()]
        assert buffer.num_columns[slot] == len(raw)
        assert torch.equal(logits[: len(raw)], raw)  # classes arrive in ascending order here
    assert not buffer.logits.requires_grad
    row = buffer.logits[0].softmax(-1)
    assert not torch.allclose(buffer.logits[0], row)  # raw, not softmaxed


def test_stored_logits_never_change(learner_of):
    bench = learner_of({"der": {"insert": "first_epoch", "buffer": {"size": 60}}}, **SGD).learn(0)
    buffer = of(bench).buffer
    before = dict(zip(buffer.example_ids[:16].tolist(), buffer.logits[:16].clone(), strict=True))
    bench.learn(1, 2)
    now = dict(zip(buffer.example_ids[:48].tolist(), buffer.logits[:48], strict=True))
    assert len(now) == 48 and before.keys() <= now.keys()
    assert all(torch.equal(now[example], logits) for example, logits in before.items())


def test_logits_find_their_classes_when_these_come_in_any_order(learner_of):
    bench = learner_of({"der": {"buffer": {"size": 60}}}, **SGD)
    swapped = (2, 0, 1)  # classes 4 and 5 come first
    given = {}
    after_batch = of(bench).after_batch

    def watched(step):
        for example, logits in zip(step.host.example_ids.tolist(), step.logits.detach(), strict=False):
            given[example] = dict(zip(step.seen_classes, logits.tolist(), strict=True))
        after_batch(step)

    of(bench).after_batch = watched
    bench.learn(*swapped, epochs=1)
    bench.begin(1)
    drawn = of(bench).draw(16)
    for row, example in enumerate(drawn.example_ids.tolist()):
        stored, known = drawn.extra["stored"][row].tolist(), drawn.extra["known"][row].tolist()
        assert {c: stored[c] for c in range(6) if known[c]} == given[example]


# -- in training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["der", "derpp"])
def test_without_its_weights_it_is_finetuning_bit_for_bit(learner_of, name):
    keys = {"alpha": 0.0, **({"beta": 0.0} if name == "derpp" else {})}
    off = learner_of({name: keys}, **SGD).learn(0, 1)
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1)
    assert not differing(learnt(off, name), plain.learner.state_dict())


def test_the_extension_without_labels_is_der_on_the_same_draws(learner_of):
    one = learner_of({"der": {"alpha": 0.2}}, **SGD).learn(0, 1)
    other = learner_of({"derpp": {"alpha": 0.2, "beta": 0.0}}, **SGD).learn(0, 1)
    assert not differing(learnt(one, "der"), learnt(other, "derpp"))


def test_the_two_draws_are_independent_and_have_a_pass_each(learner_of):
    bench = learner_of({"derpp": {"batch_size": 6}}, **SGD).learn(0).begin(1)
    step, _ = bench.step()
    current, first, second, *_ = step.passes
    assert (len(current.batch), len(first.batch), len(second.batch)) == (8, 6, 6)
    assert first.batch.example_ids.tolist() != second.batch.example_ids.tolist()
    assert "stored" in first.batch.extra


def test_the_loss_of_the_current_batch_runs_over_all_seen_classes(learner_of):
    bench = learner_of({"derpp": {}}, **SGD).learn(0).begin(1)
    step, terms = bench.step()
    assert terms["learner/ce"].item() == pytest.approx(F.cross_entropy(step.logits, step.batch.labels).item())


def test_an_empty_buffer_costs_no_pass(learner_of):
    step, terms = learner_of({"derpp": {}}, **SGD).begin(0).step()
    assert set(terms) == {"learner/ce"}
    assert len(step.passes) == 1


def test_the_published_code_offers_an_example_in_every_epoch(learner_of):
    bench = learner_of({"der": {"buffer": {"size": 60}}}, **SGD).learn(0, epochs=3)
    assert len(of(bench).buffer) == 48
    assert of(bench).buffer.unique == 16


def test_matching_is_done_in_float32_under_autocast(learner_of):
    bench = learner_of({"der": {}}, precision="bf16-mixed", **SGD).learn(0)
    assert of(bench).buffer.logits.dtype == torch.float32
    bench.begin(1)
    with bench.trainer.precision_plugin.forward_context():
        step, terms = bench.step()
    assert terms["der/logits"].dtype == torch.float32
    assert dataclasses.is_dataclass(step)


def test_a_policy_that_waits_for_the_end_of_a_task_has_no_logits_to_store(learner_of):
    with pytest.raises(UserError, match=r"strategy\.der\.buffer\.policy=herding.*Use reservoir"):
        learner_of({"der": {"buffer": {"policy": "herding"}}})


@pytest.mark.parametrize("name", ["der", "derpp"])
@pytest.mark.parametrize("gone", [0, 1])
def test_nothing_of_a_dropped_task_stays_in_logits_and_learning_goes_on(learner_of, name, gone):
    bench = learner_of({name: {"insert": "first_epoch", "buffer": {"size": 60}}}, **SGD).learn(0, 1)
    strategy, other = of(bench), 1 - gone
    before = dict(zip(strategy.buffer.example_ids[:32].tolist(), strategy.buffer.logits[:32].clone(), strict=True))
    strategy.drop_task(gone)
    bench.learner.head.blocks.drop(gone)
    assert strategy.arrival.tolist() == [2 * other, 2 * other + 1]
    for slot in range(16):
        held, count = strategy.buffer.logits[slot], int(strategy.buffer.num_columns[slot])
        was = before[strategy.buffer.example_ids[slot].item()]
        own = was[2 * other : 2 * other + 2] if other == 1 or gone == 1 else was[:2]
        assert count == 2 and torch.equal(held[:2], own) and not held[2:].any()
    owners = {c.name: c.tasks for c in strategy.components()}
    assert owners["buffer"] == (0, 1)  # the learner that gave the logits was trained on both
    assert owners["arrival"] == (other,)
    bench.learn(2)
    assert strategy.buffer.owners() == {other, 2}


def test_columns_find_their_classes_after_resuming(learner_of):
    one = learner_of({"der": {"buffer": {"size": 60}}}, **SGD).learn(2, 0)
    other = learner_of({"der": {"buffer": {"size": 60}}}, **SGD)
    other.learner.load_learnt_state(one.learner.learnt_state())
    assert of(other).arrival.tolist() == [4, 5, 0, 1]
    drawn = [of(bench).ready(of(bench.begin(1)).buffer.read(np.arange(16))) for bench in (one, other)]
    for column in ("stored", "known"):
        assert torch.equal(drawn[0].extra[column], drawn[1].extra[column])
