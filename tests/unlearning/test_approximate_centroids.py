"""Methods that move features to other classes: duck, scar. Ties are kept by image, and classes by their ids."""

import math

import numpy as np
import pytest
import torch
from forgetful import asked, at_work, method, noise_stream, record, shorter, taught, teach
from torch.nn import functional as F

from cl_platform.unlearning.approximate import centroids, duck, scar
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work


def tied(name, **changes):
    """A method that has tied the images of task 1, with the copy it works on."""
    one = method(name)
    work = at_work(name, **changes)
    one.tie(work)
    return one, work


@pytest.mark.parametrize("name", ["duck", "scar"])
def test_classes_are_found_by_their_ids_beyond_the_one_that_goes(name):
    one, work = tied(name)
    assert one.classes == [0, 1, 4, 5]
    assert set(one.targets.tolist()) <= {0, 1, 4, 5}
    # place 2 among the classes that remain is class 4; compared with the label 2 it would count as the image's own
    distances = torch.full((20, 4), 1.0)
    distances[:, 2] = 0.0
    assert centroids.tied(work, one.classes, distances).tolist() == [4] * 20
    assert centroids.places(one.classes, torch.tensor([4, 0, 5])).tolist() == [2, 0, 3]


@pytest.mark.parametrize("name", ["duck", "scar"])
def test_an_image_is_never_tied_to_its_own_class_where_that_remains(name):
    stream = noise_stream(setting="domain", classes_per_task=3)
    one, work = tied(name, learner=teach("finetune", stream), stream=stream)
    assert one.classes == [0, 1, 2]
    assert not (one.targets == work.forget.images.labels).any()


def test_duck_ties_each_image_to_the_nearest_centroid_by_cosine():
    one, work = tied("duck")
    with torch.no_grad():
        kept = next(work.ordered(work.retain, 100))
        features, going = work.features(kept), work.features(next(work.ordered(work.forget, 100)))
    means = torch.stack([features[kept.labels == c].mean(0) for c in (0, 1, 4, 5)])
    assert torch.allclose(one.centroids, means, atol=1e-6)
    nearest = F.cosine_similarity(going[:, None], means[None], dim=2).argmax(1)
    assert one.targets.tolist() == [(0, 1, 4, 5)[k] for k in nearest.tolist()]


@pytest.mark.parametrize("name", ["duck", "scar"])
def test_the_tie_is_kept_by_image_whatever_the_order_and_the_epoch(name, monkeypatch):
    cls, pull = (duck.DUCK, "pull") if name == "duck" else (scar.SCAR, "away")
    calls = record(monkeypatch, cls, pull)
    ties = record(monkeypatch, centroids, "tied")
    monkeypatch.setattr(duck, "tied", centroids.tied)
    monkeypatch.setattr(scar, "tied", centroids.tied)
    keys = {"target": 0.0, "epochs": 3, "batch_size": 6, "ratio": 1, "lr": 0.01}
    one = method(name, **keys)
    one.apply(taught(), asked(min_retain_ratio=0.0))
    assert len(ties) == 1
    orders = [batch.extra["row"].tolist() for _, _, batch in calls]
    assert sorted(sum(orders[:4], [])) == list(range(20))
    assert orders[:4] != orders[4:8]
    # by hand for a shuffled batch: each row meets the class that its own image was tied to
    one.targets = torch.tensor(one.classes).repeat(5)
    _, work, batch = calls[-2]
    features = work.features(batch)
    wanted = one.targets[batch.extra["row"]].tolist()
    if name == "duck":
        by_hand = [
            1 - F.cosine_similarity(f, one.centroids[one.classes.index(c)], dim=0)
            for f, c in zip(features, wanted, strict=True)
        ]
    else:
        by_hand = []
        for f, c in zip(scar.tukey(features), wanted, strict=True):
            place = one.classes.index(c)
            difference = F.normalize(f, dim=0) - F.normalize(one.means[place], dim=0)
            by_hand.append(difference @ one.inverses[place] @ difference)
    assert math.isclose(float(getattr(one, pull)(work, batch)), float(torch.stack(by_hand).mean()), rel_tol=1e-4)


def test_duck_takes_exactly_ratio_retained_batches_for_each_batch_to_forget(monkeypatch):
    losses = record(monkeypatch, Updates, "step")
    keys = {"epochs": 1, "batch_size": 8, "repair": "none", "target": 0.0}
    method("duck", ratio=2, **keys).apply(taught(), asked(min_retain_ratio=0.0))
    assert len(losses) == 3 * 2
    losses.clear()
    method("duck", ratio=40, **keys).apply(taught(), asked(min_retain_ratio=0.0))
    assert len(losses) == 3 * 5  # there are five retained batches


def test_duck_weighs_the_pull_and_the_retained_loss_at_its_temperature(monkeypatch):
    losses, retained = record(monkeypatch, Updates, "step"), []
    original = Work.cross_entropy

    def noted(self, batch, *args, **keys):
        value = original(self, batch, *args, **keys)
        retained.append((keys.get("temperature"), float(value)))
        return value

    monkeypatch.setattr(Work, "cross_entropy", noted)
    method("duck", epochs=1, ratio=1, repair="none").apply(taught(), asked())
    one, work = tied("duck")
    pull = float(one.pull(work, next(work.shuffled("forget", work.forget, 0, 256))))
    ((temperature, kept),) = retained
    assert temperature == 2.0
    assert math.isclose(float(losses[0][1]), pull + 1.4 * kept, rel_tol=1e-5)


