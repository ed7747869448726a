"""Probes and similarities of features, on matrices computed by hand and under what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from cl_platform.metrics.matrix import Outcome, Result, Undefined
from cl_platform.metrics.representation import (
    REPRESENTATION_DEFINITIONS,
    cka,
    cka_debiased,
    cka_drift,
    cka_drift_debiased,
    hsic,
    nme_acc,
    nme_distances,
    probe_acc,
    probe_scores,
)

X = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0], [0, 3]])
Y = torch.tensor([[1.0, 1], [0, 1], [2, 1], [1, 0], [0, 2]])
TURN = torch.tensor([[0.0, -1], [1, 0]])
TRAIN, TRAIN_LABELS = torch.tensor([[1, 0], [2, 0.2], [0, 1], [0.1, 3]]), torch.tensor([0, 0, 1, 1])
TEST, TEST_LABELS = torch.tensor([[3.0, 1], [1, 3], [1, 1]]), torch.tensor([0, 1, 1])


def value(outcome: Outcome) -> float:
    assert isinstance(outcome, Result)
    assert isinstance(outcome.value, float)
    return outcome.value


def u_statistic(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased estimate as it is usually written, from uncentred Gram matrices."""
    k, l_ = x.double() @ x.double().T, y.double() @ y.double().T
    k.fill_diagonal_(0)
    l_.fill_diagonal_(0)
    n, one = len(x), torch.ones(len(x), dtype=torch.float64)
    whole = (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2))
    return float(((k @ l_).trace() + whole - 2 / (n - 2) * (one @ k @ l_ @ one)) / (n * (n - 3)))


def test_similarity_of_a_worked_example():
    assert value(cka(X, Y)) == approx(0.6918432732, abs=1e-9)
    assert [hsic(X, Y), hsic(X, X), hsic(Y, Y)] == approx([0.6, 2, 8 / 15], abs=1e-9)
    assert value(cka_debiased(X, Y)) == approx(0.5809475019, abs=1e-9)
    assert value(cka_drift(X, Y)) == approx(1 - 0.6918432732, abs=1e-9)
    assert value(cka_drift_debiased(X, Y)) == approx(1 - 0.5809475019, abs=1e-9)


def test_a_turned_scaled_and_shifted_copy_has_not_drifted():
    moved = 3 * X @ TURN + 5
    assert value(cka(X, moved)) == approx(1, abs=1e-9)
    assert value(cka_debiased(X, moved)) == approx(1, abs=1e-9)


def test_too_few_images_have_no_similarity():
    assert cka_debiased(X[:3], Y[:3]) == cka_drift_debiased(X[:3], Y[:3]) == Undefined("too_few_samples")
    assert cka(X[:1], Y[:1]) == cka(X[:0], Y[:0]) == Undefined("too_few_samples")
    assert isinstance(cka(X[:2], Y[:2]), Result)
    with pytest.raises(ValueError, match="too few"):
        hsic(X[:3], Y[:3])


@pytest.mark.parametrize("number", [0.0, 1.0, 0.1, 1e6 / 3])
def test_constant_features_have_no_similarity(number):
    constant = torch.full((7, 3), number, dtype=torch.float64)  # seven times 0.1 do not sum to a multiple of 0.1
    moving = torch.cat([X, Y[:2]])
    for one, other in [(moving, constant), (constant, moving), (constant, constant)]:
        assert cka(one, other) == cka_drift(one, other) == Undefined("zero_variance")
        assert cka_debiased(one, other) == cka_drift_debiased(one, other) == Undefined("zero_variance")


def test_one_image_that_moves_alone_tells_nothing_without_bias():
    lonely = torch.full((5, 2), 0.3)
    lonely[3] = torch.tensor([0.7, 0.1])
    assert isinstance(cka(lonely, X), Result)
    assert cka_debiased(lonely, X) == cka_debiased(X, lonely) == Undefined("zero_variance")


def test_unrelated_features_of_few_images_look_alike_only_with_bias():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 100, 768, generator=generator)
    assert value(cka(one, other)) == approx(0.885, abs=0.01)
    assert value(cka_debiased(one, other)) == approx(0, abs=0.05)


def test_tiny_and_huge_features_are_compared_alike():
    for scale in (1e-30, 1e30):
        assert value(cka(X * scale, Y)) == approx(value(cka(X, Y)), abs=1e-6)
        assert value(cka_debiased(X * scale, Y)) == approx(value(cka_debiased(X, Y)), abs=1e-6)


def test_nearest_mean_of_a_worked_example():
    distances, classes = nme_distances(TRAIN, TRAIN_LABELS, TEST)
    expected = [0.073484, 1.336023, 1.273815, 0.092360, 0.517095, 0.562422]
    assert distances.flatten().tolist() == approx(expected, abs=1e-6)
    assert classes.tolist() == [0, 1]
    assert value(nme_acc(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS)) == approx(2 / 3)


