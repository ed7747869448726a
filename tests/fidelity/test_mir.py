"""MIR is MIR because it replays those candidates whose loss the coming update, tried out first, would raise most."""

import copy

import pytest
import torch
from tiny import built, config_of, copy_of, differing, digits, learn, only
from torch import nn
from torch.nn import functional as F

from cl_platform.backbones import BackboneConfig, build_backbone
from cl_platform.errors import UserError
from cl_platform.memory.columns import Replay as Rows
from cl_platform.strategies import build_strategies
from cl_platform.strategies.mir import cross_entropies

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.0}
F64 = torch.float64


def of(bench):
    return bench.learner.composition.members["mir"]


def without_memory(bench, name="mir"):
    return {n: t for n, t in bench.learner.state_dict().items() if f".{name}." not in n}


class Watched:
    """Calls ``look(step, rows, batch, scores)`` whenever a strategy has scored, before anything comes of it."""

    def __init__(self, strategy, look):
        scored = strategy.scores

        def scores(step, rows, batch):
            found = scored(step, rows, batch)
            look(step, rows, batch, found)
            return found

        strategy.scores = scores


# -- the formula ------------------------------------------------------------------------------------------------------


def test_a_score_is_by_how_much_the_loss_of_an_example_rises():
    before = torch.tensor([[1, 0], [0, 1], [2, 0]], dtype=F64)
    after = torch.tensor([[0, 0], [0, 2], [0, 1]], dtype=F64)
    labels = torch.tensor([0, 1, 0])
    scores = cross_entropies(after, labels) - cross_entropies(before, labels)
    torch.testing.assert_close(scores, torch.tensor([0.379885493, -0.186333676, 1.186333676], dtype=F64))
    assert scores.argsort(descending=True)[:2].tolist() == [2, 0]
    assert cross_entropies(before.bfloat16(), labels).dtype == torch.float32


def test_equal_scores_are_taken_in_the_order_of_their_slots(learner_of):
    bench = learner_of({"mir": {}}, **SGD).begin(0)
    batch = bench.batch().select(torch.arange(5))
    nothing = torch.zeros(5, dtype=torch.int64)
    rows = Rows(torch.tensor([7, 3, 9, 1, 5]), nothing, nothing, nothing, nothing)
    of(bench).scores = lambda *_: torch.tensor([0.5, 0.5, 2.0, 0.5, -1.0])
    assert of(bench).order(None, rows, batch).tolist() == [2, 3, 1, 0, 4]


# -- what is scored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [SGD, {"name": "adam", "lr": 0.02}], ids=["sgd", "adam"])
def test_the_virtual_step_is_a_plain_one_with_the_optimizers_rate(learner_of, rule):
    bench = learner_of({"mir": {"batch_size": 4, "candidates": 10}}, schedule="cosine", **rule).learn(0)
    rates = []

    def look(step, rows, batch, scores):
        rate = bench.trainer.optimizers[0].param_groups[0]["lr"]
        rates.append(rate)
        backbone, head = copy.deepcopy(bench.vit), copy.deepcopy(bench.learner.head)
        losses = [F.cross_entropy(head(backbone(batch.images)), batch.labels, reduction="none").detach()]
        for module, live in ((backbone, bench.vit), (head, bench.learner.head)):
            for moved, parameter in zip(module.parameters(), live.parameters(), strict=True):
                moved.data -= rate * parameter.grad
        losses.append(F.cross_entropy(head(backbone(batch.images)), batch.labels, reduction="none").detach())
        torch.testing.assert_close(scores, losses[1] - losses[0], rtol=1e-3, atol=1e-5)
        assert scores.abs().max() > 1e-3

    Watched(of(bench), look)
    bench.learn(1)
    assert len(set(rates)) == 2  # two epochs of a falling rate


