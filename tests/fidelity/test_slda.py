"""SLDA is SLDA because one within-class covariance, shared by all classes, decides what near to a class mean is."""

import numpy as np
import pytest
import torch
from closed_forms import absorb, drawn, scores, standing
from sklearn.covariance import OAS
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from cl_platform.errors import UserError
from cl_platform.strategies.slda import SLDA, SLDAConfig

WIDTH = 6


def slda(*tasks, width=WIDTH, **keys):
    """A learner of the given (task id, features, labels)."""
    strategy = standing(SLDA(SLDAConfig(**keys)), width)
    for task in tasks:
        absorb(strategy, *task)
    return strategy


def three():
    return [(t, *drawn([2 * t, 2 * t + 1], seed=t)) for t in range(3)]


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def on_grid(features):
    """Features as the learner keeps them, so that references work on the same numbers."""
    return (features.double() * 2.0**12).round() / 2.0**12


def test_without_shrinkage_scores_are_those_of_linear_discriminant_analysis():
    tasks = three()
    features, labels = (torch.cat([task[i] for task in tasks]) for i in (1, 2))
    oracle = LinearDiscriminantAnalysis(solver="lsqr").fit(on_grid(features).numpy(), labels.numpy())
    asked, _ = drawn(list(range(6)), seed=7)
    found = scores(slda(*tasks, epsilon=0.0), asked)
    expected = torch.from_numpy(oracle.decision_function(asked.double().numpy()))
    torch.testing.assert_close(found - found[:, :1], expected - expected[:, :1], rtol=1e-9, atol=1e-9)


def test_full_shrinkage_is_the_nearest_mean_of_raw_features():
    tasks = three()
    asked, _ = drawn(list(range(6)), seed=7)
    means = torch.stack([on_grid(f)[y == c].mean(0) for _, f, y in tasks for c in y.unique()])
    distance = (asked.double()[:, None] - means).square().sum(2)
    found = scores(slda(*tasks, epsilon=1.0), asked)
    torch.testing.assert_close(-2 * found + asked.double().square().sum(1, keepdim=True), distance)


def test_the_covariance_is_that_within_the_classes():
    tasks = three()
    centred = torch.cat([on_grid(f)[y == c] - on_grid(f)[y == c].mean(0) for _, f, y in tasks for c in y.unique()])
    _, _, covariance = slda(*tasks)._summary()
    torch.testing.assert_close(covariance, centred.T @ centred / len(centred), rtol=1e-12, atol=1e-12)


def test_a_class_that_comes_back_is_one_class():
    first, second = drawn([0, 1], seed=0), drawn([0, 1], seed=1)
    apart = slda((0, *first), (1, *second))
    at_once = slda((0, torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]])))
    asked = drawn([0, 1], seed=7)[0]
    assert torch.equal(scores(apart, asked), scores(at_once, asked))


def test_counts_of_images_are_no_priors():
    """Halfway between two means both classes score alike, however many images each had."""
    features, labels = drawn([0, 1])
    rows = torch.cat([torch.arange(len(labels)), (labels == 1).nonzero()[:, 0].repeat(9)])
    strategy = slda((0, features[rows], labels[rows]))
    _, means, _ = strategy._summary()
    middle = scores(strategy, means.mean(0, keepdim=True))
    torch.testing.assert_close(middle[0, 0], middle[0, 1], rtol=1e-9, atol=1e-9)


def test_neither_the_order_of_images_nor_that_of_tasks_changes_a_bit():
    tasks = three()
    strategy = slda(*tasks)
    shuffled = []
    for task_id, features, labels in reversed(tasks):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))
        shuffled.append((task_id, features[order], labels[order]))
    other = slda(*shuffled)
    one, found = strategy.state_dict(), other.state_dict()
    assert all(torch.equal(one[name], found[name]) for name in one if not name.startswith("trained"))
    asked = drawn(list(range(6)), seed=7)[0]
    assert torch.equal(scores(strategy, asked), scores(other, asked))


@pytest.mark.parametrize("dropped", [0, 1, 2], ids=["first", "middle", "last"])
def test_dropping_a_task_leaves_the_bytes_of_a_learner_that_never_saw_it(dropped):
    tasks = three()
    strategy, never = slda(*tasks), slda(*(task for task in tasks if task[0] != dropped))
    asked = drawn(list(range(6)), seed=7)[0]
    scores(strategy, asked)  # what was solved before must not answer afterwards
    strategy.drop_task(dropped)
    assert same(strategy, never)
    assert torch.equal(scores(strategy, asked), scores(never, asked))


def test_a_running_float_sum_would_not_give_a_task_back():
    """The negative control of the test above."""
    moments = [f.double().T @ f.double() for _, f, _ in three()]
    assert not torch.equal(sum(moments) - moments[1], moments[0] + moments[2])


def test_the_records_of_other_tasks_keep_their_bits():
    tasks = three()
    strategy = slda(*tasks[:2])
    before = {name: tensor.clone() for name, tensor in strategy.state_dict().items()}
    absorb(strategy, *tasks[2])
    assert all(torch.equal(before[name], strategy.state_dict()[name]) for name in before)


