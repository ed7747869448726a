"""Turned answers and confusion, on hand-made predictions and on random ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_platform.metrics.confusion import (
    CONFUSION_DEFINITIONS,
    check_bound,
    confusion,
    recency_bias,
    task_confusion,
    task_inference_acc,
)
from cl_platform.metrics.flips import FLIP_DEFINITIONS, Flips, churn, negative_flip_rate, positive_flip_rate
from cl_platform.metrics.matrix import Outcome, Result, Undefined

LABELS = [0, 0, 1, 1, 2, 2, 3, 3]
BEFORE = [0, 0, 1, 0, 1, 2, 0, 0]
AFTER = [0, 2, 1, 1, 2, 3, 3, 3]
TASKS = [[0, 1], [2, 3]]
RATES = (negative_flip_rate, positive_flip_rate, churn)


def value(outcome: Outcome) -> float:
    assert isinstance(outcome, Result)
    assert isinstance(outcome.value, float)
    return outcome.value


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int16)])
def test_flips_of_a_worked_example(kind):
    flips = Flips.between(kind(BEFORE), kind(AFTER), kind(LABELS))
    assert flips == Flips(negative=2, positive=4, changed=6, total=8)
    assert [value(rate(flips)) for rate in RATES] == [0.25, 0.5, 0.75]
    old = Flips.between(BEFORE[:4], AFTER[:4], LABELS[:4])
    assert value(negative_flip_rate(old)) == 0.25


def test_flips_of_disjoint_images_add_up():
    parts = [Flips.between(BEFORE[a:b], AFTER[a:b], LABELS[a:b]) for a, b in [(0, 4), (4, 4), (4, 8)]]
    assert sum(parts, Flips()) == Flips.between(BEFORE, AFTER, LABELS)


def test_without_common_images_no_rate_has_a_value():
    assert [rate(Flips.between([], [], [])) for rate in RATES] == [Undefined("empty")] * 3


def test_predictions_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="predictions for"):
        Flips.between([0, 1], [0], [0, 1])
    with pytest.raises(ValueError, match="not integers"):
        Flips.between(torch.tensor([0.5]), torch.tensor([1]), torch.tensor([1]))
    with pytest.raises(ValueError, match="one dimension"):
        confusion(torch.zeros(2, 2, dtype=torch.int64), [0, 0], [0])
    for counts in [(-1, 0, 0, 1), (1, 1, 1, 3), (0, 0, 2, 1)]:
        with pytest.raises(ValueError):
            Flips(*counts)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_confusion_of_a_worked_example(kind):
    matrix = confusion(kind(AFTER), kind(LABELS), [3, 1, 0, 2])
    assert matrix == [[1, 0, 1, 0], [0, 2, 0, 0], [0, 0, 1, 1], [0, 0, 0, 2]]
    by_task = task_confusion(matrix, TASKS)
    assert by_task == [[3, 1], [0, 4]]
    assert value(task_inference_acc(by_task)) == 0.875
    assert value(recency_bias(by_task)) == 0.25


def test_rows_are_classes_in_ascending_order_whatever_order_the_tasks_have_them_in():
    matrix = confusion([7, 2, 9], [2, 2, 9], [9, 2, 7])
    assert matrix == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert task_confusion(matrix, [[9, 2], [7]]) == [[2, 1], [0, 0]]


def test_without_images_of_an_old_task_there_is_no_recency_bias():
    assert recency_bias([[4]]) == recency_bias([[0, 0], [1, 3]]) == Undefined("needs_two_tasks")
    assert value(task_inference_acc([[4]])) == 1.0
    assert task_inference_acc([]) == task_inference_acc([[0, 0], [0, 0]]) == Undefined("empty")
    assert task_confusion(confusion([], [], []), []) == []


def test_classes_that_are_unknown_or_twice_are_refused():
    with pytest.raises(ValueError, match="prediction 4 is none of the classes"):
        confusion([4], [0], [0, 1])
    with pytest.raises(ValueError, match="label 9 is none"):
        confusion([0], [9], [0, 1])
    with pytest.raises(ValueError, match="twice"):
        confusion([0], [0], [0, 0])
    with pytest.raises(ValueError, match="predictions for"):
        confusion([0], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="two tasks"):
        task_confusion([[1, 0], [0, 1]], [[0, 1], [1]])
    with pytest.raises(ValueError, match="3 x 3"):
        task_confusion([[1, 0], [0, 1]], [[0, 1], [2]])


def test_definitions_stand_under_their_numbers():
    assert [d.key for d in FLIP_DEFINITIONS] == [rate.__name__ for rate in RATES]
    assert {d.id for d in FLIP_DEFINITIONS} == {"5.2"}
    assert {d.id for d in CONFUSION_DEFINITIONS} == {"5.5"}


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=40))
def test_accuracy_changes_by_what_turned(images):
    before, after, labels = zip(*images, strict=True)
    flips = Flips.between(before, after, labels)
    gained = sum(v == t for v, t in zip(after, labels, strict=True))
    had = sum(u == t for u, t in zip(before, labels, strict=True))
    assert gained - had == flips.positive - flips.negative
    difference = value(positive_flip_rate(flips)) - value(negative_flip_rate(flips))
    assert difference == pytest.approx((gained - had) / len(images), abs=1e-12)
    assert flips.changed == sum(u != v for u, v in zip(before, after, strict=True))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=5, max_size=5), st.integers(0, 4)), max_size=25),
    st.permutations(range(5)),
)
def test_no_more_is_right_without_the_task_id_than_with_it_or_than_tasks_are_right(images, order):
    tasks = [list(order[:2]), list(order[2:3]), list(order[3:])]
    owner = {c: task for task in tasks for c in task}
    logits = torch.tensor([row for row, _ in images], dtype=torch.float32).reshape(-1, 5)
    labels = [label for _, label in images]
    cil = logits.argmax(dim=1).tolist()
    til = [max(sorted(owner[t]), key=lambda c, row=row: row[c]) for row, t in images]
    matrix = confusion(cil, labels, range(5))
    by_task = task_confusion(matrix, tasks)
    right = [sum(p == t for p, t in zip(answers, labels, strict=True)) for answers in (cil, til)]
    assert right[0] == sum(matrix[c][c] for c in range(5))
    assert right[0] <= min(right[1], sum(by_task[i][i] for i in range(3)))
    assert sum(map(sum, by_task)) == len(images)
    check_bound(*right, by_task)


def test_counts_that_cannot_be_are_named():
    check_bound(5, 6, [[3, 1], [0, 4]])
    for right_cil, right_til in [(7, 6), (8, 8)]:
        with pytest.raises(ValueError, match="mixed up"):
            check_bound(right_cil, right_til, [[3, 1], [0, 4]])