def test_probe_of_a_worked_example():
    scores, classes = probe_scores(TRAIN, TRAIN_LABELS, TEST)
    expected = [0.875860, 0.124140, 0.226583, 0.773417, 0.578228, 0.421772]
    assert scores.flatten().tolist() == approx(expected, abs=1e-6)
    assert scores.dtype == torch.float64
    assert classes.tolist() == [0, 1]
    assert value(probe_acc(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS)) == approx(2 / 3)


@pytest.mark.parametrize("measure", [probe_acc, nme_acc])
def test_class_ids_need_no_order_and_unknown_classes_are_wrong(measure):
    names = torch.tensor([7, 3])
    assert value(measure(TRAIN, names[TRAIN_LABELS], TEST, names[TEST_LABELS])) == approx(2 / 3)
    assert value(measure(TRAIN, TRAIN_LABELS, TEST, torch.tensor([0, 9, 9]))) == approx(1 / 3)


def test_a_tie_goes_to_the_lowest_class():
    train = torch.tensor([[0.0, 2], [3, 0]])
    for labels in ([4, 2], [2, 4]):
        assert value(nme_acc(train, torch.tensor(labels), torch.ones(1, 2), torch.tensor([2]))) == 1.0


@pytest.mark.parametrize("measure", [probe_acc, nme_acc])
def test_features_of_zeros_do_not_spoil_the_others(measure):
    train = torch.cat([TRAIN, torch.zeros(1, 2)])
    labels = torch.cat([TRAIN_LABELS, torch.tensor([2])])
    test = torch.cat([TEST, torch.zeros(1, 2)])
    assert value(measure(train, labels, test, torch.cat([TEST_LABELS, torch.tensor([2])]))) >= 0.5
    only = torch.zeros(2, 2)
    assert value(measure(only, torch.tensor([1, 0]), only, torch.tensor([0, 0]))) == 1.0


@pytest.mark.parametrize("measure", [probe_acc, nme_acc])
def test_without_images_there_is_no_accuracy(measure):
    assert measure(TRAIN, TRAIN_LABELS, TEST[:0], TEST_LABELS[:0]) == Undefined("empty")
    assert measure(TRAIN[:0], TRAIN_LABELS[:0], TEST, TEST_LABELS) == Undefined("empty")


@pytest.mark.parametrize("measure", [probe_acc, nme_acc])
def test_features_that_do_not_fit_are_refused(measure):
    with pytest.raises(ValueError, match="training labels"):
        measure(TRAIN, TRAIN_LABELS[:2], TEST, TEST_LABELS)
    with pytest.raises(ValueError, match="training labels"):
        measure(TRAIN, TRAIN_LABELS, torch.ones(3, 5), TEST_LABELS)
    with pytest.raises(ValueError, match="for 1 labels"):
        measure(TRAIN, TRAIN_LABELS, TEST, TEST_LABELS[:1])
    with pytest.raises(ValueError, match="finite"):
        measure(TRAIN, TRAIN_LABELS, TEST * math.nan, TEST_LABELS)


def test_features_of_other_images_are_refused():
    for similarity in (cka, cka_debiased):
        with pytest.raises(ValueError, match="images"):
            similarity(X, Y[:4])
        with pytest.raises(ValueError, match="finite"):
            similarity(X, Y * math.inf)
    with pytest.raises(ValueError, match="above 0"):
        probe_scores(TRAIN, TRAIN_LABELS, TEST, ridge=0.0)


def test_definitions_stand_under_their_number():
    keys = ["probe_acc", "nme_acc", "cka_drift", "cka_drift_debiased"]
    assert [(d.id, d.key) for d in REPRESENTATION_DEFINITIONS] == [("5.4", key) for key in keys]


CASE = given(st.integers(0, 2**31), st.integers(4, 30), st.integers(1, 8), st.integers(1, 8))


@settings(deadline=None, max_examples=30)
@CASE
def test_debiased_similarity_equals_the_u_statistic(seed, n, d, e):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=generator), torch.randn(n, e, generator=generator)
    assert hsic(x, y) == approx(u_statistic(x, y), abs=1e-9)
    expected = u_statistic(x, y) / math.sqrt(u_statistic(x, x) * u_statistic(y, y))
    assert value(cka_debiased(x, y)) == approx(expected, abs=1e-8)


@settings(deadline=None, max_examples=30)
@CASE
def test_similarity_equals_the_ratio_of_norms(seed, n, d, e):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.randn(n, e, generator=generator, dtype=torch.float64)
    a, b = x - x.mean(dim=0), y - y.mean(dim=0)
    expected = float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))
    assert value(cka(x, y)) == approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(4, 30), st.integers(1, 8), st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_similarity_knows_neither_rotation_nor_scale_nor_shift(seed, n, d, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    for similarity in (cka, cka_debiased):
        expected = value(similarity(x, y))
        assert value(similarity(x, scale * (y @ q) + scale * shift)) == approx(expected, abs=1e-8)
        assert value(similarity(y, x)) == approx(expected, abs=1e-9)
        assert expected <= 1 + 1e-9
    assert 0 <= value(cka(x, y)) <= 1
