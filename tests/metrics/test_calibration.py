"""Calibration error on probabilities computed by hand, and against torchmetrics."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from cl_platform.metrics.calibration import (
    CALIBRATION_DEFINITIONS,
    BinCounts,
    confidences,
    ece,
    overconfidence,
)
from cl_platform.metrics.matrix import Outcome, Result, Undefined

PROBABILITIES = torch.tensor(
    [
        [0.9, 0.1, 0],
        [0.6, 0.3, 0.1],
        [0.6, 0.2, 0.2],
        [0.5, 0.3, 0.2],
        [1, 0, 0],
        [1, 0, 0],
        [0.34, 0.33, 0.33],
        [0.2, 0.2, 0.6],
    ]
)
LABELS = torch.tensor([0, 1, 0, 0, 0, 1, 2, 2])


def value(outcome: Outcome) -> float:
    assert isinstance(outcome, Result)
    assert isinstance(outcome.value, float)
    return outcome.value


def counted(probabilities: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> BinCounts:
    found = BinCounts.empty(bins)
    sure, answer = probabilities.max(dim=1)
    found.add(sure, answer == labels)
    return found


@pytest.mark.parametrize("bins", [5, 15])
def test_worked_example_equals_torchmetrics(bins):
    found = counted(PROBABILITIES, LABELS, bins)
    assert value(ece(found)) == pytest.approx(0.2675, abs=1e-6)
    theirs = multiclass_calibration_error(PROBABILITIES, LABELS, num_classes=3, n_bins=bins, norm="l1")
    assert value(ece(found)) == pytest.approx(float(theirs), abs=1e-6)
    assert sum(found.right) / found.total == 0.625
    assert sum(found.confidence) / found.total == pytest.approx(0.6925, abs=1e-6)
    assert value(overconfidence(found)) == pytest.approx(0.0675, abs=1e-6)


def test_a_confidence_on_an_edge_belongs_to_the_bin_above_and_certainty_has_its_own_bin():
    found = BinCounts.empty(5)
    edges = torch.linspace(0, 1, 6)
    found.add(edges, torch.zeros(6))
    assert found.counts == [1] * 6
    found.add(torch.tensor([0.999999]), torch.ones(1))
    assert found.counts == [1, 1, 1, 1, 2, 1]
    assert found.right == [0, 0, 0, 0, 1, 0]


def test_a_float64_confidence_lands_where_its_float32_does():
    for dtype in (torch.float32, torch.float64):
        found = BinCounts.empty(5)
        found.add(torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=dtype), torch.ones(4))
        assert found.counts == [0, 1, 1, 1, 1, 0]


def test_without_images_nothing_has_a_value():
    assert ece(BinCounts.empty()) == overconfidence(BinCounts.empty()) == Undefined("empty")
    found = BinCounts.empty()
    found.add(torch.empty(0), torch.empty(0, dtype=torch.bool))
    assert found == BinCounts.empty()


def test_counts_survive_json():
    found = counted(PROBABILITIES, LABELS)
    assert BinCounts.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_classes_out_of_choice_take_no_probability():
    logits = torch.tensor([[0.0, 0.0, 5.0], [-math.inf, 2.0, -math.inf]])
    masked = logits.clone()
    masked[0, 2] = -math.inf
    assert confidences(masked).tolist() == [0.5, 1.0]
    assert confidences(logits.half()).dtype == torch.float32


def test_what_is_no_confidence_is_refused():
    found = BinCounts.empty()
    for sure in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="not within 0 and 1"):
            found.add(torch.tensor([sure]), torch.tensor([True]))
    with pytest.raises(ValueError, match="0 or 1"):
        found.add(torch.tensor([0.5]), torch.tensor([2]))
    with pytest.raises(ValueError, match="answers"):
        found.add(torch.tensor([0.5]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="bins"):
        found.merge(BinCounts.empty(5))
    with pytest.raises(ValueError):
        BinCounts.empty(0)
    for parts in [([1, 0], [0.5, 0], [2, 0]), ([1, 0], [0.5], [1, 0]), ([1, 0], [math.nan, 0], [1, 0])]:
        with pytest.raises(ValueError):
            BinCounts(*parts)
    assert found == BinCounts.empty()


def test_definitions_stand_under_their_number():
    assert [(d.id, d.key) for d in CALIBRATION_DEFINITIONS] == [("5.3", "ece_15"), ("5.3", "overconfidence")]


IMAGES = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40)


def of(images: list[tuple[float, bool]], bins: int) -> BinCounts:
    found = BinCounts.empty(bins)
    found.add(torch.tensor([c for c, _ in images]), torch.tensor([r for _, r in images], dtype=torch.bool))
    return found


@settings(deadline=None)
@given(IMAGES, st.integers(0, 40), st.integers(1, 20))
def test_merged_bins_give_the_error_of_all_images(images, cut, bins):
    merged, whole = of(images[:cut], bins), of(images, bins)
    merged.merge(of(images[cut:], bins))
    assert (merged.counts, merged.right) == (whole.counts, whole.right)
    assert value(ece(merged)) == pytest.approx(value(ece(whole)), abs=1e-12)
    assert value(overconfidence(merged)) == pytest.approx(value(overconfidence(whole)), abs=1e-12)


@settings(deadline=None)
@given(IMAGES)
def test_the_error_is_at_least_the_size_of_the_overconfidence(images):
    found = of(images, 15)
    assert abs(value(overconfidence(found))) - 1e-12 <= value(ece(found)) <= 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(2, 6), st.integers(1, 20))
def test_random_predictions_equal_torchmetrics(seed, images, classes, bins):
    generator = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(images, classes, generator=generator)).softmax(dim=1)
    labels = torch.randint(classes, (images,), generator=generator)
    theirs = multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=bins, norm="l1")
    assert value(ece(counted(probabilities, labels, bins))) == pytest.approx(float(theirs), abs=1e-6)
