"""The torchmetrics classes give the pure functions' values."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from cl_platform.metrics.torchmetrics_classes import AverageAccuracy, BackwardTransfer, Forgetting

ROWS = [[8], [9, 18], [7, 12, 8], [5, 19, 4, 36]]
TOTALS = [10, 20, 10, 40]
EXPECTED = {AverageAccuracy: 0.6875, Forgetting: 0.25, BackwardTransfer: -13 / 60}


def feed(metric, rows=range(4)):
    for i in rows:
        for j, right in enumerate(ROWS[i]):
            labels = torch.zeros(TOTALS[j], dtype=torch.int64)
            predicted = (torch.arange(TOTALS[j]) >= right).long()
            metric.update(predicted, labels, after_task=i, tasks=j)
    return metric


@pytest.mark.parametrize("cls", EXPECTED)
def test_value_is_that_of_the_integer_counts(cls):
    value = feed(cls(num_tasks=4)).compute()
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(EXPECTED[cls], abs=1e-9)


def test_images_of_several_tasks_may_share_a_batch():
    metric = AverageAccuracy(num_tasks=2)
    metric.update(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2, 3]), 1, torch.tensor([0, 0, 1, 1]))
    assert metric.compute().item() == 0.75


def test_counts_of_two_processes_add_up():
    state = [feed(Forgetting(num_tasks=4), rows) for rows in ((0, 3), (1, 2))]
    merged = Forgetting(num_tasks=4)
    merged.correct = state[0].correct + state[1].correct
    merged.total = state[0].total + state[1].total
    merged._update_count = 1
    assert merged.compute().item() == pytest.approx(0.25)
    assert {reduction.__name__ for reduction in merged._reductions.values()} == {"dim_zero_sum"}


def test_undefined_is_nan_and_reset_forgets():
    metric = feed(Forgetting(num_tasks=4), rows=[0])
    assert math.isnan(metric.compute().item())
    feed(metric, rows=[1, 2, 3])
    assert metric.compute().item() == pytest.approx(0.25)
    metric.reset()
    assert int(metric.total.sum()) == 0


def test_metrics_can_be_pickled():
    restored = pickle.loads(pickle.dumps(feed(AverageAccuracy(num_tasks=4))))
    assert restored.compute().item() == pytest.approx(0.6875)