def test_the_highest_scores_are_replayed_and_their_mean_gradient_is_added(learner_of):
    bench = learner_of({"mir": {"batch_size": 3, "candidates": 12, "exclude_current": True}}, **SGD).learn(0)
    seen, strategy = [], of(bench)
    Watched(strategy, lambda step, rows, batch, scores: seen.append((batch, scores)))
    surgery = strategy.after_backward

    def after_backward(step):
        live = dict(bench.learner.named_parameters())
        before = {n: p.grad.clone() for n, p in live.items()}
        surgery(step)
        batch, scores = seen[-1]
        assert len(batch) == 12 and set(batch.task_ids.tolist()) == {0}
        chosen = scores.argsort(descending=True)[:3]
        assert step.passes[1].batch.example_ids.tolist() == batch.example_ids[chosen].tolist()
        loss = F.cross_entropy(bench.learner.head(bench.vit(batch.images[chosen])), batch.labels[chosen])
        for name, gradient in zip(live, torch.autograd.grad(loss, list(live.values())), strict=True):
            torch.testing.assert_close(live[name].grad, before[name] + gradient, rtol=1e-4, atol=1e-6)

    strategy.after_backward = after_backward
    bench.learn(1)
    assert len(seen) == 4


class Trained(nn.Module):
    """Counts what a training-mode pass does to it."""

    def __init__(self, model, width):
        super().__init__()
        self.model, self.dropout, self.norm = model, nn.Dropout(0.5), nn.BatchNorm1d(width)

    def forward(self, images):
        return self.dropout(self.norm(self.model(images)))


def noisy_learner(**keys):
    config = config_of("mir", strategy={"batch_size": 2, "candidates": 10, **keys})
    backbone = build_backbone(BackboneConfig(kind="resnet18_slim"))
    backbone.model = Trained(backbone.model, backbone.feature_dim)
    return built(config, digits(), backbone=backbone), config


def test_scoring_leaves_no_trace_in_weights_statistics_modes_gradients_and_generators():
    learner, config = noisy_learner()
    learn(learner, config, digits().tasks[:1])
    strategy, checked = only(learner), []
    real = strategy.scores

    def scores(step, rows, batch):
        state, modes = copy_of(learner.state_dict()), [m.training for m in learner.modules()]
        gradients = [p.grad.clone() for p in learner.parameters()]
        places = [p.data_ptr() for p in (*learner.parameters(), *learner.buffers())]
        random = torch.get_rng_state()
        found = real(step, rows, batch)
        assert not differing(state, learner.state_dict())
        assert modes == [m.training for m in learner.modules()]
        assert all(torch.equal(p.grad, g) for p, g in zip(learner.parameters(), gradients, strict=True))
        assert places == [p.data_ptr() for p in (*learner.parameters(), *learner.buffers())]
        assert torch.equal(random, torch.get_rng_state())
        assert not found.requires_grad
        checked.append(found)
        return found

    strategy.scores = scores
    learn(learner, config, digits().tasks[1:])
    assert len(checked) == 2
    assert int(learner.backbone.model.norm.num_batches_tracked) == 7  # 1 + 2, then two passes in each of two steps


def test_it_scores_by_the_batchs_own_statistics_as_it_trains():
    learner, config = noisy_learner()
    learn(learner, config, digits().tasks[:1])
    strategy, seen = only(learner), []
    learner.backbone.model.norm.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))

    def look(*_):
        before, found = seen[-1]
        torch.testing.assert_close(found.mean(0), learner.backbone.model.norm.bias, rtol=0, atol=1e-1)
        assert len(before) == 10

    Watched(strategy, look)
    learn(learner, config, digits().tasks[1:])
    assert seen


def test_without_a_rate_nothing_rises():
    learner, config = noisy_learner()
    learn(learner, config, digits().tasks[:1])
    strategy, seen = only(learner), []
    real = strategy.scores

    def scores(*given):
        optimizer = strategy.context.optimizer()
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        seen.append(real(*given))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return real(*given)

    strategy.scores = scores
    learn(learner, config, digits().tasks[1:])
    assert len(seen) == 2 and not any(scores.any() for scores in seen)


# -- the smallest loss ------------------------------------------------------------------------------------------------


def test_the_smallest_loss_at_which_an_example_was_scored_is_what_counts(learner_of):
    bench = learner_of({"mir": {"batch_size": 4, "candidates": 12, "compare": "best"}}, **SGD).learn(0)
    strategy, known, lower = of(bench), {}, 0
    real = strategy._smallest

    def smallest(rows, batch, now):
        nonlocal lower
        found = real(rows, batch, now)
        for example, loss, least in zip(batch.example_ids.tolist(), now.tolist(), found.tolist(), strict=True):
            assert least == min(loss, known.get(example, loss))
            lower += least < loss
            known[example] = least
        return found

    strategy._smallest = smallest
    known.update(
        (int(owner) & (2**40 - 1), float(loss))
        for owner, loss in zip(strategy.best_id, strategy.best_loss, strict=True)
        if owner >= 0
    )
    bench.learn(1, epochs=4)
    assert lower


