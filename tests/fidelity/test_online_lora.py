"""Online-LoRA is itself because the loss alone decides when an adapter is folded in, and no task is known to it."""

import dataclasses
import logging
import math

import pytest
import torch
from tiny import built, config_of, digits, learn, trainer_for
from torch.nn import functional as F

from cl_platform.backbones.lora import Merge
from cl_platform.errors import UserError
from cl_platform.plan import Plan
from cl_platform.random_streams import RUN_LEVEL, stream
from cl_platform.scenarios import as_told
from cl_platform.strategies.online_lora import plateau

KEYS = {"rank": 3, "alpha": 6.0, "hard": 3, "window": 2}
OFTEN = {"mean_below": 100.0, "variance_below": 100.0}  # any full window is a plateau, once the loss rose
NEVER = {"mean_below": 0.0}


@pytest.fixture
def bench_of(learner_of):
    return lambda **keys: learner_of({"online_lora": {**KEYS, **keys}})


def folded_once(bench_of, **keys):
    """A learner in the middle of a task, with hard examples and trained factors, just before and after a fold."""
    bench = bench_of(**NEVER, **keys).learn(0).begin(1)
    step, _ = bench.step()
    assert len(step.batch) > step.current
    return bench, step


def test_what_every_adapter_strategy_promises(adapter_promise, learner_of):
    adapter_promise(learner_of, "online_lora", {**KEYS, **OFTEN}, None)


def test_before_training_the_features_are_the_plain_trunks_bit_for_bit(bench_of):
    bench = bench_of(targets=["q", "k", "v", "proj", "fc1", "fc2"])
    for started in (bench, bench.begin(0)):
        with started.learner.answering():
            batch = bench.batch()
            assert torch.equal(bench.strategy(batch), bench.vit(batch.images))


# -- when an adapter is folded in -----------------------------------------------------------------------------------


def test_the_detector_folds_at_the_fourth_and_the_ninth_of_nine_losses(bench_of, monkeypatch):
    bench = bench_of(mean_below=1.0, variance_below=0.1).begin(0)
    step, _ = bench.step()
    real, at = bench.strategy.fold, []
    monkeypatch.setattr(bench.strategy, "fold", lambda s: at.append(s.global_step + 1) or real(s))
    for number, loss in enumerate((3, 3, 0.5, 0.5, 0.5, 2, 2, 0.4, 0.4)):
        step.global_step = number
        bench.strategy._losses = torch.full((step.current,), float(loss))
        bench.strategy.after_update(step)
    assert at == [4, 9]
    assert bench.strategy.folds.tolist() == [4, 9]
    assert bench.strategy.inspect()["folds"] == [4, 9]
    assert bench.strategy.level.tolist() == pytest.approx([0.4, 0.0])


def test_the_variance_is_that_of_the_window_itself_and_is_kept_with_the_mean(bench_of):
    bench = bench_of(mean_below=2.0, variance_below=0.3).begin(0)
    step, _ = bench.step()
    for loss in (1.0, 2.0):  # variance 0.25; as an estimate from a sample it would be 0.5
        bench.strategy._losses = torch.full((step.current,), loss)
        bench.strategy.after_update(step)
    assert len(bench.strategy.folds) == 1
    assert bench.strategy.level.tolist() == pytest.approx([1.5, 0.25])


def test_a_window_that_is_not_full_tells_nothing(bench_of):
    bench = bench_of(window=5, **OFTEN).begin(0)
    step, _ = bench.step()
    for number in range(5):
        assert not len(bench.strategy.folds)
        step.global_step = number
        bench.strategy.after_update(step)
    assert bench.strategy.folds.tolist() == [5]


