"""What an accuracy matrix accepts, and how it is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from metric_matrices import four_tasks, matrix_of

from cl_platform.metrics import AccuracyMatrix


def test_csv_names_tasks_by_id_and_writes_nan_for_what_was_not_evaluated():
    matrix = matrix_of([[1], [2, 1]], [3, 2], "til", init=[0, 1], task_ids=[5, 2])
    assert matrix.to_csv() == (
        "after_task,task_5,task_2\ninit,0.0,0.5\n5,0.3333333333333333,NaN\n2,0.6666666666666666,0.5\n"
    )


def test_csv_of_a_stream_not_begun_is_its_header():
    assert AccuracyMatrix("cil", [3]).to_csv() == "after_task,task_3\n"


def test_csv_values_are_read_back_bit_by_bit():
    cells = four_tasks().to_csv().splitlines()[-1].split(",")[1:]
    assert [float(cell) for cell in cells] == [5 / 10, 19 / 20, 4 / 10, 36 / 40]


def test_a_matrix_survives_json_with_all_it_holds():
    matrix = AccuracyMatrix("cil", [4, 2])
    matrix.set_init({2: (1, 8)})
    matrix.append_row(4, {4: (3, 4)}, {4: (3, 4)}, {0: (1, 2), 11: (2, 2)})
    matrix.append_row(2, {4: (2, 4), 2: (8, 8)}, {4: (3, 4), 2: (10, 12)}, {11: (2, 2), 0: (0, 2)})
    matrix.forget(4, classes=[0])
    text = json.dumps(matrix.to_dict(), allow_nan=False)
    restored = AccuracyMatrix.from_dict(json.loads(text))
    assert restored == matrix
    assert json.dumps(restored.to_dict()) == text
    assert restored.kept == [1]


def test_an_unknown_task_becomes_the_next_position_and_older_rows_get_a_gap():
    matrix = AccuracyMatrix("cil")
    matrix.append_row(7, {7: (1, 2)})
    matrix.append_row(3, {7: (1, 2), 3: (2, 2)})
    assert matrix.task_ids == [7, 3]
    assert matrix.correct == [[1, None], [1, 2]]
    assert matrix.total == [[2, None], [2, 2]]


def test_a_run_with_only_its_last_row_has_empty_rows_before_it():
    matrix = AccuracyMatrix("cil", [0, 1, 2])
    matrix.append_row(2, {0: (1, 2), 1: (1, 2), 2: (2, 2)})
    assert matrix.num_trained == 3
    assert [matrix.row_is_missing(i) for i in range(3)] == [True, True, False]
    assert matrix.to_csv().splitlines()[1] == "0,NaN,NaN,NaN"
    assert AccuracyMatrix.from_dict(matrix.to_dict()) == matrix


def test_numpy_integers_become_plain_ones_and_fractions_are_refused():
    matrix = AccuracyMatrix("cil", [np.int64(0)])
    matrix.append_row(0, {0: (np.int64(1), np.int32(2))}, per_class={np.int64(5): (np.int64(1), 2)})
    json.dumps(matrix.to_dict())
    with pytest.raises(TypeError):
        AccuracyMatrix("cil").append_row(0, {0: (0.5, 1)})


@pytest.mark.parametrize("cell", [(3, 2), (-1, 2)])
def test_impossible_counts_are_refused_and_leave_the_matrix_as_it_was(cell):
    matrix = AccuracyMatrix("cil")
    with pytest.raises(ValueError, match="right answers"):
        matrix.append_row(0, {0: cell})
    assert matrix == AccuracyMatrix("cil")


def test_a_second_row_for_a_task_is_refused():
    matrix = four_tasks()
    with pytest.raises(ValueError, match="already"):
        matrix.append_row(2, {2: (1, 1)})


def test_unknown_tasks_and_spaces_are_refused_by_name():
    matrix = four_tasks()
    with pytest.raises(ValueError, match="9"):
        matrix.forget(9)
    with pytest.raises(ValueError, match="9"):
        matrix.set_init({9: (1, 1)})
    with pytest.raises(ValueError, match="whatever"):
        AccuracyMatrix("whatever")
    with pytest.raises(ValueError, match="twice"):
        AccuracyMatrix("cil", [1, 1])


@pytest.mark.parametrize(
    "key, broken",
    [
        ("correct", [[8, None], [None, None]]),
        ("total", [[10, 10, 1], [10, 10, 1]]),
        ("correct", [[11, None], [9, 9]]),
        ("cumulative", [[None]]),
        ("task_ids", [0]),
    ],
)
def test_a_damaged_dictionary_is_refused(key, broken):
    state = matrix_of([[8], [9, 9]], [10, 10]).to_dict()
    with pytest.raises(ValueError):
        AccuracyMatrix.from_dict({**state, key: broken})
