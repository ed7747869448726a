"""BFP is BFP because old features stay a linear function of new ones, by a projector that each task learns anew."""

import pytest
import torch
from tiny import copy_of, differing

import cl_platform.strategies  # noqa: F401  registers the strategies
from cl_platform import registry
from cl_platform.errors import UserError
from cl_platform.strategies.base import Pass
from cl_platform.strategies.bfp import masked_distance, new_projector, projected
from cl_platform.strategies.feature_distillation import feature_distance

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
F64 = torch.float64
NEW = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=F64)
OLD = torch.tensor([[0.0, 2.0], [1.0, -1.0]], dtype=F64)
REPLAY = ["er", "er_ace", "derpp"]


def of(bench):
    return bench.learner.composition.members["bfp"]


def make(learner_of, keys=None, partner="er", **changes):
    before = {} if partner is None else {partner: {"buffer": {"size": 24}}}
    return learner_of({**before, "bfp": keys or {}}, **{**SGD, **changes})


def nudged(bench, scale=0.05):
    draw = torch.Generator().manual_seed(5)
    for parameter in bench.learner.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=draw))
    return bench


def linear(weight, bias):
    layer = new_projector("linear", 2).double()
    layer.weight.data, layer.bias.data = torch.tensor(weight, dtype=F64), torch.tensor(bias, dtype=F64)
    return layer


def learnt(bench):
    """What was learnt, without the name under which a strategy stands."""
    return {name: tensor for name, tensor in bench.learner.state_dict().items() if ".teacher." not in name}


def forwards(bench):
    """A list that gets (rows, with gradient) of every pass through the trunk from now on."""
    seen = []
    bench.vit.register_forward_hook(lambda module, args, out: seen.append((len(out), torch.is_grad_enabled())))
    return seen


def train_one_step(bench):
    bench.learner.zero_grad(set_to_none=True)
    return bench.learner.training_step(next(iter(bench._loader(bench.learner.task))), 0)


# -- the formula ------------------------------------------------------------------------------------------------------


def test_the_distance_of_a_projected_feature_to_the_old_one():
    for weight, bias, loss, expected in (
        ([[1, 0.5], [0, 1]], [0, 0.5], "mfro", 1.287885981),
        ([[1, 0.5], [0, 1]], [0, 0], "mfro", 1.237436867),
        ([[1, 0.5], [0, 1]], [0, 0.5], "mse", 1.6875),
        ([[1, 0], [0, 1]], [0, 0], "mfro", 0.707106781),
    ):
        value = feature_distance(projected(linear(weight, bias), NEW), OLD, loss)
        assert value.item() == pytest.approx(expected, abs=1e-9)


def test_a_linear_map_between_the_features_costs_nothing():
    draw = torch.Generator().manual_seed(0)
    old = torch.randn(40, 5, generator=draw, dtype=F64)
    turned = torch.randn(5, 5, generator=draw, dtype=F64)  # invertible
    new = old @ torch.linalg.inv(turned).T
    found = torch.linalg.lstsq(new, old).solution.T
    layer = new_projector("linear", 5).double()
    layer.weight.data, layer.bias.data = found, torch.zeros(5, dtype=F64)
    torch.testing.assert_close(found, turned)
    assert feature_distance(projected(layer, new), old) < 1e-12
    assert feature_distance(new, old) > 0.1


@pytest.mark.parametrize("loss", ["mfro", "mse", "cosine"])
def test_the_gradient_is_finite_where_old_and_new_features_are_equal(loss):
    features = OLD.clone().requires_grad_()
    layer = linear([[1, 0], [0, 1]], [0, 0])
    feature_distance(projected(layer, features), OLD, loss).backward()
    assert bool(features.grad.isfinite().all()) and bool(layer.weight.grad.isfinite().all())
    wanted = torch.tensor([True, False])
    features.grad = None
    masked_distance(projected(layer, features), OLD, wanted, loss).backward()
    assert bool(features.grad.isfinite().all())


@pytest.mark.parametrize("loss", ["mfro", "mse", "cosine"])
def test_rows_left_out_count_neither_in_the_sum_nor_in_the_mean(loss):
    draw = torch.Generator().manual_seed(1)
    new, old = torch.randn(6, 4, generator=draw, dtype=F64), torch.randn(6, 4, generator=draw, dtype=F64)
    new.requires_grad_()
    wanted = torch.tensor([True, False, True, True, False, False])
    value = masked_distance(new, old, wanted, loss)
    torch.testing.assert_close(value, feature_distance(new[wanted], old[wanted], loss))
    value.backward()
    assert not new.grad[~wanted].any() and bool(new.grad[wanted].any(dim=1).all())
    assert masked_distance(new, old, torch.zeros(6, dtype=torch.bool), loss).abs() < 1e-12