def test_a_class_without_images_is_never_answered():
    features, labels = drawn([0, 2])
    strategy = standing(SLDA(SLDAConfig()), WIDTH)
    absorb(strategy, 0, features, labels, classes=[0, 1, 2])
    assert strategy.seen_classes() == [0, 2]
    assert scores(strategy, features).shape == (80, 2)


def test_a_value_beyond_the_bound_and_a_sum_beyond_exactness_are_refused_by_name():
    with pytest.raises(UserError, match=r"strategy\.slda\.bound=0\.5"):
        slda((0, *drawn([0, 1])), bound=0.5)
    many = torch.full((2**17, 1), 64.0)
    with pytest.raises(UserError, match=r"strategy\.slda\.bound=64\.0: 131072 images"):
        slda((0, many, torch.zeros(2**17, dtype=torch.int64)), width=1)


def test_one_image_is_a_task():
    strategy = slda((0, torch.ones(1, WIDTH), torch.tensor([3])))
    assert strategy.seen_classes() == [3]
    assert scores(strategy, torch.randn(4, WIDTH)).isfinite().all()


# -- the paper's running covariance -----------------------------------------------------------------------------------


def running(tasks):
    """The paper's Algorithm, written out once more."""
    mean, count, sigma, t = {}, {}, np.zeros((WIDTH, WIDTH)), 0
    for _, features, labels in tasks:
        for x, c in zip(features.double().numpy(), labels.tolist(), strict=True):
            away = x - mean.get(c, np.zeros(WIDTH))
            sigma = (t * sigma + t * np.outer(away, away) / (t + 1)) / (t + 1)
            mean[c] = (count.get(c, 0) * mean.get(c, 0) + x) / (count.get(c, 0) + 1)
            count[c] = count.get(c, 0) + 1
            t += 1
    return mean, sigma


def test_streaming_is_the_papers_rule_image_by_image():
    mean, sigma = running(three())
    classes, means, covariance = slda(*three(), update="streaming")._summary()
    assert classes == list(range(6))
    np.testing.assert_allclose(covariance.numpy(), sigma, rtol=1e-10)
    np.testing.assert_allclose(means.numpy(), np.stack([mean[c] for c in classes]), rtol=1e-10)


def test_streaming_depends_on_the_order_and_misses_the_covariance():
    tasks = three()
    exact, streamed = (slda(*tasks, update=rule)._summary()[2] for rule in ("exact", "streaming"))
    backwards = slda(*((t, f.flip(0), y.flip(0)) for t, f, y in tasks), update="streaming")._summary()[2]
    assert not torch.equal(streamed, backwards)
    assert 0.02 < float((streamed - exact).norm() / exact.norm()) < 0.8


def test_the_first_covariance_of_streaming_may_be_shrunk():
    features, labels = drawn([0, 1])
    _, means, covariance = slda((0, features, labels), update="streaming", base_init="oas")._summary()
    centred = features.double() - means[labels]
    np.testing.assert_allclose(covariance.numpy(), OAS(assume_centered=True).fit(centred.numpy()).covariance_)


def test_what_was_streamed_in_is_declared_as_every_tasks_and_cannot_be_dropped():
    strategy = slda(*three(), update="streaming")
    before = {name: tensor.clone() for name, tensor in strategy.state_dict().items()}
    strategy.drop_task(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in strategy.state_dict().items())
    assert {part.tasks for part in strategy.components()} == {(0, 1, 2)}
    assert {part.name for part in strategy.components()} >= {"mean", "count", "covariance", "updates"}


def test_streaming_goes_on_from_its_state():
    tasks = three()
    straight = slda(*tasks, update="streaming")
    resumed = slda(update="streaming")
    resumed.load_state_dict(slda(*tasks[:2], update="streaming").state_dict())
    assert same(straight, absorb(resumed, *tasks[2]))


def test_a_first_covariance_belongs_to_streaming():
    with pytest.raises(UserError, match=r"strategy\.slda\.base_init=oas"):
        SLDAConfig(base_init="oas")


def test_what_was_solved_is_solved_again_after_new_statistics_and_after_loading():
    tasks, asked = three(), drawn([0, 1], seed=7)[0]
    strategy = slda(*tasks[:2])
    assert scores(strategy, asked).shape[1] == 4
    absorb(strategy, *tasks[2])
    full = scores(strategy, asked)
    assert full.shape[1] == 6
    fresh = slda(*[(t, f + 1, y) for t, f, y in tasks])
    scores(fresh, asked)
    fresh.load_state_dict(strategy.state_dict())
    assert torch.equal(scores(fresh, asked), full)


def test_it_is_one_matrix_product_whatever_the_number_of_images():
    strategy = slda(*three())
    asked = drawn(list(range(6)), seed=7)[0]
    assert torch.allclose(torch.cat([scores(strategy, row[None]) for row in asked]), scores(strategy, asked))
