"""Feature distillation is itself because features are drawn to where the learner of the task before has them."""

import pytest
import torch
from tiny import copy_of, differing
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.strategies.base import Pass
from cl_platform.strategies.feature_distillation import feature_distance

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
NEW = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
OLD = torch.tensor([[0.0, 2.0], [1.0, -1.0]], dtype=torch.float64)


def of(bench):
    return bench.learner.composition.members["feature_distillation"]


def make(learner_of, keys=None, before=(), **changes):
    return learner_of({**dict.fromkeys(before, {}), "feature_distillation": keys or {}}, **{**SGD, **changes})


def nudged(bench, scale=0.05):
    draw = torch.Generator().manual_seed(5)
    for parameter in bench.learner.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=draw))
    return bench


def without_copies(bench):
    return {n: t for n, t in bench.learner.state_dict().items() if ".teacher." not in n}


# -- the distances ----------------------------------------------------------------------------------------------------


def test_the_length_of_the_difference_is_not_squared_and_divided_by_the_root_of_the_width():
    assert feature_distance(NEW, OLD).item() == pytest.approx(0.707106781, abs=1e-9)
    projected = NEW @ torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64).T
    assert feature_distance(projected, OLD).item() == pytest.approx(1.237436867, abs=1e-9)
    biased = projected + torch.tensor([0.0, 0.5])
    assert feature_distance(biased, OLD).item() == pytest.approx(1.287885981, abs=1e-9)
    assert feature_distance(biased, OLD, "mse").item() == pytest.approx(1.6875, abs=1e-9)


def test_the_cosine_form_is_one_minus_the_mean_cosine():
    expected = 1 - (4 / (5**0.5 * 2) + 1 / 2**0.5) / 2
    assert feature_distance(NEW, OLD, "cosine").item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("loss", ["mfro", "mse", "cosine"])
def test_every_distance_is_zero_at_the_teacher_with_a_finite_gradient(loss):
    new = OLD.clone().requires_grad_()
    value = feature_distance(new, OLD, loss)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    assert bool(new.grad.isfinite().all()) and new.grad.abs().max() < 1e-12
    assert feature_distance(NEW, OLD, loss) > 0
    assert feature_distance(NEW.bfloat16(), OLD.bfloat16(), loss).dtype == torch.float32


# -- the strategy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["mfro", "mse", "cosine"])
def test_the_term_compares_with_the_learner_of_the_task_before(learner_of, loss):
    keys = {"loss": loss, "alpha": 2.5}
    bench = make(learner_of, keys).begin(0)
    assert set(bench.step()[1]) == {"learner/ce"}
    bench.learn(0).begin(1)
    earlier = make(learner_of, keys).learn(0).learner.eval()
    name = "feature_distillation/kd"
    assert bench.step()[1][name].item() == pytest.approx(0.0, abs=1e-5)
    step, terms = nudged(bench).step()
    with torch.no_grad():
        old = earlier.backbone(step.batch.images)
    torch.testing.assert_close(terms[name], 2.5 * feature_distance(step.features, old, loss), rtol=1e-4, atol=1e-6)
    assert terms[name] > 1e-3
    assert bench.learner.composition.stability == {name}


def test_no_gradient_reaches_the_head_or_the_teacher(learner_of):
    bench = nudged(make(learner_of).learn(0).begin(1))
    bench.step()[1]["feature_distillation/kd"].backward()
    assert all(p.grad is None for p in bench.learner.head.parameters())
    assert all(bool(p.grad.isfinite().all()) for p in bench.vit.parameters() if p.grad is not None)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in bench.vit.parameters()) > 10
    assert not any(t.requires_grad for t in bench.learner.composition.teacher.buffers())


def test_the_first_task_makes_one_pass_a_step_and_later_ones_two(learner_of):
    bench, passes = make(learner_of).begin(0), []
    bench.vit.register_forward_hook(lambda *a: passes.append(torch.is_grad_enabled()))
    bench.learner.training_step(next(iter(bench._loader(bench.learner.task))), 0)
    assert passes == [True]
    bench.learn(0).begin(1)
    passes.clear()
    bench.learner.training_step(next(iter(bench._loader(bench.learner.task))), 0)
    assert passes == [True, False]
    object.__setattr__(of(bench).config, "alpha", 0.0)
    passes.clear()
    bench.learner.training_step(next(iter(bench._loader(bench.learner.task))), 0)
    assert passes == [True]