def test_the_projector_works_in_float32_under_autocast():
    layer = new_projector("linear", 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projected(layer, torch.randn(3, 4).bfloat16()).dtype == torch.float32


# -- beside a replay strategy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("partner", "loss"), [("er", "mfro"), ("er_ace", "mfro"), ("derpp", "mfro"), ("er", "mse"), ("er", "cosine")]
)
def test_with_an_identity_it_is_feature_distillation_byte_for_byte(learner_of, partner, loss):
    keys = {"projector": "identity", "loss": loss}
    one = make(learner_of, keys, partner).learn(0, 1, epochs=1)
    before = {partner: {"buffer": {"size": 24}}}
    other = learner_of({**before, "feature_distillation": {"loss": loss}}, **SGD).learn(0, 1, epochs=1)
    assert not differing(one.learner.state_dict(), other.learner.state_dict())


@pytest.mark.parametrize("partner", REPLAY)
def test_without_weight_the_partner_is_alone_byte_for_byte(learner_of, partner):
    off = make(learner_of, {"alpha": 0}, partner).learn(0, 1, epochs=1)
    alone = learner_of({partner: {"buffer": {"size": 24}}}, **SGD).learn(0, 1, epochs=1)
    assert not differing(off.learner.state_dict(), alone.learner.state_dict())
    on = make(learner_of, {}, partner).learn(0, 1, epochs=1)
    assert differing(learnt(on), alone.learner.state_dict())


def test_the_first_task_has_no_projector_no_term_and_no_further_pass(learner_of):
    bench = make(learner_of).begin(0)
    seen = forwards(bench)
    assert set(bench.step()[1]) == {"learner/ce"}
    assert seen == [(8, True)]
    assert of(bench).projector is None and not list(of(bench).trainable())


@pytest.mark.parametrize("partner", REPLAY)
def test_replayed_rows_that_are_there_are_used_and_the_teacher_sees_the_same_rows(learner_of, partner):
    bench = make(learner_of, partner=partner).learn(0).begin(1)
    passes = {"er": [16], "er_ace": [8, 8], "derpp": [8, 8, 8]}[partner]
    seen = forwards(bench)
    train_one_step(bench)
    assert seen == [(n, True) for n in passes] + [(n, False) for n in passes]


def test_the_term_is_one_mean_over_current_and_replayed_rows(learner_of):
    bench = nudged(make(learner_of, {"alpha": 2.0}, "derpp").learn(0).begin(1))
    step, terms = bench.step()
    batches = [part.batch for part in step.passes]
    bench.learner.composition.losses(step)  # draws and passes once more; the first three are those of the term
    new = torch.cat([part.features for part in step.passes[:3]])
    old = torch.cat([bench.learner.composition.teacher(batch).features for batch in batches[:3]])
    assert len(new) == 24 and set(terms) == {"learner/ce", "derpp/logits", "derpp/labels", "bfp/features"}
    step.passes[:] = step.passes[:3]
    found = of(bench).losses(step)["features"]
    torch.testing.assert_close(found, 2.0 * feature_distance(of(bench).projector(new), old))
    assert bench.learner.composition.stability == {"derpp/logits", "derpp/labels", "bfp/features"}


def test_a_draw_of_its_own_makes_one_more_pass_that_nobody_else_sees(learner_of):
    bench = make(learner_of, {"rows": "fresh"}).learn(0).begin(1)
    seen = forwards(bench)
    train_one_step(bench)
    assert seen == [(16, True), (8, True), (8, False), (8, False)]
    step = bench.learner._last_step
    assert len(step.passes) == 1


def test_current_rows_alone_read_no_slot_of_a_buffer(learner_of):
    bench = make(learner_of, {"rows": "current_only"}, None).learn(0).begin(1)
    seen = forwards(bench)
    assert set(bench.step()[1]) == {"learner/ce", "bfp/features"}
    assert seen[:2] == [(8, True), (8, False)]
    beside = nudged(make(learner_of, {"rows": "current_only"}).learn(0).begin(1))
    step, terms = beside.step()
    teacher = beside.learner.composition.teacher
    expected = feature_distance(of(beside).projector(step.features[:8]), teacher(step.batch).features[:8])
    assert len(step.features) == 16
    torch.testing.assert_close(terms["bfp/features"], expected, rtol=1e-4, atol=1e-6)


