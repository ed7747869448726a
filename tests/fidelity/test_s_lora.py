"""S-LoRA is S-LoRA because each task has an adapter and a head of its own, and frozen features alone choose them."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.random_streams import stream
from cl_platform.strategies.routing import ELSEWHERE, kmeans, nearest_set

KEYS = {"rank": 4, "alpha": 4.0}


@pytest.fixture
def bench_of(learner_of):
    return lambda stream=None, **keys: learner_of({"s_lora": {**KEYS, **keys}}, stream=stream)


def own(bench):
    return {name: t for name, t in bench.state().items() if "members.s_lora" in name}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("router", ["class_mean", "kmeans"])
def test_what_every_adapter_strategy_promises(adapter_promise, learner_of, router):
    adapter_promise(learner_of, "s_lora", {**KEYS, "router": router, "clusters": 3}, None)


def test_before_training_the_features_are_the_plain_trunks(bench_of):
    bench = bench_of().begin(0)
    with bench.learner.answering():
        batch = bench.batch()
        assert torch.equal(bench.strategy(batch), bench.vit(batch.images))


def test_a_task_trains_its_own_adapter_and_head_whatever_the_router_would_say(bench_of, monkeypatch):
    bench = bench_of().learn(0).begin(1)
    monkeypatch.setattr(bench.strategy, "route", None)
    _, terms = bench.step()
    sum(terms.values()).backward()
    for slots in (bench.strategy.bank, bench.strategy.heads):
        assert all(p.grad is None for p in slots.parameters_of(0).values())
        assert all(p.grad is not None for p in slots.parameters_of(1).values())
    assert all(p.grad is None for p in bench.learner.head.parameters())
    assert bench.strategy.bank.get(1, "B_q").grad.any()


def test_on_the_first_task_it_trains_as_sequential_lora_bit_for_bit(learner_of):
    one = learner_of({"s_lora": KEYS}).learn(0).strategy
    other = learner_of({"lora": KEYS}).learn(0)
    assert equal(dict(one.bank.parameters_of(0)), dict(other.strategy.factors.items()))
    assert equal(dict(one.heads.parameters_of(0)), dict(other.learner.head.blocks.parameters_of(0)))


@pytest.mark.parametrize("setting", ["class", "domain"])
def test_with_the_right_route_nothing_is_forgotten(bench_of, monkeypatch, setting):
    bench = bench_of({"setting": setting}).learn(0)
    monkeypatch.setattr(bench.strategy, "route", lambda batch: torch.zeros(len(batch), dtype=torch.int64))
    before = bench.logits()
    after = bench.learn(1, 2).logits()
    assert torch.equal(before, after[:, : before.shape[1]])


@pytest.mark.parametrize("setting", ["class", "domain"])
@pytest.mark.parametrize("dropped", [0, 1, 2], ids=["first", "middle", "last"])
def test_dropping_a_task_leaves_the_bytes_of_a_learner_that_never_saw_it(bench_of, setting, dropped):
    bench = bench_of({"setting": setting}).learn(0, 1, 2)
    bench.strategy.drop_task(dropped)
    never = bench_of({"setting": setting}).learn(*(t for t in range(3) if t != dropped))
    assert equal(own(bench), own(never))
    assert torch.equal(bench.logits(), never.logits())
    assert bench.learner.seen_classes() == never.learner.seen_classes()


def test_the_order_of_the_tasks_changes_no_byte_of_any(bench_of):
    assert equal(own(bench_of().learn(0, 1, 2)), own(bench_of().learn(2, 0, 1)))


def test_an_image_is_answered_by_the_head_it_was_routed_to_and_no_other(bench_of):
    bench = bench_of().learn(0, 1, 2)
    logits, rows = bench.logits(), bench.strategy.route(bench.batch())
    assert set(rows.tolist()) == {0, 1, 2}
    for image, task_id in enumerate(rows.tolist()):
        inside = logits[image, 2 * task_id : 2 * task_id + 2]
        outside = torch.cat([logits[image, : 2 * task_id], logits[image, 2 * task_id + 2 :]])
        assert (outside <= inside.max() + ELSEWHERE).all()
        assert (inside.abs() < 100).all()
    assert (logits.softmax(1) == 0).sum() == 4 * len(logits)
    with bench.learner.answering(), torch.no_grad():
        for task_id in range(3):
            layout, head = bench.strategy.layout, bench.strategy.heads
            tokens = bench.vit.embed(bench.batch().images)
            extras = layout.extras(dict(bench.strategy.bank.parameters_of(task_id)))
            features = bench.vit.readout(bench.vit.finish(bench.vit.run(tokens, extras=extras)))
            alone = F.linear(features, head.get(task_id, "weight"), head.get(task_id, "bias"))
            mine = logits[rows == task_id, 2 * task_id : 2 * task_id + 2]
            torch.testing.assert_close(mine, alone[rows == task_id], rtol=1e-4, atol=1e-5)


def test_a_head_that_an_image_was_not_routed_to_still_ranks_its_own_classes(bench_of):
    bench = bench_of().learn(0, 1)
    logits, rows = bench.logits(), bench.strategy.route(bench.batch())
    with bench.learner.answering(), torch.no_grad():
        features = bench.strategy(bench.batch())
        for task_id in range(2):
            elsewhere = rows != task_id
            expected = bench.strategy._head(task_id, features).argmax(1)
            assert expected[elsewhere].unique().numel() == 2  # else the lowest class alone would do
            mine = logits[:, 2 * task_id : 2 * task_id + 2].argmax(1)
            assert torch.equal(mine[elsewhere], expected[elsewhere])


def test_the_router_sees_the_frozen_trunk_and_not_the_adapters(bench_of):
    bench = bench_of().learn(0, 1)
    rows, batch = bench.strategy.route(bench.batch()), bench.batch()
    with torch.no_grad():
        for parameter in bench.strategy.bank.parameters():
            parameter.add_(1.0)
    assert torch.equal(bench.batch().extra["query"], batch.extra["query"])
    assert torch.equal(bench.strategy.route(bench.batch()), rows)


def test_domains_have_heads_over_the_same_classes_and_are_routed_by_k_means(bench_of):
    bench = bench_of({"setting": "domain"}).learn(0, 1)
    assert bench.learner.seen_classes() == [0, 1]
    assert bench.logits().shape == (48, 2)
    assert (bench.logits() > ELSEWHERE / 2).all()
    assert bench.strategy.inspect()["centroids"] == {"0": 5, "1": 5}
    assert bench_of().learn(0).strategy.inspect()["centroids"] == {"0": 2}


def test_centroids_of_a_task_come_from_its_own_frozen_features_in_the_order_of_the_data_set(bench_of):
    bench = bench_of(router="kmeans", clusters=3).learn(0, 1)
    task = bench.stream.task(1)
    with torch.no_grad():
        ready = bench.learner.transforms.evaluate(task.train.images(slice(None)))
        features = F.normalize(bench.vit(ready).double(), dim=1)
    expected = kmeans(features, 3, stream(0, 1, "router"))
    torch.testing.assert_close(bench.strategy.router.get(1, "centroids"), expected, rtol=0, atol=1e-6)
    means = bench_of(router="class_mean").learn(0, 1).strategy.router.get(1, "centroids")
    by_class = torch.stack([features[task.train.labels == c].mean(0) for c in (2, 3)])
    torch.testing.assert_close(means, by_class, rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", ["class_mean", "kmeans"])
def test_the_order_in_which_a_tasks_images_come_moves_no_centroid(bench_of, router):
    bench = bench_of(router=router, clusters=3)
    task = bench.stream.task(0)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(1))
    turned = dataclasses.replace(task, train=task.train.select(order))
    expected = bench.strategy._centroids(task)
    bench.learner.cache.forget(0)
    torch.testing.assert_close(bench.strategy._centroids(turned), expected, rtol=1e-6, atol=1e-9)


def test_nothing_is_asked_of_the_frozen_trunk_in_training(bench_of):
    bench = bench_of().begin(0)
    before = bench.learner.forwards_train
    step, _ = bench.step()
    assert "query" not in step.batch.extra
    assert bench.learner.forwards_train - before == len(step.batch)


def test_a_replay_buffer_beside_it_is_refused(bench_of):
    bench = bench_of()
    bench.learner.context.buffer = object()
    with pytest.raises(UserError, match="strategy=s_lora: each task trains a part of its own, without replay"):
        bench.begin(0)


# -- k-means and the nearest centroid --------------------------------------------------------------------------------


def points(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    middle = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    return middle[torch.arange(count) % 3] + 0.3 * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def test_k_means_finds_clear_clusters_and_ends_at_their_means():
    for seed in range(5):
        centres = kmeans(points(), 3, torch.Generator().manual_seed(seed))
        expected = torch.stack([points()[i::3].mean(0) for i in range(3)])
        nearest = torch.cdist(centres, expected).argmin(1)
        assert sorted(nearest.tolist()) == [0, 1, 2]
        torch.testing.assert_close(centres, expected[nearest])


def test_k_means_ends_where_no_point_has_a_nearer_centre():
    centres = kmeans(points(200), 7, torch.Generator().manual_seed(0))
    owner = torch.cdist(points(200), centres).argmin(1)
    assert len(owner.unique()) == 7
    torch.testing.assert_close(centres, torch.stack([points(200)[owner == c].mean(0) for c in range(7)]))


def test_with_fewer_points_than_centres_each_point_is_one():
    centres = kmeans(points(3), 5, torch.Generator().manual_seed(0))
    assert torch.equal(centres.sort(0).values, points(3).sort(0).values)
    same = torch.ones(4, 2, dtype=torch.float64)
    assert torch.equal(kmeans(same, 3, torch.Generator().manual_seed(0)), same[:1])


def test_the_start_follows_its_generator_alone():
    one, other, again = (kmeans(points(200), 7, torch.Generator().manual_seed(s)) for s in (0, 1, 0))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_the_nearest_set_is_that_of_a_loop_and_ties_go_to_the_first(norm):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(30, 4, generator=generator)
    sets = [torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (2, 5, 1)]
    found = nearest_set(query, sets, norm)
    for q, row in zip(F.normalize(query.double(), dim=1), found.tolist(), strict=True):
        distances = [min(float((q - c).norm(p=norm)) for c in own) for own in sets]
        assert distances[row] == min(distances)
    assert set(nearest_set(query, [sets[0], sets[0]], norm).tolist()) == {0}
    alone = torch.cat([nearest_set(q[None], sets, norm) for q in query])
    assert torch.equal(alone, found)