def test_duck_halves_its_rate_at_the_milestones_and_stops_below_the_target(monkeypatch):
    rates = []
    original = Updates.step

    def noted(self, loss):
        rates.append(self.optimizer.param_groups[0]["lr"])
        original(self, loss)

    monkeypatch.setattr(Updates, "step", noted)
    keys = {"ratio": 1, "repair": "none"}
    method("duck", epochs=5, milestones=[2, 4], target=0.0, **keys).apply(taught(), asked(min_retain_ratio=0.0))
    assert rates == [4e-4, 4e-4, 2e-4, 2e-4, 1e-4]
    report = method("duck", lr=0.02, epochs=60, **keys).apply(taught(), asked(min_retain_ratio=0.0))
    assert report.facts["epochs"] < 60
    assert report.facts["forget_accuracy"] < 0.01


def test_duck_repairs_with_retained_images_alone_unless_told_otherwise(monkeypatch):
    pulls = record(monkeypatch, duck.DUCK, "pull")
    keys = {"epochs": 1, "ratio": 1, "repair_batch_size": 16}
    report = method("duck", **keys).apply(taught(), asked())
    assert len(pulls) == 1
    assert report.steps == 1 + 2 * 3
    pulls.clear()
    method("duck", repair="released", **keys).apply(taught(), asked())
    assert len(pulls) == 1 + 2 * 3


# -- scar -----------------------------------------------------------------------------------------------------------


def test_tukey_takes_negative_features_and_has_a_finite_slope_at_zero():
    values = torch.tensor([4.0, 0.0, -9.0], requires_grad=True)
    out = scar.tukey(values)
    assert torch.allclose(out.detach(), torch.tensor([2.0, 0.0, -3.0]))
    out.sum().backward()
    assert values.grad.isfinite().all()


def test_the_covariance_is_shrunk_twice_and_brought_to_correlations():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 4.0]], dtype=torch.float64)
    once = scar.shrunk(covariance, 3.0, 3.0)
    assert torch.allclose(once, torch.tensor([[2 + 9.0, 0.5 + 1.5], [0.5 + 1.5, 4 + 9.0]], dtype=torch.float64))
    features = torch.tensor(np.random.default_rng(0).normal(size=(40, 3)))
    twice = scar.shrunk(scar.shrunk(torch.cov(features.T), 3.0, 3.0), 3.0, 3.0)
    sigma = twice.diagonal().sqrt()
    expected = torch.linalg.pinv(twice / torch.outer(sigma, sigma))
    assert torch.allclose(scar.inverse_correlation(features, 3.0, 3.0), expected)


def test_distances_are_between_unit_vectors():
    points, mean = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([0.0, 5.0])
    inverse = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(scar.mahalanobis(points, mean, inverse), torch.tensor([2 * 0.36 + 0.04, 0.0]))
    assert torch.allclose(scar.mahalanobis(7 * points, mean, inverse), scar.mahalanobis(points, mean, inverse))


def test_distillation_skips_what_the_original_gives_to_a_class_that_goes():
    original = torch.tensor([[1.0, 5.0, 0.0], [3.0, 2.0, -1.0]])
    answers = torch.tensor([[9.0, -9.0, 3.0], [0.0, 1.0, 0.5]])
    gone = torch.tensor([False, True, False])
    lowered = torch.tensor([3.0, -1.0, -1.0])  # the least logit of all
    for temperature in (1.0, 2.0):
        expected = F.kl_div(
            answers[1].log_softmax(0), (lowered / temperature).log_softmax(0), log_target=True, reduction="sum"
        )
        assert torch.allclose(scar.distillation(answers, original, gone, temperature), expected)
    assert scar.distillation(answers, original, torch.tensor([True, True, False]), 1.0) == 0  # none is left


def test_scar_says_what_stood_for_surrogate_images(monkeypatch):
    stream, forwards = noise_stream(), record(monkeypatch, scar, "distillation")
    report = method("scar", epochs=1).apply(taught(), asked())
    assert report.facts["surrogate"] == "retained images"
    assert report.steps == 1
    from_outside = shorter(noise_stream(tasks=2, classes_per_task=1).task(0).train, 9)
    forwards.clear()
    report = method("scar", epochs=1, batch_size=4, ratio=2).apply(taught(), asked(stream, surrogate=from_outside))
    assert report.facts["surrogate"] == "images outside the stream"
    assert report.steps == 5 * 2
    assert all(len(answers) <= 4 for answers, *_ in forwards)


def test_scar_moves_features_and_ends_below_the_target():
    learner = taught()
    report = method("scar", lr=0.02).apply(learner, asked(min_retain_ratio=0.0))
    assert report.facts["epochs"] < 30
    assert report.facts["forget_accuracy"] < 0.01
    assert report.facts["moves_features"]
