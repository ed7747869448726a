import math

import pytest
import torch

from cl_platform.optimizers import OptimizerConfig, build_optimizer, schedule_factor
from cl_platform.strategies.base import ParameterGroup


def test_the_lagged_cosine_runs_two_epochs_at_the_full_rate_and_ends_above_zero():
    factor = schedule_factor(OptimizerConfig(schedule="cosine_lagged"), 20)
    rates = [factor(e) for e in range(20)]
    assert rates[0] == rates[1] == 1.0
    assert rates[-1] == pytest.approx(0.097, abs=1e-3)
    assert schedule_factor(OptimizerConfig(schedule="cosine_lagged"), 50)(49) == pytest.approx(0.047, abs=1e-3)
    assert schedule_factor(OptimizerConfig(schedule="cosine_lagged"), 1)(0) == 1.0


def test_the_plain_cosine():
    factor = schedule_factor(OptimizerConfig(schedule="cosine"), 4)
    assert [round(factor(e), 6) for e in range(4)] == [
        round(0.5 * (1 + math.cos(math.pi * e / 4)), 6) for e in range(4)
    ]


def test_the_rate_falls_by_a_factor_at_each_milestone_of_a_task():
    factor = schedule_factor(OptimizerConfig(schedule="steps", milestones=[3, 5], gamma=0.2), 6)
    assert [factor(epoch) for epoch in range(6)] == pytest.approx([1, 1, 1, 0.2, 0.2, 0.04])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_groups_scale_the_rate_and_set_their_decay(name):
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    config = OptimizerConfig(name=name, lr_per_256=0.512, weight_decay=0.1)
    optimizer = build_optimizer(config, [ParameterGroup([a]), ParameterGroup([b], 0.5, 0.0)], batch_size=128)
    assert [g["lr"] for g in optimizer.param_groups] == [0.256, 0.128]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