def test_replayed_rows_of_old_classes_alone(learner_of):
    bench = nudged(make(learner_of, {"rows": "replay_old"}).learn(0).begin(1))
    step, _ = bench.step()
    labels = step.batch.labels.clone()
    labels[9:12] = 2  # a class of the current task
    step.passes[:] = [Pass(step.batch.replace(labels=labels), step.features, step.logits)]
    rows = [8, 12, 13, 14, 15]
    teacher = bench.learner.composition.teacher
    expected = feature_distance(of(bench).projector(step.features[rows]), teacher(step.batch).features[rows])
    torch.testing.assert_close(of(bench).losses(step)["features"], expected, rtol=1e-4, atol=1e-6)


ANY_REPLAY = [
    name
    for name in registry.strategies.names()
    if "buffer" in registry.strategies.get(name).owns and not registry.strategies.get(name).needs.alone
]


@pytest.mark.parametrize("rows", ["reuse", "fresh"])
@pytest.mark.parametrize("partner", ANY_REPLAY)
def test_it_stands_beside_any_replay_strategy(learner_of, partner, rows, caplog):
    few = {"steps": 2} if hasattr(registry.strategies.get(partner).Config(), "steps") else {}
    strategies = {partner: {"buffer": {"size": 24}, **few}, "bfp": {"rows": rows}}
    bench = learner_of(strategies, **SGD).learn(0, epochs=1).begin(1)
    step, terms = bench.step()
    assert terms["bfp/features"] > 0
    replays_early = len(step.passes) > 1 or len(step.batch) > step.current or bool(step.host.is_replay.any())
    assert ("compares no replayed image" in caplog.text) == (rows == "reuse" and not replays_early)
    bench.learn(1, epochs=1)
    assert bool(bench.logits().isfinite().all())


# -- the projector ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "count"), [("linear", 2), ("mlp", 4)])
def test_each_task_draws_a_projector_of_its_own_that_is_gone_at_its_end(learner_of, kind, count):
    bench, drawn = make(learner_of, {"projector": kind}).learn(0), []
    for task_id in (1, 2):
        bench.begin(task_id)
        drawn.append(copy_of(of(bench).projector.state_dict()))
        assert len(drawn[-1]) == count and not of(bench)._rule.state
        bound = 32**-0.5  # that of a linear layer of this width, and far from an identity
        assert all(float(t.abs().max()) <= bound for t in drawn[-1].values())
        bench.learn(task_id)
        assert not [name for name in bench.learner.state_dict() if "projector" in name]
    assert set(differing(*drawn)) == set(drawn[0])
    again = make(learner_of, {"projector": kind}).learn(0).begin(1)
    assert not differing(copy_of(of(again).projector.state_dict()), drawn[0])


@pytest.mark.parametrize("rule", [{"name": "adam", "lr": 0.01}, {"name": "sgd", "lr": 0.5, "weight_decay": 0.3}])
def test_it_moves_by_sgd_of_its_own_whatever_the_runs_rule_and_decay(learner_of, rule):
    bench, moves = make(learner_of, **rule).learn(0), []
    real = type(of(bench)).after_update

    def spy(strategy, step):
        before = copy_of(dict(strategy.projector.named_parameters()))
        gradients = {name: p.grad.clone() for name, p in strategy.projector.named_parameters()}
        real(strategy, step)
        after = copy_of(dict(strategy.projector.named_parameters()))
        moves.append((before, gradients, after))

    of(bench).after_update = lambda step: spy(of(bench), step)
    bench.learn(1)
    assert len(moves) == 4
    momentum = {name: torch.zeros_like(t) for name, t in moves[0][0].items()}
    for before, gradients, after in moves:
        for name in before:
            assert gradients[name].any()
            momentum[name] = 0.9 * momentum[name] + gradients[name]
            torch.testing.assert_close(after[name], before[name] - 0.1 * momentum[name], rtol=1e-6, atol=1e-7)
    for (_, _, after), (before, _, _) in zip(moves, moves[1:], strict=False):
        assert not differing(after, before)  # nothing else moves it


def test_an_update_that_is_not_finite_does_not_reach_it(learner_of):
    bench = make(learner_of).learn(0).begin(1)
    train_one_step(bench).backward()
    before = copy_of(of(bench).projector.state_dict())
    of(bench).projector.bias.grad[0] = float("inf")
    of(bench).after_update(bench.learner._last_step)
    assert not differing(before, of(bench).projector.state_dict())