def test_two_folds_have_a_peak_between_them():
    draw = torch.Generator().manual_seed(0)
    losses = (3 * torch.rand(400, generator=draw)).tolist()
    below, level, peak, risen, folds = torch.tensor([1.5, 0.4]), torch.zeros(2), torch.tensor(True), True, 0
    mark = (0.0, 0.0)
    for last, this in zip(losses, losses[1:], strict=False):
        window = torch.tensor([last, this])
        now = torch.stack((window.mean(), window.var(correction=0)))
        mean, variance = (last + this) / 2, (last - this) ** 2 / 4
        peak, settled = plateau(now, level, peak, below)
        risen = risen or mean > mark[0] + math.sqrt(mark[1])
        assert bool(settled) == (risen and mean < 1.5 and variance < 0.4)
        if settled:
            folds, level, peak, mark, risen = folds + 1, now, torch.tensor(False), (mean, variance), False
            again, settled = plateau(now, level, peak, below)
            assert not again and not settled
    assert folds > 10


def test_default_thresholds_follow_the_classes_seen_and_the_batch_size(bench_of):
    bench = bench_of().learn(0, 1)
    assert bench.strategy.thresholds().tolist() == pytest.approx([0.26 * math.log(4), 1.28 / 8])
    assert bench_of(mean_below=6.0, variance_below=0.1).strategy.thresholds().tolist() == pytest.approx([6.0, 0.1])


# -- what a fold does -----------------------------------------------------------------------------------------------


def test_a_fold_leaves_the_function_and_the_new_pair_can_learn(bench_of):
    bench, step = folded_once(bench_of)
    strategy, before = bench.strategy, bench.logits()
    trained = {name: factor.detach().clone() for name, factor in strategy.factors.items()}
    assert all(factor.any() for factor in trained.values())
    strategy.fold(step)
    after = bench.logits()
    assert (after - before).norm() <= 1e-5 * before.norm()
    for target in ("q", "v"):
        expected = 2.0 * trained[f"B_{target}"] @ trained[f"A_{target}"]
        torch.testing.assert_close(strategy.dense()[target], expected)
        assert not strategy.factors[f"B_{target}"].any()
        drawn = torch.rand(3, 32, generator=stream(0, RUN_LEVEL, f"lora/1/{target}", 1))
        assert torch.equal(strategy.factors[f"A_{target}"][1], (2 * drawn - 1) / 32**0.5)
    _, terms = bench.step()
    terms["online_lora/ce"].backward()
    assert all(strategy.factors[f"B_{target}"].grad.any() for target in ("q", "v"))


def test_a_fold_is_not_the_product_of_added_factors(bench_of):
    bench, step = folded_once(bench_of)
    first = {n: f.detach().clone() for n, f in bench.strategy.factors.items()}
    bench.strategy.fold(step)
    with torch.no_grad():
        for factor in bench.strategy.factors.values():
            factor.add_(0.1)
    second = {n: f.detach().clone() for n, f in bench.strategy.factors.items()}
    bench.strategy.fold(step)
    right = 2.0 * (first["B_q"] @ first["A_q"] + second["B_q"] @ second["A_q"])
    wrong = 2.0 * (first["B_q"] + second["B_q"]) @ (first["A_q"] + second["A_q"])
    torch.testing.assert_close(bench.strategy.dense()["q"], right)
    assert (wrong - right).norm() > 0.1 * right.norm()


def test_importances_are_the_mean_squared_gradients_of_each_hard_examples_own_answer(bench_of):
    bench, step = folded_once(bench_of)
    strategy = bench.strategy
    found = strategy.importances(step.batch, step.current)
    rows = range(step.current, len(step.batch))
    expected = {name: torch.zeros_like(factor) for name, factor in strategy.factors.items()}
    for row in rows:
        logits = strategy.masked(strategy(step.batch.select(torch.tensor([row]))))
        answer = logits.argmax()  # without the label
        gradients = torch.autograd.grad(logits.log_softmax(1)[0, answer], list(strategy.factors.values()))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient.square() / len(rows)
    for name, value in expected.items():
        assert bool((found[name] >= 0).all()) and bool(found[name].any())
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)