def test_a_slot_with_a_new_example_forgets_the_loss_of_the_old_one(learner_of):
    bench = learner_of({"mir": {"compare": "best"}}, **SGD).begin(0)
    strategy, batch = of(bench), bench.batch(task_id=0).select(torch.tensor([0, 1]))
    rows = Rows(torch.tensor([3, 4]), *[torch.zeros(2, dtype=torch.int64)] * 4)
    first = batch.replace(example_ids=torch.tensor([10, 11]))
    assert strategy._smallest(rows, first, torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    assert strategy._smallest(rows, first, torch.tensor([3.0, 1.5])).tolist() == [1, 1.5]
    other = batch.replace(example_ids=torch.tensor([12, 11]))
    assert strategy._smallest(rows, other, torch.tensor([3.0, 3.0])).tolist() == [3, 1.5]
    elsewhere = other.replace(task_ids=torch.tensor([1, 1]))
    assert strategy._smallest(rows, elsewhere, torch.tensor([4.0, 4.0])).tolist() == [4, 4]


def test_losses_move_up_with_their_examples_when_a_task_is_dropped_and_are_restored(learner_of):
    keys = {"mir": {"batch_size": 4, "candidates": 60, "compare": "best", "buffer": {"size": 32}}}
    bench = learner_of(keys, **SGD).learn(0, 1)
    strategy = of(bench)

    def held():
        contents = strategy.buffer.contents
        pairs = zip(contents.task_ids, contents.example_ids, strict=True)
        names = [(int(t) << 40) + int(e) for t, e in pairs]
        there = strategy.best_id[: len(names)].tolist()
        losses = strategy.best_loss[: len(names)].tolist()
        return {n: loss for n, owner, loss in zip(names, there, losses, strict=True) if n == owner}

    before = held()
    assert {owner >> 40 for owner in before} == {0, 1}
    other = learner_of(keys, **SGD)
    other.learner.load_learnt_state(copy_of(bench.learner.learnt_state()))
    assert torch.equal(of(other).best_loss, strategy.best_loss)
    strategy.drop_task(0)
    assert held() == {n: loss for n, loss in before.items() if n >> 40 == 1}
    assert bool(strategy.best_loss[len(strategy.buffer) :].isinf().all())
    assert not any(part.name.startswith("best") and not part.tasks for part in strategy.components())


# -- beside other strategies ------------------------------------------------------------------------------------------


def test_with_as_many_candidates_as_are_replayed_it_is_er_with_a_mean_for_each_part(learner_of):
    mine = learner_of({"mir": {"batch_size": 6, "candidates": 6}}, **SGD).learn(0, 1)
    other = learner_of({"er": {"batch_size": 6, "loss": "sum"}}, **SGD).learn(0, 1)
    one, two = without_memory(mine), without_memory(other, "er")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-3, atol=2e-5)
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1).learner.state_dict()
    assert max(float((one[n] - t).abs().max()) for n, t in plain.items() if t.is_floating_point()) > 1e-2


def test_choosing_by_score_is_not_er(learner_of):
    mine = learner_of({"mir": {"batch_size": 6, "candidates": 12}}, **SGD).learn(0, 1)
    other = learner_of({"mir": {"batch_size": 6, "candidates": 6}}, **SGD).learn(0, 1)
    assert differing(without_memory(mine), without_memory(other))


def test_a_switched_off_draw_is_finetuning_bit_for_bit(learner_of):
    off = learner_of({"mir": {"batch_size": 0}}, **SGD).learn(0, 1)
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1)
    assert not differing(without_memory(off), plain.learner.state_dict())


def test_gradients_and_the_buffer_have_one_owner():
    for other in ("er", "agem", "gem"):
        with pytest.raises(UserError, match="both own"):
            build_strategies({"mir": {}, other: {}})
    build_strategies({"finetune": {}, "mir": {}, "lwf": {}})
