"""RanPAC is RanPAC because a ridge regression on fixed random features replaces every trained weight."""

import pytest
import torch
from closed_forms import absorb, drawn, scores, standing
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, stream
from cl_platform.strategies.ranpac import RIDGES, RanPAC, RanPACConfig, ridge_path

WIDTH, M = 6, 48


def ranpac(*tasks, width=WIDTH, seed=0, num_tasks=5, **keys):
    """A learner of the given (task id, features, labels)."""
    config = RanPACConfig(**{"projections": M, **keys})
    strategy = standing(RanPAC(config), width, num_tasks=num_tasks, seed=seed)
    for task in tasks:
        absorb(strategy, *task)
    return strategy


def three(per_class=40):
    return [(t, *drawn([2 * t, 2 * t + 1], seed=t, per_class=per_class)) for t in range(3)]


ASKED = drawn(list(range(6)), seed=7)[0]


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def as_kept(strategy, features):
    return (strategy.project(features) * strategy.scale).round() / strategy.scale


def solved(strategy, tasks, ridge):
    """``(H^T H + ridge I)^-1 H^T Y`` from all images at once, without the learner's statistics."""
    hidden = torch.cat([as_kept(strategy, f) for _, f, _ in tasks])
    labels = torch.cat([y for *_, y in tasks])
    targets = F.one_hot(labels).double()
    return torch.linalg.solve(hidden.T @ hidden + ridge * torch.eye(hidden.shape[1]).double(), hidden.T @ targets)


def test_the_projection_is_gaussian_from_the_runs_own_stream_and_never_moves():
    strategy = ranpac()
    expected = torch.randn(WIDTH, M, generator=stream(0, RUN_LEVEL, "ranpac/projection"))
    assert torch.equal(strategy.projection, expected)
    for task in three():
        absorb(strategy, *task)
    assert torch.equal(strategy.projection, expected)
    assert not torch.equal(ranpac(seed=1).projection, expected)
    assert torch.equal(strategy.project(ASKED), (ASKED.double() @ expected.double()).clamp_min(0))


def test_task_by_task_is_the_regression_on_all_images_at_once():
    tasks = three()
    strategy = ranpac(*tasks, ridge=10.0)
    expected = strategy.project(ASKED) @ solved(strategy, tasks, 10.0)
    torch.testing.assert_close(scores(strategy, ASKED), expected, rtol=1e-8, atol=1e-8)
    union = (0, torch.cat([f for _, f, _ in tasks]), torch.cat([y for *_, y in tasks]))
    assert torch.equal(scores(ranpac(union, ridge=10.0), ASKED), scores(strategy, ASKED))


def test_without_projection_it_is_ridge_regression_on_the_features():
    tasks = three()
    strategy = ranpac(*tasks, projections=0, ridge=3.0)
    features, labels = (torch.cat([task[i] for task in tasks]) for i in (1, 2))
    oracle = Ridge(alpha=3.0, fit_intercept=False).fit(
        as_kept(strategy, features).numpy(), F.one_hot(labels).double().numpy()
    )
    expected = torch.from_numpy(oracle.predict(ASKED.double().numpy()))
    torch.testing.assert_close(scores(strategy, ASKED), expected, rtol=1e-9, atol=1e-9)


def test_few_images_and_many_give_the_same_path_of_ridges():
    """The small system of images and the large one of features are the same regression."""
    hidden, asked = torch.randn(20, 12, dtype=torch.float64), torch.randn(7, 12, dtype=torch.float64)
    targets = torch.randn(20, 3, dtype=torch.float64)
    ridges = (1e-4, 1.0, 1e4)
    primal = ridge_path(hidden.T @ hidden, hidden.T @ targets, asked, ridges)
    dual = ridge_path(hidden @ hidden.T, targets, asked @ hidden.T, ridges)
    for ridge, one, other in zip(ridges, primal, dual, strict=True):
        system = hidden.T @ hidden + ridge * torch.eye(12).double()
        torch.testing.assert_close(one, asked @ torch.linalg.solve(system, hidden.T @ targets))
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("per_class", [12, 200], ids=["fewer images than features", "more"])
def test_the_ridge_is_the_best_of_seventeen_on_the_last_fifth_of_a_keyed_shuffle(per_class):
    features, labels = drawn([0, 1, 2], per_class=per_class, spread=0.7)
    by_class = labels.argsort(stable=True)  # without a shuffle the last fifth would be of one class
    features, labels = features[by_class], labels[by_class]
    strategy = ranpac((4, features, labels))
    order = torch.randperm(len(labels), generator=stream(0, 4, "ranpac/split"))
    cut = int(0.8 * len(labels))
    hidden, targets = strategy.project(features[order]), F.one_hot(labels[order]).double()
    errors = []
    for ridge in RIDGES:
        system = hidden[:cut].T @ hidden[:cut] + ridge * torch.eye(M).double()
        weights = torch.linalg.solve(system, hidden[:cut].T @ targets[:cut])
        errors.append(float((hidden[cut:] @ weights - targets[cut:]).square().mean()))
    chosen = float(strategy.stats.get(4, "ridge"))
    assert errors[RIDGES.index(chosen)] <= min(errors) * (1 + 1e-3)
    assert 1e-8 < chosen < 1e8