def test_importances_are_averaged_over_the_folds(bench_of):
    bench, step = folded_once(bench_of)
    strategy = bench.strategy
    seen = []
    for _ in range(3):
        seen.append(strategy.importances(step.batch, step.current))
        strategy.fold(step)
        with torch.no_grad():
            for factor in strategy.factors.values():
                factor.add_(0.05)
    for name, kept in strategy.importance.named_buffers():
        torch.testing.assert_close(kept, sum(found[name] for found in seen) / 3)


def test_a_fold_clears_the_moments_of_the_adapter_and_of_nothing_else(bench_of, monkeypatch):
    bench, after = bench_of(**OFTEN), []
    real = bench.strategy.after_update

    def watched(step):
        before = len(bench.strategy.folds)
        real(step)
        if len(bench.strategy.folds) > before:
            state = bench.learner.context.optimizer().state
            after.append([p in state for p in bench.strategy.trained_parameters()])

    monkeypatch.setattr(bench.strategy, "after_update", watched)
    bench.learn(0)
    assert after
    assert all(flags == [False] * 4 + [True] * 2 for flags in after)


# -- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_runs_over_the_classes_seen_so_far_and_counts_hard_examples_apart(bench_of):
    bench, step = folded_once(bench_of)
    _, terms = bench.step()
    step = bench.learner._last_step
    logits = bench.strategy.head(step.features)[:, :4]
    own = step.current
    assert bench.strategy.seen.tolist() == [True] * 4 + [False] * 2
    expected = F.cross_entropy(logits[:own], step.batch.labels[:own])
    torch.testing.assert_close(terms["online_lora/ce"], expected)
    expected = F.cross_entropy(logits[own:], step.batch.labels[own:])
    torch.testing.assert_close(terms["online_lora/hard"], expected)
    assert set(terms) == {"online_lora/ce", "online_lora/hard"}
    (terms["online_lora/ce"] + terms["online_lora/hard"]).backward()
    assert not bench.strategy.head.blocks.get(RUN_LEVEL, "weight").grad[4:].any()


def test_after_a_fold_factors_that_mattered_are_pulled_to_zero(bench_of):
    bench, step = folded_once(bench_of, penalty=10.0)
    bench.strategy.fold(step)
    _, terms = bench.step()
    weights = dict(bench.strategy.importance.named_buffers())
    expected = 5.0 * sum((weights[n] * f.square()).sum() for n, f in bench.strategy.factors.items())
    torch.testing.assert_close(terms["online_lora/penalty"], expected)
    (gradient,) = torch.autograd.grad(terms["online_lora/penalty"], [bench.strategy.factors["A_v"]])
    torch.testing.assert_close(gradient, 10.0 * weights["A_v"] * bench.strategy.factors["A_v"])


def test_the_largest_losses_of_a_step_stay_and_of_equal_ones_the_smaller_ids(bench_of):
    bench, step = folded_once(bench_of)
    ids = step.batch.example_ids.tolist()
    losses = [float(i % 4) for i in range(len(ids))]
    bench.strategy._losses = torch.tensor(losses)
    bench.strategy.after_batch(step)
    best = sorted(range(len(ids)), key=lambda row: (-losses[row], ids[row]))[:3]
    assert bench.strategy.hard_ids.tolist() == [ids[row] for row in best]
    assert bench.strategy.hard_losses.tolist() == [losses[row] for row in best]
    assert torch.equal(bench.strategy.hard_images, step.batch.extra["raw"][best])
    assert torch.equal(bench.strategy.hard_labels, step.batch.labels[best])


