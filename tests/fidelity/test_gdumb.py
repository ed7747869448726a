"""GDumb is: nothing is learnt from the stream; the answer comes from a new start on a balanced buffer alone."""

import dataclasses

import pytest
import torch
from tiny import built, config_of, copy_of, differing, digits, images_of, learn

from cl_platform.batch import Batch
from cl_platform.errors import UserError
from cl_platform.finetuning import FollowsUpdates
from cl_platform.strategies.gdumb import cutmixed, restarting_rate


def weights(learner):
    """A copy of backbone and head."""
    return copy_of({n: t for n, t in learner.state_dict().items() if not n.startswith("composition")})


def gdumb(stream=None, **keys):
    config = config_of("gdumb", strategy=keys)
    learner = built(config, stream or digits())
    return learner, config, learner.composition.members["gdumb"]


# -- the stream -----------------------------------------------------------------------------------------------------


def test_no_weight_moves_and_no_image_is_forwarded_while_the_stream_passes():
    learner, config, strategy = gdumb(fit="end")
    before = copy_of(learner.backbone.state_dict())
    learn(learner, config, digits().tasks[:1])
    assert not differing(before, learner.backbone.state_dict())
    assert (learner.forwards_train, learner.images_forwarded, learner.steps) == (0, 0, 0)
    assert len(strategy.buffer) == 16
    learn(learner, config, digits().tasks[1:])
    assert differing(before, learner.backbone.state_dict())
    assert learner.steps == 2 * 2  # passes x batches of 16 from 32 images


def test_a_full_buffer_holds_as_many_of_each_class():
    learner, config, strategy = gdumb(digits(3), buffer={"size": 12}, fit="end", passes=0)
    counts = []
    for task in digits(3).tasks:
        learn(learner, config, [task])
        counts.append(sorted(torch.bincount(torch.tensor(strategy.buffer.contents.labels)).tolist(), reverse=True))
    assert counts == [[6, 6], [3, 3, 3, 3], [2] * 6]


def test_the_first_examples_of_each_class_stay_with_first_k():
    learner, config, strategy = gdumb(buffer={"size": 30, "mode": "first_k", "fixed_classes": 10}, passes=0)
    learn(learner, config, digits().tasks)
    assert torch.bincount(torch.tensor(strategy.buffer.contents.labels)).tolist() == [3, 3, 3, 3]


# -- the fit --------------------------------------------------------------------------------------------------------


def test_every_fit_starts_from_the_weights_with_which_the_run_began():
    learner, config, strategy = gdumb(passes=0)
    before = copy_of(learner.backbone.state_dict())
    learner.begin_task(digits().tasks[0], 0)
    first = copy_of(learner.head.state_dict())
    for parameter in learner.parameters():
        parameter.data.add_(1.0)
    strategy.reset()
    assert not differing(before, learner.backbone.state_dict())
    assert not differing(first, learner.head.state_dict())


def test_a_fit_after_each_task_and_one_at_the_end_give_the_same_bytes():
    ends = []
    for fit in ("every_task", "end"):
        learner, config, _ = gdumb(fit=fit)
        ends.append(weights(learn(learner, config, digits().tasks)))
    assert not differing(*ends)


def test_what_is_learnt_depends_on_the_buffers_content_alone():
    learner, config, strategy = gdumb()
    learn(learner, config, digits().tasks)
    wanted, buffer = weights(learner), strategy.buffer
    slots = torch.randperm(len(buffer), generator=torch.Generator().manual_seed(3)).numpy()
    rows = buffer.read(slots)
    other, _, again = gdumb()
    for task in digits().tasks:
        other.begin_task(task, 0)
    labels, tasks, ids = (t.numpy() for t in (rows.labels, rows.task_ids, rows.example_ids))
    again.buffer.insert(rows.images, labels, tasks, ids, 7)  # other slots, another number of offers, another step
    other.end_task = None
    again.fit()
    assert again.buffer.contents.example_ids.tolist() != buffer.contents.example_ids.tolist()
    assert not differing(wanted, weights(other))


def test_a_restored_learner_fits_from_the_first_weights_and_not_from_those_it_was_given():
    learner, config, _ = gdumb()
    learn(learner, config, digits().tasks[:1])
    other, _, _ = gdumb()
    other.load_state_dict(copy_of(learner.state_dict()))
    learn(learner, config, digits().tasks[1:])
    learn(other, config, digits().tasks[1:])
    assert not differing(weights(learner), weights(other))


