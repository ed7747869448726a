"""The linear probe is the linear probe because one linear head learns from features that are computed once."""

import pytest
import torch
from torch.nn import functional as F

from cl_platform.heads import Head, cross_entropy
from cl_platform.scenarios import TaskLoader

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}


@pytest.fixture
def bench_of(learner_of):
    return lambda optimizer=None, **keys: learner_of({"linear_probe": keys}, **{**SGD, **(optimizer or {})})


def head_of(bench, task_id):
    return {n: p.detach().clone() for n, p in bench.learner.head.blocks.parameters_of(task_id).items()}


def moved(before, after):
    return any(not torch.equal(before[name], after[name]) for name in before)


def test_training_equals_a_linear_layer_trained_on_the_stored_features(bench_of):
    bench = bench_of().learn(0, epochs=3)
    task = bench.stream.tasks[0]
    features = bench.batch(images=task.train.images(slice(None))).extra["query"]
    head = Head(32, seed=0)
    head.begin_task(0, task.classes)
    rule = torch.optim.SGD(head.parameters(), lr=0.05, momentum=0.9)
    loader = TaskLoader(task.train, 0, 8, 0)
    for _ in range(3):
        for batch in loader:
            rule.zero_grad()
            F.cross_entropy(head(features[batch.extra["row"]]), batch.labels).backward()
            rule.step()
    for one, other in zip(head.parameters(), bench.learner.head.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_only_the_head_is_trained_and_no_byte_of_the_trunk_moves(bench_of):
    bench = bench_of()
    digest = bench.vit.digest()
    bench.learn(0, 1)
    assert bench.vit.digest() == digest
    assert all(p.grad is None and not p.requires_grad for p in bench.vit.parameters())
    assert list(bench.strategy.parameters()) == []
    trained = {id(p) for group in bench.learner.groups for p in group.parameters}
    assert trained == {id(p) for p in bench.learner.head.parameters()}


def test_each_training_image_is_forwarded_once_however_many_the_epochs(bench_of):
    bench = bench_of().learn(0, 1, epochs=5)
    assert bench.learner.cache.images_forwarded == 32
    assert bench.learner.forwards_train == 0


def test_pixels_are_not_read_again_in_training(bench_of):
    bench = bench_of().begin(0)
    step, _ = bench.step()
    assert torch.equal(step.features, step.batch.extra["query"])
    expected = bench.learner.cache.features(0, "train", bench.stream.tasks[0].train)
    assert torch.equal(step.features, expected[step.batch.extra["row"]])


def test_over_all_seen_classes_old_rows_are_negatives_and_move(bench_of):
    bench = bench_of(loss="seen").learn(0)
    before = head_of(bench, 0)
    bench.begin(1)
    step, terms = bench.step()
    assert torch.equal(terms["linear_probe/ce"], F.cross_entropy(step.logits, step.batch.labels))
    bench.learn(1)
    assert moved(before, head_of(bench, 0))


def test_over_the_tasks_classes_rows_of_other_tasks_keep_their_bits_under_decay_and_momentum(bench_of):
    bench = bench_of({"weight_decay": 0.1}, loss="task").learn(0)
    before = head_of(bench, 0)
    bench.begin(1)
    step, terms = bench.step()
    over = cross_entropy(step.logits, step.batch.labels, step.seen_classes, [2, 3])
    assert torch.equal(terms["linear_probe/ce"], over)
    assert torch.equal(over, F.cross_entropy(step.logits[:, 2:], step.batch.labels - 2))
    bench.learn(1)
    assert not moved(before, head_of(bench, 0))
    assert moved(before, head_of(bench, 1))


def test_jointly_it_trains_once_on_the_union(bench_of):
    bench = bench_of(mode="joint")
    (phase,) = bench.learner.composition.arrange(bench.stream.tasks)
    assert phase.position == 2
    assert sorted(phase.task.train.labels.tolist()) == sorted(
        label for task in bench.stream.tasks for label in task.train.labels.tolist()
    )
    sequential = bench_of().learner.composition.arrange(bench.stream.tasks)
    assert [p.task.task_id for p in sequential] == [0, 1, 2]


def test_more_epochs_fit_its_own_features_better(bench_of):
    def loss(epochs):
        bench = bench_of().learn(0, epochs=epochs).begin(0)
        return bench.step()[1]["linear_probe/ce"].item()

    assert loss(8) < loss(1)
