"""Stability and plasticity gradients, decomposed."""

import pytest
import torch

from cl_platform.metrics.gradients import decompose
from cl_platform.metrics.matrix import Result, Undefined


def test_norms_and_cosine_of_a_worked_example():
    found = decompose([torch.tensor([3.0, 4.0, 0.0])], [torch.tensor([-3.0, 0.0, 4.0])])
    assert (found.plasticity_norm, found.stability_norm) == (5.0, 5.0)
    assert isinstance(found.cosine, Result)
    assert found.cosine.value == pytest.approx(-0.36, abs=1e-9)


def test_right_after_a_switch_a_penalty_has_no_gradient_and_no_angle():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    learns = (weight.sum() - 1).square()
    protects = (weight - torch.tensor([1.0, 2.0])).square().sum()
    (p,) = torch.autograd.grad(learns, weight)
    (s,) = torch.autograd.grad(protects, weight)
    found = decompose([p], [s])
    assert p.tolist() == [4.0, 4.0]
    assert found.plasticity_norm == pytest.approx(5.656854, abs=1e-6)
    assert found.stability_norm == 0.0
    assert found.cosine == Undefined("zero_norm")


def test_a_missing_gradient_is_zero_and_lists_must_match():
    one = decompose([torch.ones(2), None], [None, torch.ones(2)])
    assert isinstance(one.cosine, Result)
    assert one.cosine.value == 0.0
    with pytest.raises(ValueError):
        decompose([None], [])
