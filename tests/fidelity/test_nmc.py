"""Nearest class mean is itself because a class is its mean frozen feature, whatever the order in which images came."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.evaluation import answered
from cl_platform.scenarios import ImageSet

RULES = [
    {"mean": "normalised", "distance": "cosine"},
    {"mean": "normalised", "distance": "euclidean"},
    {"mean": "raw", "distance": "cosine"},
    {"mean": "raw", "distance": "euclidean"},
]


@pytest.fixture
def bench_of(learner_of):
    return lambda stream=None, vit=None, **keys: learner_of({"nmc": keys}, stream=stream, vit=vit)


def absorb(bench, *task_ids):
    """Learn in closed form: the bounds of the tasks, and no training."""
    for task_id in task_ids:
        bench.begin(task_id)
        bench.learner.end_task(bench.stream.task(task_id))
    return bench


def statistics(bench):
    return {n: t for n, t in bench.state().items() if ".stats." in n}


def equal(one, other):
    return sorted(one) == sorted(other) and all(
        t.dtype == other[n].dtype and torch.equal(t, other[n]) for n, t in one.items()
    )


def features_and_labels(bench, *task_ids):
    images = torch.cat([bench.stream.task(t).train.images(slice(None)) for t in task_ids])
    labels = torch.cat([bench.stream.task(t).train.labels for t in task_ids])
    return bench.batch(images=images).extra["query"].double(), labels


def answer(bench, images=None):
    seen = bench.learner.seen_classes()
    return answered(bench.logits(images), seen, seen)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(rule.values()))
def test_answers_equal_those_of_a_loop_over_images_and_classes(bench_of, rule):
    bench = absorb(bench_of(**rule), 0, 1, 2)
    features, labels = features_and_labels(bench, 0, 1, 2)
    unit = (lambda v: v / v.norm()) if rule["mean"] == "normalised" else (lambda v: v)
    means = {}
    for c in range(6):
        of_class = [unit(f) for f, y in zip(features, labels, strict=True) if y == c]
        means[c] = sum(of_class) / len(of_class)  # not normalised again
    expected = []
    for f in bench.batch().extra["query"].double():
        if rule["distance"] == "cosine":
            nearness = {c: float(f @ m / (f.norm() * m.norm())) for c, m in means.items()}
        else:
            nearness = {c: -float((unit(f) - m).norm()) for c, m in means.items()}
        expected.append(max(nearness, key=nearness.get))
    assert answer(bench).tolist() == expected


def test_the_rule_of_the_paper_equals_scikit_learns_nearest_centroid_on_normalised_features(bench_of):
    bench = absorb(bench_of(distance="euclidean"), 0, 1, 2)
    features, labels = features_and_labels(bench, 0, 1, 2)
    oracle = NearestCentroid().fit(F.normalize(features, dim=1).numpy(), labels.numpy())
    noise = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    query = bench.batch(images=noise).extra["query"].double()
    assert np.array_equal(answer(bench, noise).numpy(), oracle.predict(F.normalize(query, dim=1).numpy()))


def test_the_means_are_those_of_the_normalised_features_to_the_grids_precision(bench_of):
    bench = absorb(bench_of(), 0, 1)
    features, labels = features_and_labels(bench, 0, 1)
    classes, means = bench.strategy._means()
    assert classes == [0, 1, 2, 3]
    for c, mean in zip(classes, means, strict=True):
        expected = F.normalize(features, dim=1)[labels == c].mean(0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=2.0**-18)


def test_the_order_of_images_and_the_way_they_are_split_change_no_bit(bench_of):
    """Sums of rounded features are exact integers, so that neither order nor chunks nor processes matter."""
    strategy = bench_of().strategy
    features = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 3, (5000,), generator=torch.Generator().manual_seed(1))
    whole = strategy._record(features, labels, (0, 1, 2))
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(2))
    assert equal(whole, strategy._record(features[order], labels[order], (2, 1, 0)))
    for size in (37, 64):
        parts = [
            strategy._record(f, y, (0, 1, 2)) for f, y in zip(features.split(size), labels.split(size), strict=True)
        ]
        assert torch.equal(whole["sum"], sum(part["sum"] for part in parts))
        assert torch.equal(whole["count"], sum(part["count"] for part in parts))
    half = strategy._record(features[:2500], labels[:2500], (0, 1, 2))["sum"]
    rest = strategy._record(features[2500:], labels[2500:], (0, 1, 2))["sum"]
    assert torch.equal(whole["sum"] - half, rest)


def test_plain_float_sums_would_depend_on_the_order():
    """The negative control: without the grid the test above has something to find."""
    drawn = torch.randn(5000, 32, generator=torch.Generator().manual_seed(0))
    features = F.normalize(drawn.double(), dim=1)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(features.cumsum(0)[-1], features[order].cumsum(0)[-1])
    one, other = features[:2500].sum(0), features[2500:].sum(0)
    assert not torch.equal((one + other) - other, one)


def test_permuting_the_images_of_a_task_leaves_the_state_bit_identical(bench_of):
    bench = absorb(bench_of(), 0, 1)
    other = bench_of()
    tasks = []
    for task in other.stream.tasks:
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(task.task_id))
        tasks.append(dataclasses.replace(task, train=task.train.select(order)))
    other.stream = dataclasses.replace(other.stream, tasks=tuple(tasks))
    absorb(other, 0, 1)
    assert not torch.equal(tasks[0].train.labels, bench.stream.tasks[0].train.labels)
    found, expected = statistics(other), statistics(bench)
    for name, tensor in expected.items():  # among other batch mates a feature may differ by a step of the grid
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=0, atol=8.0)


def test_the_order_of_the_tasks_changes_no_byte(bench_of):
    assert equal(statistics(absorb(bench_of(), 0, 1, 2)), statistics(absorb(bench_of(), 2, 0, 1)))


@pytest.mark.parametrize("dropped", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("setting", ["class", "domain"])
def test_dropping_a_task_leaves_the_bytes_of_a_learner_that_never_saw_it(bench_of, dropped, setting):
    stream = {"setting": setting}
    bench = absorb(bench_of(stream), 0, 1, 2)
    bench.strategy.drop_task(dropped)
    never = absorb(bench_of(stream), *(t for t in range(3) if t != dropped))
    assert equal(statistics(bench), statistics(never))
    assert bench.learner.seen_classes() == never.learner.seen_classes()
    assert torch.equal(bench.logits(), never.logits())


def test_dropping_every_task_leaves_no_class(bench_of):
    bench = absorb(bench_of(), 0)
    bench.strategy.drop_task(0)
    assert bench.learner.seen_classes() == []
    assert bench.logits().shape == (48, 0)


def test_the_records_of_earlier_tasks_keep_their_bits(bench_of):
    bench = absorb(bench_of(), 0, 1)
    before = statistics(bench)
    absorb(bench, 2)
    assert equal(before, {n: t for n, t in statistics(bench).items() if ".tasks.2." not in n})


def test_a_class_in_several_tasks_is_the_mean_of_all_its_images(bench_of):
    bench = bench_of({"setting": "domain"})
    tasks = list(bench.stream.tasks)
    tasks[1] = dataclasses.replace(tasks[1], train=tasks[1].train.select(torch.tensor([0, 1, 2, 8])))
    bench.stream = dataclasses.replace(bench.stream, tasks=tuple(tasks))
    absorb(bench, 0, 1)
    features, labels = features_and_labels(bench, 0, 1)
    classes, means = bench.strategy._means()
    assert classes == [0, 1]
    expected = torch.stack([F.normalize(features, dim=1)[labels == c].mean(0) for c in classes])
    torch.testing.assert_close(means, expected, rtol=0, atol=2.0**-18)


def test_one_class_is_always_the_answer(bench_of):
    bench = absorb(bench_of({"tasks": 1, "classes_per_task": 1}), 0)
    assert answer(bench, torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)).tolist() == [0] * 9


def test_a_class_without_images_is_never_answered(bench_of):
    bench = bench_of()
    task = bench.stream.tasks[0]
    without = dataclasses.replace(task, train=task.train.select((task.train.labels == 1).nonzero()[:, 0]))
    bench.stream = dataclasses.replace(bench.stream, tasks=(without, *bench.stream.tasks[1:]))
    absorb(bench, 0, 1)
    assert bench.learner.seen_classes() == [1, 2, 3]
    assert bench.logits().shape[1] == 3
    assert 0 not in answer(bench).tolist()


def test_ties_go_to_the_smallest_class_id(bench_of):
    bench = bench_of()
    rows = torch.tensor([0, 1, 2])
    first, second = bench.stream.tasks[:2]
    same = ImageSet(torch.full((3,), 2), first.train.example_ids[rows], first.train.source)
    twin = dataclasses.replace(second, train=same)
    alone = dataclasses.replace(first, train=first.train.select(rows))
    bench.stream = dataclasses.replace(bench.stream, tasks=(alone, twin))
    absorb(bench, 1, 0)
    logits = bench.logits()
    assert torch.equal(logits[:, 0], logits[:, 1])
    assert set(answer(bench).tolist()) == {0}


def test_one_image_is_enough_and_no_training_takes_place(bench_of):
    bench = bench_of()
    task = bench.stream.tasks[0]
    one = dataclasses.replace(task, train=task.train.select(torch.tensor([3])))
    bench.stream = dataclasses.replace(bench.stream, tasks=(one, *bench.stream.tasks[1:]))
    digest = bench.vit.digest()
    absorb(bench, 0)
    assert bench.learner.seen_classes() == [0]
    assert bench.vit.digest() == digest
    assert not bench.learner.composition.needs_gradient


@pytest.mark.parametrize("mean", ["normalised", "raw"])
def test_a_value_beyond_the_bound_is_refused_and_names_it(bench_of, mean):
    bench = bench_of(mean=mean, bound=0.01)
    with pytest.raises(UserError, match=r"strategy\.nmc\.bound=0\.01"):
        absorb(bench, 0)
    assert bench.strategy.stats.task_ids == []


def test_a_feature_that_is_no_number_is_refused(bench_of):
    strategy = bench_of(mean="raw").strategy
    with pytest.raises(UserError, match="nan"):
        strategy._record(torch.tensor([[1.0, float("nan")]]), torch.tensor([0]), (0,))


def test_features_of_one_direction_stay_within_the_bound_whatever_their_length(bench_of):
    strategy = bench_of().strategy
    values = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0)) + 1e-3
    features = torch.cat([values, torch.zeros(20000, 3)], dim=1)
    record = strategy._record(features, torch.zeros(20000, dtype=torch.int64), (0,))
    assert record["sum"][0].tolist() == [20000 * 2.0**18, 0, 0, 0]


def test_bfloat16_changes_neither_the_type_of_the_statistics_nor_their_exactness(learner_of):
    bench = learner_of({"nmc": {}}, precision="bf16-mixed")
    absorb(bench, 0, 1)
    types = {name.rsplit(".", 1)[1]: tensor.dtype for name, tensor in statistics(bench).items()}
    assert types == {"sum": torch.float64, "count": torch.int64, "classes": torch.int64}
    assert all(torch.equal(t, t.round()) for n, t in statistics(bench).items() if n.endswith("sum"))


def test_each_image_of_training_is_forwarded_once(bench_of):
    bench = absorb(bench_of(), 0, 1, 2)
    assert bench.learner.cache.images_forwarded == 48


def test_it_says_which_of_the_rules_it_is(bench_of):
    rules = {bench_of(**rule).strategy.inspect()["rule"] for rule in RULES}
    assert len(rules) == 4


def test_an_answer_depends_on_nothing_but_the_image(bench_of):
    bench = absorb(bench_of(), 0, 1)
    whole, images = bench.logits(), bench.images()
    for size in (1, 7):
        parts = torch.cat([bench.logits(part) for part in images.split(size)])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