def test_the_updates_of_a_fit_are_followed_and_planned_for():
    class Follower:
        steps = []

        def after_update(self, learner, step):
            self.steps.append(step)

    assert isinstance(Follower(), FollowsUpdates)
    learner, config, strategy = gdumb(buffer={"size": 32})
    learn(learner, config, digits().tasks[:1])
    learner.begin_task(digits().tasks[1], 0)
    learner.trainer.callbacks.append(Follower())
    learner.end_task(digits().tasks[1])
    assert Follower.steps == [3, 4, 5, 6]
    assert strategy.further_updates([0, 0]) == [4, 4]  # of a full buffer: the first task fills half of it
    assert learner.images_forwarded == learner.forwards_train == 2 * 16 + 2 * 32


def test_it_learns():
    learner, config, _ = gdumb(passes=32, lr=0.02, fit="end")
    learn(learner, config, digits().tasks)
    right = 0
    for task in digits().tasks:
        logits = learner.logits_of_images(task.train.images(slice(None)))
        right += int((logits.argmax(1) == task.train.labels).sum())
    assert right >= 26  # of 32


# -- the recipe -----------------------------------------------------------------------------------------------------


def test_the_rate_is_that_of_torchs_warm_restarts_behind_one_pass_at_a_tenth():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=5e-4)
    expected = [0.005]
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rate = restarting_rate(0.05, 5e-4, updates=3)
    assert [rate(3 * epoch + 2) for epoch in range(41)] == pytest.approx(expected)


def batch_of(count=6, size=8):
    labels = torch.arange(count)
    images = torch.ones(count, 3, size, size) * labels[:, None, None, None]  # every pixel says whose it is
    return Batch(images, labels, labels, labels, labels < 0)


def draws(seed):
    return torch.Generator().manual_seed(seed)


def test_a_mixed_image_holds_the_box_of_one_other_and_the_share_is_the_area_that_was_kept():
    shares = []
    for seed in range(40):
        mixed = cutmixed(batch_of(), 1.0, 1.0, draws(seed))
        own = mixed.images == mixed.labels[:, None, None, None]
        other = mixed.images == mixed.extra["other"][:, None, None, None]
        assert bool((own | other).all())
        moved = mixed.labels != mixed.extra["other"]
        torch.testing.assert_close(own.float().mean((1, 2, 3))[moved], mixed.extra["share"][moved])
        assert sorted(mixed.extra["other"].tolist()) == mixed.labels.tolist()
        shares.append(float(mixed.extra["share"][0]))
    assert min(shares) < 0.6 and max(shares) > 0.9


def test_images_are_mixed_as_often_as_the_probability_says_and_from_their_own_stream():
    state = torch.get_rng_state()
    mixed = sum("other" in cutmixed(batch_of(), 0.5, 1.0, draws(seed)).extra for seed in range(400))
    assert 160 < mixed < 240
    assert not sum("other" in cutmixed(batch_of(), 0.0, 1.0, draws(seed)).extra for seed in range(20))
    one, other = cutmixed(batch_of(), 1.0, 1.0, draws(5)), cutmixed(batch_of(), 1.0, 1.0, draws(5))
    assert torch.equal(one.images, other.images)
    assert torch.equal(state, torch.get_rng_state())


def test_both_labels_of_a_mixed_image_count_by_their_area():
    learner, config, strategy = gdumb()
    learner.begin_task(digits().tasks[0], 0)
    logits = torch.tensor([[1.0, 3.0], [2.0, 0.0]])
    one = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    other = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0]))
    labels = torch.tensor([0, 1])
    batch = Batch(torch.zeros(2, 0), labels, labels, labels, labels > 5)
    batch = batch.with_extra(other=torch.tensor([1, 0]), share=torch.tensor([0.25, 0.25]))
    passed = dataclasses.make_dataclass("Passed", ["batch", "logits"])(batch, logits)
    torch.testing.assert_close(strategy._loss(passed), 0.25 * one + 0.75 * other)


# -- refusals -------------------------------------------------------------------------------------------------------


def test_it_stands_alone():
    config = config_of("gdumb")
    config.strategy["l2"] = config_of("l2").strategy["l2"]
    with pytest.raises(UserError, match="gdumb stands alone. Use strategy=gdumb"):
        built(config, digits())


def test_a_rate_that_lets_the_loss_explode_is_refused():
    learner, config, _ = gdumb(lr=1e30, clip=None, passes=4)
    with pytest.raises(UserError, match=r"strategy\.gdumb\.lr="):
        learn(learner, config, digits().tasks)


def test_answers_of_a_fitted_buffer_are_finite():
    learner, config, _ = gdumb()
    learn(learner, config, digits().tasks)
    assert learner.logits_of_images(images_of(digits())).isfinite().all()