def test_the_teacher_never_changes_and_gets_no_gradient(learner_of):
    bench = make(learner_of).learn(0)
    teacher = bench.learner.composition.teacher
    before = copy_of(teacher.state_dict())
    bench.begin(1)
    train_one_step(bench).backward()
    assert not differing(before, teacher.state_dict())
    assert all(t.grad is None and not t.requires_grad for t in teacher.buffers())
    _, terms = nudged(bench).step()
    terms["bfp/features"].backward()
    assert all(p.grad is None for p in bench.learner.head.parameters())
    assert all(bool(p.grad.any()) for p in of(bench).projector.parameters())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in bench.vit.parameters()) > 10


# -- the released code's form beside DER++ ----------------------------------------------------------------------------


def test_the_teachers_logits_take_the_place_of_stored_ones_from_the_second_task_on(learner_of):
    bench = make(learner_of, {"teacher_logits": True}, "derpp").learn(0)
    assert not differing(bench.learner.state_dict(), make(learner_of, {}, "derpp").learn(0).learner.state_dict())
    step, _ = nudged(bench.begin(1)).step()
    step.passes[:] = step.passes[:1]
    terms = bench.learner.composition.members["derpp"].losses(step)
    replayed = step.passes[1]
    old = bench.learner.composition.teacher(replayed.batch).logits
    assert old.shape[1] == 2 and replayed.logits.shape[1] == 4
    expected = 0.1 * (replayed.logits[:, :2] - old).square().sum() / replayed.logits.numel()
    torch.testing.assert_close(terms["logits"], expected)


def test_the_teacher_is_not_asked_twice_about_the_same_rows(learner_of):
    bench = make(learner_of, {"teacher_logits": True}, "derpp").learn(0).begin(1)
    seen = forwards(bench)
    train_one_step(bench)
    assert seen.count((8, True)) == 3 and seen.count((8, False)) == 3
    assert of(bench)._asked == []
    fresh = make(learner_of, {"teacher_logits": True, "rows": "fresh"}, "derpp").learn(0).begin(1)
    seen = forwards(fresh)
    train_one_step(fresh)
    assert seen.count((8, True)) == 4 and seen.count((8, False)) == 3


def test_without_weight_the_teachers_logits_stay_a_choice_of_their_own(learner_of):
    keys = {"teacher_logits": True, "alpha": 0}
    swapped = make(learner_of, keys, "derpp").learn(0, 1, epochs=1)
    alone = learner_of({"derpp": {"buffer": {"size": 24}}}, **SGD).learn(0, 1, epochs=1)
    assert differing(learnt(swapped), alone.learner.state_dict())


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_it_is_refused_without_replay_unless_current_rows_suffice(learner_of):
    for rows in ("reuse", "fresh", "replay_old"):
        with pytest.raises(UserError, match="bfp needs a replay buffer.*current_only"):
            make(learner_of, {"rows": rows}, None)
    with pytest.raises(UserError, match="stands before it"):
        learner_of({"bfp": {}, "er": {}}, **SGD)
    make(learner_of, {"rows": "current_only"}, None)


def test_teacher_logits_are_refused_where_none_are_stored(learner_of):
    with pytest.raises(UserError, match="teacher_logits=true: the replay strategy before it stores no logits"):
        make(learner_of, {"teacher_logits": True}, "er")
    with pytest.raises(UserError, match="bfp needs a replay buffer"):
        make(learner_of, {"teacher_logits": True, "rows": "current_only"}, None)


def test_a_fully_frozen_representation_is_refused_by_name(learner_of):
    bench = learner_of({"linear_probe": {}, "bfp": {"rows": "current_only"}}, **SGD).begin(0)
    with pytest.raises(UserError, match="strategy=bfp: the features are frozen"):
        bench.step()


def test_prompts_move_features_and_the_old_prompts_teach(learner_of):
    strategies = {"coda_prompt": {"num_components": 12, "layers": [0, 1]}, "bfp": {"rows": "current_only"}}
    bench = learner_of(strategies, **SGD).learn(0).begin(1)
    copies = bench.learner.composition.teacher.state_dict()
    assert copies and not any("backbone" in name for name in copies)
    step, terms = nudged(bench, 0.5).step()
    old = bench.learner.composition.teacher(step.batch).features
    torch.testing.assert_close(terms["bfp/features"], feature_distance(of(bench).projector(step.features), old))