def test_the_newest_tasks_ridge_is_used_and_after_its_drop_its_predecessors():
    tasks = three()
    strategy = ranpac(*tasks)
    ridges = [float(strategy.stats.get(t, "ridge")) for t in range(3)]
    strategy.stats.get(1, "ridge").fill_(123.0)
    assert strategy.inspect()["ridge"] == ridges[2]
    strategy.drop_task(2)
    assert strategy.inspect()["ridge"] == 123.0


def test_neither_the_order_of_images_nor_that_of_tasks_changes_a_bit():
    tasks = three()
    strategy = ranpac(*tasks, ridge=1.0)
    shuffled = []
    for task_id, features, labels in reversed(tasks):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
        shuffled.append((task_id, features[order], labels[order]))
    other = ranpac(*shuffled, ridge=1.0)
    assert same(strategy, other)
    assert torch.equal(scores(strategy, ASKED), scores(other, ASKED))


@pytest.mark.parametrize("dropped", [0, 1, 2], ids=["first", "middle", "last"])
def test_dropping_a_task_leaves_the_bytes_of_a_learner_that_never_saw_it(dropped):
    tasks = three()
    strategy, never = ranpac(*tasks), ranpac(*(task for task in tasks if task[0] != dropped))
    scores(strategy, ASKED)  # what was solved before must not answer afterwards
    strategy.drop_task(dropped)
    assert not strategy._solved._sources  # nor stay in memory
    assert same(strategy, never)
    assert torch.equal(scores(strategy, ASKED), scores(never, ASKED))


def test_a_running_float_sum_would_not_give_a_task_back():
    """The negative control of the test above."""
    strategy = ranpac()
    moments = [strategy.project(f).T @ strategy.project(f) for _, f, _ in three()]
    assert not torch.equal(sum(moments) - moments[1], moments[0] + moments[2])


def test_a_class_that_comes_back_is_one_class():
    first, second = drawn([0, 1], seed=0), drawn([0, 1], seed=1)
    apart = ranpac((0, *first), (1, *second), ridge=1.0)
    at_once = ranpac((0, torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])), ridge=1.0)
    assert torch.equal(scores(apart, ASKED), scores(at_once, ASKED))


def test_images_are_projected_in_chunks_of_any_size(monkeypatch):
    tasks = three()
    whole = ranpac(*tasks, ridge=1.0)
    monkeypatch.setattr("cl_platform.strategies.ranpac.CHUNK", 7)
    assert same(whole, ranpac(*tasks, ridge=1.0))


def test_a_class_without_images_is_never_answered():
    features, labels = drawn([0, 2])
    strategy = ranpac()
    assert scores(strategy, features).shape == (80, 0)
    absorb(strategy, 0, features, labels, classes=[0, 1, 2])
    assert strategy.seen_classes() == [0, 2]
    assert scores(strategy, features).shape == (80, 2)


def test_one_image_and_one_class_are_tasks():
    strategy = ranpac((0, torch.ones(1, WIDTH), torch.tensor([3])))
    assert scores(strategy, ASKED).isfinite().all()
    assert float(strategy.stats.get(0, "ridge")) == 1.0
    assert strategy.seen_classes() == [3]


def test_no_data_shaped_the_projection_and_a_record_belongs_to_its_task():
    parts = {part.name: part.tasks for part in ranpac(*three()[:2]).components()}
    assert parts == {"projection": (), "stats.tasks.0": (0,), "stats.tasks.1": (1,)}


def test_small_trunks_get_2000_projections_and_large_ones_the_papers():
    assert ranpac(projections=None).projection.shape == (WIDTH, 2000)
    config = RanPACConfig(max_bytes=2**40)
    assert standing(RanPAC(config), 768).projection.shape == (768, 10000)


def test_more_statistics_than_allowed_are_refused_with_their_price():
    with pytest.raises(UserError, match=r"projections=10000: .* 10 tasks' moments would take 7\.5 GiB"):
        standing(RanPAC(RanPACConfig()), 768, num_tasks=10)


def test_a_value_beyond_the_bound_is_refused_by_name():
    with pytest.raises(UserError, match=r"strategy\.ranpac\.bound=0\.5"):
        ranpac(*three(), bound=0.5)


def test_a_system_without_full_rank_is_solved_with_a_larger_ridge_and_says_so():
    strategy = ranpac((0, torch.ones(3, WIDTH), torch.tensor([0, 0, 1])), ridge=0.0)
    assert scores(strategy, ASKED).isfinite().all()
    assert strategy.inspect()["ridge"] > 0
