"""The subset of a task's test images that continual evaluation reads."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cl_platform.metrics.subset import evaluation_subset

LABELS = [0] * 6 + [1] * 6 + [2] * 2


@pytest.mark.parametrize(
    "count, seed, task_id, expected",
    [
        (5, 0, 3, [3, 5, 6, 8, 12]),
        (7, 0, 3, [2, 3, 5, 6, 8, 12, 13]),
        (99, 0, 3, list(range(14))),
        (5, 1, 3, [0, 5, 7, 10, 12]),
        (5, 0, 2, [0, 6, 10, 12, 13]),
        (0, 0, 3, []),
    ],
)
def test_known_subsets(count: int, seed: int, task_id: int, expected: list[int]) -> None:
    assert evaluation_subset(LABELS, count, seed, task_id) == expected


def test_subsets_are_nested_and_unrepeated() -> None:
    subsets = [set(evaluation_subset(LABELS, n, 5, 1)) for n in range(15)]
    assert [len(s) for s in subsets] == list(range(15))
    assert all(small < large for small, large in zip(subsets, subsets[1:], strict=False))


def test_no_generator_is_touched() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    evaluation_subset(np.array(LABELS), 5, 0, 0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_without_images() -> None:
    assert evaluation_subset([], 5, 0, 0) == []
    with pytest.raises(ValueError, match="negative"):
        evaluation_subset(LABELS, -1, 0, 0)
