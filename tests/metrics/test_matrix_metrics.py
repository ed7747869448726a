"""Every matrix metric on matrices whose values are known by hand."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from metric_matrices import four_tasks, matrix_of, reason, three_tasks, value
from pytest import approx

from cl_platform.metrics import DEFINITIONS, AccuracyMatrix, average_curve, pooled_curve
from cl_platform.metrics import matrix as m

CLOSE = 1e-9
NEEDS_TWO = [
    "forgetting",
    "forgetting_after",
    "bwt",
    "fwt_init",
    "fwt_chance",
    "cumulative_forgetting",
    "bwt_all",
    "rem",
    "bwt_plus",
    "forgetting_clipped",
    "forgetting_step",
]


@pytest.mark.parametrize(
    "key, expected",
    [
        ("acc", Fraction(6875, 10000)),
        ("acc_samples", Fraction(8, 10)),
        ("aia", Fraction(771875, 1000000)),
        ("aia_samples", Fraction(79375, 100000)),
        ("forgetting", Fraction(1, 4)),
        ("bwt", Fraction(-13, 60)),
        ("la", Fraction(85, 100)),
        ("bwt_all", Fraction(-19, 120)),
        ("rem", Fraction(101, 120)),
        ("bwt_plus", Fraction(0)),
        ("forgetting_clipped", Fraction(4, 15)),
        ("forgetting_step", Fraction(7, 90)),
    ],
)
def test_values_on_four_tasks_are_the_exact_fractions(key, expected):
    assert value(getattr(m, key)(four_tasks())) == approx(float(expected), abs=CLOSE)


def test_terms_per_task_carry_the_task_ids():
    outcome = m.forgetting(four_tasks(task_ids=[7, 3, 9, 1]))
    assert outcome.per_task == {7: approx(0.4), 3: approx(-0.05), 9: approx(0.4)}


def test_forgetting_after_every_task_starts_with_none():
    assert value(m.forgetting_after(four_tasks())) == [None, approx(-0.1), approx(0.25), approx(0.25)]


def test_curves_are_mean_over_tasks_and_pooled_over_images():
    assert average_curve(four_tasks()) == approx([0.8, 0.9, 0.7, 0.6875], abs=CLOSE)
    assert pooled_curve(four_tasks()) == approx([0.8, 0.9, 0.675, 0.8], abs=CLOSE)


def test_dividing_bwt_by_all_tasks_gives_what_the_released_gem_code_prints():
    assert value(m.bwt(four_tasks())) * 3 / 4 == approx(-0.1625, abs=CLOSE)


@pytest.mark.parametrize("key", ["acc", "acc_samples", "aia", "aia_samples", "la"])
def test_one_task_is_enough_for_accuracies(key):
    assert value(getattr(m, key)(matrix_of([[4]], [5]))) == 0.8


@pytest.mark.parametrize("space", ["cil", "dil"])
@pytest.mark.parametrize("key", NEEDS_TWO)
def test_one_task_is_not_enough_for_differences(key, space):
    assert reason(getattr(m, key)(matrix_of([[4]], [5], space))) == "needs_two_tasks"


def test_forgetting_is_negative_when_an_old_task_gets_better_and_clipped_at_zero():
    better = matrix_of([[5], [7, 9]], [10, 10])
    assert value(m.forgetting(better)) == approx(-0.2)
    assert value(m.bwt(better)) == approx(0.2)
    assert value(m.forgetting_clipped(better)) == 0
    assert value(m.bwt_plus(better)) == approx(0.2)
    assert value(m.rem(better)) == 1


@pytest.mark.parametrize("key", [definition.key for definition in DEFINITIONS])
def test_without_a_task_every_metric_is_empty(key):
    assert reason(getattr(m, key)(AccuracyMatrix("cil"))) == "empty"


@pytest.mark.parametrize("key", ["acc", "acc_samples", "aia", "aia_samples", "forgetting", "bwt", "bwt_all"])
def test_a_cell_that_was_not_evaluated_is_not_averaged_away(key):
    assert reason(getattr(m, key)(matrix_of([[8], [None, 18]], [10, 20]))) == "not_evaluated"


def test_a_missing_row_is_told_from_a_missing_cell():
    once = AccuracyMatrix("cil", [0, 1])
    once.append_row(1, {0: (8, 10), 1: (9, 10)})
    assert m.forgetting(once).row_missing
    assert value(m.acc(once)) == approx(0.85)
    assert not m.acc(matrix_of([[8], [None, 18]], [10, 20])).row_missing


def test_a_task_forgotten_after_the_end_leaves_every_average():
    matrix = four_tasks()
    matrix.forget(1)
    assert value(m.acc(matrix)) == approx(0.6, abs=CLOSE)
    assert list(m.acc(matrix).per_task) == [0, 2, 3]
    assert value(m.acc_samples(matrix)) == approx(45 / 60, abs=CLOSE)
    assert value(m.forgetting(matrix)) == approx(0.4, abs=CLOSE)
    assert value(m.la(matrix)) == approx((0.8 + 0.8 + 0.9) / 3, abs=CLOSE)


def test_rows_after_forgetting_need_no_cell_of_the_forgotten_task():
    matrix = matrix_of([[8], [9, 18], [7, 12, 8]], [10, 20, 10, 40])
    matrix.forget(1)
    matrix.append_row(3, {0: (5, 10), 2: (4, 10), 3: (36, 40)})
    assert value(m.acc(matrix)) == approx(0.6, abs=CLOSE)
    assert value(m.forgetting_after(matrix)) == [None, approx(-0.1), approx(0.2), approx(0.4)]


def test_forgetting_all_tasks_or_all_but_the_last_leaves_nothing_to_compare():
    matrix = matrix_of([[8], [9, 18]], [10, 20])
    matrix.forget(0)
    assert reason(m.forgetting(matrix)) == "needs_two_tasks"
    assert value(m.aia(matrix)) == approx(0.9)
    matrix.forget(1)
    assert reason(m.acc(matrix)) == "empty"


@pytest.mark.parametrize("future", [8, None])
def test_zero_shot_accuracy_of_a_future_task_does_not_change_forgetting(future):
    matrix = matrix_of([[9, future], [7, 6]], [10, 10], "dil")
    assert value(m.forgetting(matrix)) == approx(0.2)


def test_zero_shot_accuracy_above_the_learnt_one_does_not_change_forgetting():
    matrix = matrix_of([[9, 8, 10], [7, 6, 10], [7, 6, 5]], [10] * 3, "dil")
    assert value(m.forgetting(matrix)) == approx(0.1)


def test_forward_transfer_and_intransigence_on_three_tasks():
    matrix = three_tasks("all")
    assert value(m.fwt_init(matrix)) == approx(0.25, abs=CLOSE)
    assert value(m.fwt_chance(matrix, 4)) == approx(0.10, abs=CLOSE)
    assert value(m.fwt_chance(matrix, [4, 4, 4])) == approx(0.10, abs=CLOSE)
    assert value(m.intransigence(matrix, [0.80, 0.95, 0.90])) == approx(1 / 30, abs=CLOSE)
    assert value(m.bwt(matrix)) == approx(-0.25, abs=CLOSE)


def test_forward_transfer_is_undefined_where_future_classes_are_no_candidates():
    matrix = three_tasks("cil")
    assert reason(m.fwt_init(matrix)) == "space_excludes_future_classes"
    assert reason(m.fwt_chance(matrix, 4)) == "space_excludes_future_classes"


def test_forward_transfer_without_its_inputs_says_which():
    assert reason(m.fwt_chance(three_tasks("all"))) == "no_baseline"
    assert reason(m.fwt_init(matrix_of([[8, 1], [7, 9]], [10, 10], "til"))) == "not_evaluated"
    assert reason(m.fwt_init(matrix_of([[8], [7, 9]], [10, 10], "til", init=[1, 1]))) == "not_evaluated"
    with pytest.raises(ValueError, match="candidates"):
        m.fwt_chance(three_tasks("all"), [4, 4])


@pytest.mark.parametrize("references", [None, [], [0.8, 0.9], [0.8, None, 0.9]])
def test_intransigence_needs_a_reference_for_every_task(references):
    assert reason(m.intransigence(three_tasks("all"), references)) == "no_reference_run"


def test_cumulative_accuracy_restricts_the_candidates_to_the_tasks_pooled():
    logits = np.array([[2, 1, 3, 0], [0, 2, 1, 1], [1, 0, 2, 3], [3, 1, 0, 2], [0, 1, 2, 4], [2, 2, 0, 1]])
    labels = np.array([0, 1, 2, 3, 3, 1])
    task = labels // 2

    def right(images, candidates):  # argmax takes the first, so the lowest class, of equal logits
        answers = np.array(candidates)[logits[images][:, candidates].argmax(axis=1)]
        return int((answers == labels[images]).sum()), int(images.sum())

    matrix = AccuracyMatrix("cil", [0, 1])
    everything = np.ones(6, dtype=bool)
    cells = {t: right(task == t, [0, 1, 2, 3]) for t in (0, 1)}
    pools = {0: right(task == 0, [0, 1]), 1: right(everything, [0, 1, 2, 3])}
    matrix.append_row(0, {0: right(task == 0, [0, 1])}, cumulative={0: right(task == 0, [0, 1])})
    matrix.append_row(1, cells, cumulative=pools)
    rows = value(m.cumulative_acc(matrix))
    assert rows == [[approx(2 / 3)], [approx(2 / 3), approx(2 / 6)]]
    assert rows[1][1] == value(m.acc_samples(matrix))
    assert m.acc(matrix).per_task == {0: approx(1 / 3), 1: approx(1 / 3)}
    assert value(m.cumulative_forgetting(matrix)) == 0
    til = matrix_of([[2], [right(task == 0, [0, 1])[0], right(task == 1, [2, 3])[0]]], [3, 3], "til")
    assert m.acc(til).per_task == {0: approx(2 / 3), 1: approx(2 / 3)}


def test_cumulative_accuracy_needs_its_own_counts_except_with_one_label_set():
    assert reason(m.cumulative_acc(four_tasks())) == "not_evaluated"
    domain = matrix_of([[8], [6, 18]], [10, 20], "dil")
    assert value(m.cumulative_acc(domain)) == [[0.8], [0.6, 0.8]]
    assert value(m.cumulative_forgetting(domain)) == approx(0.2)


def test_cumulative_pools_that_hold_a_forgotten_task_are_left_out():
    matrix = AccuracyMatrix("cil", [0, 1, 2, 3])
    matrix.append_row(0, {0: (9, 10)}, {0: (9, 10)})
    matrix.append_row(1, {0: (8, 10), 1: (8, 10)}, {0: (9, 10), 1: (16, 20)})
    matrix.forget(1)
    matrix.append_row(2, {0: (7, 10), 2: (9, 10)}, {0: (8, 10), 2: (16, 20)})
    matrix.append_row(3, {0: (7, 10), 2: (5, 10), 3: (9, 10)}, {0: (7, 10), 2: (12, 20), 3: (21, 30)})
    assert value(m.cumulative_acc(matrix)) == [[0.9], [0.9, None], [0.8, None, 0.8], [0.7, None, 0.6, 0.7]]
    assert value(m.cumulative_forgetting(matrix)) == approx((0.2 + 0.2) / 2)


def test_accuracy_per_class_is_of_the_newest_row_and_averaged_over_classes():
    matrix = AccuracyMatrix("cil", [0, 1])
    matrix.append_row(0, {0: (3, 4)}, per_class={0: (1, 2), 1: (2, 2)})
    assert value(m.acc_per_class(matrix)) == 0.75
    matrix.append_row(1, {0: (1, 4), 1: (2, 2)}, per_class={2: (2, 2), 0: (1, 2), 1: (0, 2)})
    assert m.acc_per_class(matrix).per_class == {0: 0.5, 1: 0.0, 2: 1.0}
    matrix.forget(0, classes=[0, 1])
    assert value(m.acc_per_class(matrix)) == 1
    assert reason(m.acc_per_class(four_tasks())) == "not_evaluated"


def test_a_task_without_images_has_no_accuracy():
    assert reason(m.acc(matrix_of([[0]], [0]))) == "empty"


def test_a_reason_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="because"):
        m.Undefined("because")
