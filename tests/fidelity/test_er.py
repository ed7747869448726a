"""ER is ER because one cross-entropy runs over the current batch and a draw of remembered images, in one forward."""

import pytest
import torch
from tiny import begun, config_of, differing, digits, first_step
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.heads import cross_entropy

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.0}
F64 = torch.float64


def of(bench, name="er"):
    return bench.learner.composition.members[name]


def gradients(bench, terms):
    bench.learner.zero_grad(set_to_none=True)
    sum(terms.values()).backward()
    return {n: p.grad.clone() for n, p in bench.learner.named_parameters() if p.grad is not None}


# -- the formula ------------------------------------------------------------------------------------------------------


def test_one_mean_over_all_rows_or_a_mean_for_each_part():
    logits = torch.tensor([[1.0, 2, 3, 0], [0, 1, 2, 2], [2, 1, 0, 1]], dtype=F64)
    labels = torch.tensor([2, 3, 0])
    assert cross_entropy(logits, labels, range(4)).item() == pytest.approx(0.661429623, abs=1e-7)
    weights = torch.tensor([0.5, 0.5, 1.0])
    assert cross_entropy(logits, labels, range(4), weights=weights).item() == pytest.approx(1.305406122, abs=1e-7)


@pytest.mark.parametrize(("loss", "weight"), [("mean", 1.0), ("sum", 1.0), ("sum", 0.3)])
def test_the_gradient_is_that_of_a_plain_batch_of_both(learner_of, loss, weight):
    bench = learner_of({"er": {"loss": loss, "weight": weight, "batch_size": 5}}, **SGD).learn(0).begin(1)
    step, terms = bench.step()
    assert len(step.passes) == 1
    assert (step.current, len(step.batch)) == (8, 13)
    assert step.batch.is_replay.tolist() == [False] * 8 + [True] * 5
    measured = gradients(bench, terms)
    logits = bench.learner.head(bench.vit(step.batch.images))  # classes are 0..3: labels are columns
    losses = F.cross_entropy(logits, step.batch.labels, reduction="none")
    both = losses.mean() if loss == "mean" else losses[:8].mean() + weight * losses[8:].mean()
    wanted = gradients(bench, {"ce": both})
    assert measured.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(measured[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_draw_of_nothing_is_finetuning_bit_for_bit(learner_of):
    off = learner_of({"er": {"batch_size": 0}}, **SGD).learn(0, 1)
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1)
    mine = {n: t for n, t in off.learner.state_dict().items() if ".er." not in n}
    assert not differing(mine, plain.learner.state_dict())


def test_rows_that_are_fewer_than_wanted_share_the_weight_of_the_replayed_mean(learner_of):
    bench = learner_of({"er": {"loss": "sum", "batch_size": 40}}, **SGD).learn(0).begin(1)
    step, terms = bench.step()
    assert len(step.batch) == 8 + 16
    parts = F.cross_entropy(step.logits, step.batch.labels, reduction="none")
    assert terms["learner/ce"].item() == pytest.approx((parts[:8].mean() + parts[8:].mean()).item(), rel=1e-6)


# -- the order inside a step ------------------------------------------------------------------------------------------


def test_an_empty_buffer_adds_no_row(learner_of):
    step, _ = learner_of({"er": {}}, **SGD).begin(0).step()
    assert len(step.batch) == step.current == 8


def test_a_batch_is_never_replayed_in_its_own_step(learner_of):
    bench = learner_of({"er": {}}, **SGD)
    offered, replayed = [], []
    strategy = of(bench)
    after_batch = strategy.after_batch

    def watched(step):
        replayed.append(set(step.batch.example_ids[step.current :].tolist()))
        assert replayed[-1] <= {i for batch in offered for i in batch}
        offered.append(step.host.example_ids.tolist())
        after_batch(step)

    strategy.after_batch = watched
    bench.learn(0, 1, epochs=1)
    assert not replayed[0] and all(replayed[1:])


@pytest.mark.parametrize(("insert", "offers"), [("first_epoch", 16), ("every_epoch", 48)])
def test_an_example_is_offered_once_or_in_every_epoch(learner_of, insert, offers):
    bench = learner_of({"er": {"insert": insert, "buffer": {"size": 60}}}, **SGD).learn(0, epochs=3)
    assert len(of(bench).buffer) == offers
    assert of(bench).buffer.unique == 16


def test_the_buffer_holds_the_images_as_they_were_read(learner_of):
    bench = learner_of({"er": {"buffer": {"size": 12}}}, **SGD).learn(0, 1, 2)
    buffer = of(bench).buffer
    by_id = {}
    for task in bench.stream.tasks:
        by_id |= dict(zip(task.train.example_ids.tolist(), task.train.images(slice(None)), strict=True))
    assert len(buffer) == 12
    for image, example in zip(buffer.images, buffer.example_ids.tolist(), strict=True):
        assert image.dtype == torch.uint8 and torch.equal(image, by_id[example])


def test_every_draw_is_augmented_anew():
    config = config_of("er", scenario={"augment": "crop"})
    stream = digits(2)
    learner = begun(config, stream, 1)
    step, _ = first_step(learner, stream.tasks[1])
    strategy = learner.composition.members["er"]
    rows = strategy.buffer.sample(4, torch.Generator().manual_seed(0))
    columns = (rows.images, rows.labels, rows.example_ids, rows.task_ids)
    one, other = (learner.context.prepare(*columns).images for _ in range(2))
    assert one.shape == other.shape and not torch.equal(one, other)
    assert step.batch.images.dtype == one.dtype


def test_an_owner_of_the_loss_sees_the_replayed_rows_too(learner_of):
    bench = learner_of({"coda_prompt": {"num_components": 12, "layers": [0, 1]}, "er": {}}).learn(0).begin(1)
    step, _ = bench.step()
    assert len(step.batch) == 16
    assert step.batch.extra["query"].shape == (16, 32)
    assert list(step.candidates) == step.seen_classes == [0, 1, 2, 3]


def test_examples_of_the_task_being_trained_can_be_left_out(learner_of):
    bench = learner_of({"er": {"exclude_current": True}}, **SGD)
    taken = []
    after_batch = of(bench).after_batch

    def watched(step):
        taken.extend(step.batch.task_ids[step.current :].tolist())
        after_batch(step)

    of(bench).after_batch = watched
    bench.learn(0)
    assert not taken
    bench.learn(1)
    assert set(taken) == {0}


@pytest.mark.parametrize("policy", ["herding", "avalanche"])
def test_a_policy_may_choose_among_all_images_of_a_finished_task(learner_of, policy):
    bench = learner_of({"er": {"buffer": {"policy": policy, "size": 12}}}, **SGD).begin(0)
    step, _ = bench.step()
    bench.learn(0)
    buffer = of(bench).buffer
    assert buffer.owners() == {0} and 0 < len(buffer) <= 12
    bench.learn(1)
    assert buffer.owners() == {0, 1}
    assert sorted(buffer.contents.labels.tolist()) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert not step.batch.is_replay.any()


@pytest.mark.parametrize(
    ("policy", "setting"),
    [(p, s) for p in ("ring", "class_balanced", "reservoir_balanced") for s in ("class", "domain")]
    + [("greedy", "class")],  # which takes no more of a class that has its share
)
def test_every_policy_keeps_examples_of_every_task(learner_of, policy, setting):
    keys = {"buffer": {"policy": policy, "size": 12}}
    bench = learner_of({"er": keys}, stream={"setting": setting}, **SGD).learn(0, 1, 2, epochs=1)
    assert of(bench).buffer.owners() == {0, 1, 2}
    assert len(of(bench).buffer) == 12


def test_every_tensor_has_its_owner_under_its_key(learner_of):
    bench = learner_of({"er": {}}, **SGD).learn(0, 1)
    owned = {c.name if c.name == n else f"{c.name}.{n}" for c in of(bench).components() for n in c.tensors}
    assert owned == set(of(bench).state_dict())


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 0}, r"strategy\.er\.buffer\.size=0: must be at least 1"),
        ({"size": 5}, r"strategy\.er\.buffer\.size=5: the stream has 6 classes"),
        ({"bytes": 100}, r"strategy\.er\.buffer\.bytes=100"),
        (
            {"policy": "ring", "per_task": 300},
            r"er\.buffer\.per_task=300.*Change strategy\.er\.buffer\.per_task or",
        ),
        ({"policy": "ring", "per_task": 100}, r"strategy\.er\.buffer\.per_task=100: 3 tasks need 300 slots"),
        ({"policy": "class_balanced", "fixed_classes": 3}, r"strategy\.er\.buffer\.fixed_classes=3: the stream has 6"),
        ({"bytes": 4000}, r"strategy\.er\.buffer\.bytes=4000: the stream has 6 classes"),
        ({"policy": "resevoir"}, r"strategy\.er\.buffer\.policy=resevoir.*reservoir"),
    ],
)
def test_a_buffer_that_cannot_work_is_refused(learner_of, keys, message):
    with pytest.raises(UserError, match=message):
        learner_of({"er": {"buffer": keys}}).begin(0)