def test_without_weight_it_is_finetuning_and_beside_finetune_it_is_itself(learner_of):
    off = make(learner_of, {"alpha": 0}).learn(0, 1)
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1)
    assert not differing(without_copies(off), plain.learner.state_dict())
    alone, beside = make(learner_of).learn(0, 1), make(learner_of, before=["finetune"]).learn(0, 1)
    assert not differing(alone.learner.state_dict(), beside.learner.state_dict())
    assert differing(without_copies(alone), plain.learner.state_dict())


def test_features_move_less_than_without(learner_of):
    moved = {}
    for alpha in (0.0, 5.0):
        bench = make(learner_of, {"alpha": alpha, "loss": "mse"}, lr=0.02, momentum=0.0).learn(0, epochs=4)
        before = bench.learner.features_of(bench.stream.tasks[1].train)
        bench.learn(1, epochs=4)
        moved[alpha] = float(feature_distance(bench.learner.features_of(bench.stream.tasks[1].train), before))
    assert moved[5.0] < 0.7 * moved[0.0]


def widened(bench):
    """A step whose first pass ends with three replayed rows and whose second is replay alone."""
    step, _ = bench.step()
    rows = step.batch.select(torch.arange(3)).replace(is_replay=torch.ones(3, dtype=torch.bool))
    batch = step.batch.joined(rows)
    features = torch.cat((step.features, 2 * step.features[:3]))
    step.passes[:] = [Pass(batch, features, features), Pass(rows, 3 * step.features[:3], features[:3])]
    return step


@pytest.mark.parametrize(
    ("on", "factors"), [("current", {1: 8}), ("replay", {2: 3, 3: 3}), ("both", {1: 8, 2: 3, 3: 3})]
)
def test_with_replay_the_rows_of_all_passes_are_compared_in_one_mean(learner_of, on, factors):
    bench = nudged(make(learner_of).learn(0).begin(1))
    step = widened(bench)
    object.__setattr__(of(bench).config, "on", on)
    found = of(bench).losses(step)["kd"]
    old = bench.learner.composition.teacher(step.batch).features[:8]
    new = step.features[:8]
    rows = [((k * new[:n] - old[:n]).norm(dim=1) / 32**0.5) for k, n in factors.items()]
    torch.testing.assert_close(found, torch.cat(rows).mean(), rtol=1e-4, atol=1e-6)
    if on == "both":
        object.__setattr__(of(bench).config, "on", None)
        assert torch.equal(of(bench).losses(step)["kd"], found)


def test_beside_replay_both_kinds_of_rows_are_compared(learner_of):
    bench = nudged(learner_of({"er": {"buffer": {"size": 20}}, "feature_distillation": {}}, **SGD).learn(0).begin(1))
    step, terms = bench.step()
    old = bench.learner.composition.teacher(step.batch).features
    assert len(old) == 16
    torch.testing.assert_close(terms["feature_distillation/kd"], feature_distance(step.features, old))


def test_an_empty_buffer_drops_the_term(learner_of):
    bench = make(learner_of).learn(0).begin(1)
    step, _ = bench.step()
    object.__setattr__(of(bench).config, "on", "replay")
    assert of(bench).losses(step) == {}


def test_replay_rows_without_a_buffer_are_refused(learner_of):
    with pytest.raises(UserError, match="feature_distillation needs a replay buffer"):
        make(learner_of, {"on": "replay"})


def test_frozen_features_are_refused_where_they_could_not_move(learner_of):
    bench = make(learner_of, before=["linear_probe"]).learn(0).begin(1)
    with pytest.raises(UserError, match="features are frozen"):
        bench.step()


def test_prompts_move_features_and_are_held(learner_of):
    bench = learner_of({"coda_prompt": {"num_components": 12, "layers": [0, 1]}, "feature_distillation": {}}, **SGD)
    before = bench.learn(0).begin(1).step()
    copies = copy_of(bench.learner.composition.teacher.state_dict())
    assert copies and not any("backbone" in name for name in copies)
    step, terms = nudged(bench, 0.5).step()
    old = bench.learner.composition.teacher(step.batch).features
    torch.testing.assert_close(terms["feature_distillation/kd"], feature_distance(step.features, old))
    assert F.relu(terms["feature_distillation/kd"]) > 0 and before