def test_without_hard_examples_and_folds_it_is_one_adapter_trained_plainly(learner_of):
    mine = learner_of({"online_lora": {**KEYS, "hard": 0, "penalty": 0.0, **NEVER}}).begin(0)
    plain = learner_of({"lora": {"rank": 3, "alpha": 6.0}}).begin(0)
    for name, factor in plain.strategy.factors.items():
        factor.data.copy_(mine.strategy.factors[name])
    block, own = plain.learner.head.blocks, mine.strategy.head.blocks
    for name in ("weight", "bias"):
        block.get(0, name).data.copy_(own.get(RUN_LEVEL, name)[:2])
    mine.learn(0), plain.learn(0)
    for name, factor in plain.strategy.factors.items():
        torch.testing.assert_close(mine.strategy.factors[name], factor, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(own.get(RUN_LEVEL, "weight")[:2], block.get(0, "weight"), rtol=1e-3, atol=1e-5)


# -- no task is known -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2])
def test_shown_and_hidden_bounds_give_the_same_bytes(epochs):
    keys = {"window": 2, **OFTEN}
    config = config_of("online_lora", strategy=keys)
    shown = learn(built(config, digits(3)), config, digits(3).tasks, epochs=epochs)
    covered = dataclasses.replace(digits(3), hidden=True)
    hidden = built(config, as_told(covered))
    plan = Plan(dataclasses.replace(config.trainer, max_epochs=epochs), 0, covered, hidden.composition)
    (phase,) = plan.phases
    hidden.trainer = trainer_for(config)
    hidden.begin_task(phase.task, plan.epochs)
    hidden.trainer.fit(hidden, train_dataloaders=plan.loader(phase))
    hidden.end_task(phase.task)
    one, other = (learner.composition.strategies[0] for learner in (shown, hidden))
    assert len(one.folds) > 1
    mine, theirs = one.state_dict(), other.state_dict()
    common = {name for name in mine if not name.startswith("trained.")}
    assert common == {name for name in theirs if not name.startswith("trained.")}
    differing = {n for n in common if not torch.equal(mine[n], theirs[n])}
    assert differing <= {"folds"}  # by number: each of these trainers counts its updates anew
    assert len(one.folds) == len(other.folds)
    assert one.trained.task_ids == [0, 1, 2]
    assert other.trained.task_ids == [0]


def test_a_class_is_a_candidate_from_its_first_image_on(bench_of):
    bench = bench_of()
    assert bench.learner.seen_classes() == []
    bench.begin(0)
    assert bench.learner.seen_classes() == []
    bench.step()
    assert bench.learner.seen_classes() == [0, 1]
    assert bench.logits().shape == (48, 2)


def test_merged_and_unmerged_answers_agree(bench_of):
    bench = bench_of(**OFTEN, targets=["q", "v", "fc1"]).learn(0, 1)
    strategy, expected, digest = bench.strategy, bench.logits(), bench.vit.digest()
    assert len(strategy.folds)
    factors = {name: factor.detach() for name, factor in strategy.factors.items()}
    with Merge(strategy.layout, factors, strategy.dense()), torch.no_grad():
        merged = strategy.head(bench.vit(bench.batch().images))[:, strategy.seen]
    assert (merged - expected).norm() <= 1e-5 * expected.norm()
    assert bench.vit.digest() == digest


def test_a_stream_without_a_fold_is_reported(bench_of, caplog):
    with caplog.at_level(logging.WARNING, logger="cl_platform"):
        bench = bench_of(**NEVER).learn(0, 1)
        assert not caplog.records
        bench.learn(2)
    assert "never settled" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="cl_platform"):
        bench_of(**OFTEN).learn(0, 1, 2)
    assert "folded in after update" in caplog.text
    assert "never settled" not in caplog.text


def test_all_of_it_belongs_to_every_task_learnt(bench_of):
    bench = bench_of(**OFTEN).learn(0, 1)
    assert {part.tasks for part in bench.strategy.components()} == {(0, 1)}
    assert {part.kind for part in bench.strategy.components() if part.name.startswith("hard_")} == {"buffer"}
    before = bench.state()
    bench.strategy.drop_task(0)
    rows = ("hard_", "seen", "head.blocks", "moments")  # of the task alone; what is mixed stays
    changed = {name.removeprefix("composition.members.online_lora.") for name in bench.changed(before)}
    assert changed
    assert all(name.startswith(rows) for name in changed)


def test_a_second_buffer_is_refused(learner_of):
    bench = learner_of({"online_lora": KEYS, "der": {"buffer": {"size": 20}}})
    with pytest.raises(UserError, match="online_lora: brings its own hard examples"):
        bench.begin(0)
