"""Matrix metrics against plain loops over exact fractions, on random matrices."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
from metric_matrices import matrix_of
from pytest import approx

from cl_platform.metrics import AccuracyMatrix, Result
from cl_platform.metrics import matrix as m


@st.composite
def matrices(draw, min_tasks: int = 1, space: str = "til") -> tuple[list[list[int]], list[int]]:
    """Right answers of a full square, and images per task."""
    count = draw(st.integers(min_tasks, 6))
    totals = draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    return [[draw(st.integers(0, n)) for n in totals] for _ in range(count)], totals


def naive(rows, totals, init, kept):
    """Every metric by the definitions, over the kept tasks, as fractions."""
    T = len(rows)
    R = [[Fraction(c, n) for c, n in zip(row, totals, strict=True)] for row in rows]
    old = [j for j in kept if j < T - 1]

    def mean(terms):
        terms = list(terms)
        return sum(terms, Fraction(0)) / len(terms) if terms else None

    def seen(i):
        return [j for j in kept if j <= i]

    def pooled(i):
        return Fraction(sum(rows[i][j] for j in seen(i)), sum(totals[j] for j in seen(i)))

    ends = [i for i in range(T) if seen(i)]
    change = mean(R[i][j] - R[j][j] for j in kept for i in range(T) if i > j)
    steps = [mean(R[t - 1][i] - R[t][i] for i in kept if i < t) for t in range(1, T)]
    return {
        "acc": mean(R[-1][j] for j in kept),
        "acc_samples": pooled(T - 1),
        "aia": mean(mean(R[i][j] for j in seen(i)) for i in ends),
        "aia_samples": mean(pooled(i) for i in ends),
        "forgetting": mean(max(R[row][j] for row in range(j, T - 1)) - R[-1][j] for j in old),
        "bwt": mean(R[-1][j] - R[j][j] for j in old),
        "fwt_init": mean(R[j - 1][j] - Fraction(init[j], totals[j]) for j in kept if j >= 1),
        "la": mean(R[j][j] for j in kept),
        "bwt_all": change,
        "rem": None if change is None else 1 - abs(min(change, 0)),
        "bwt_plus": None if change is None else max(change, 0),
        "forgetting_clipped": mean(max(R[row][j] for row in range(j, T)) - R[-1][j] for j in old),
        "forgetting_step": mean(step for step in steps if step is not None),
    }


@settings(max_examples=150, deadline=None)
@given(matrices(), st.data())
def test_metrics_equal_plain_loops_over_the_kept_tasks(drawn, data):
    rows, totals = drawn
    init = [data.draw(st.integers(0, n)) for n in totals]
    matrix = matrix_of(rows, totals, "til", init=init)
    gone = data.draw(st.sets(st.integers(0, len(totals) - 1), max_size=len(totals) - 1))
    for task_id in gone:
        matrix.forget(task_id)
    expected = naive(rows, totals, init, [j for j in range(len(totals)) if j not in gone])
    for key, exact in expected.items():
        outcome = getattr(m, key)(matrix)
        got = outcome.value if isinstance(outcome, Result) else None
        assert got == (None if exact is None else approx(float(exact), abs=1e-12)), key


@settings(max_examples=60, deadline=None)
@given(matrices(min_tasks=2))
def test_metrics_stay_in_their_ranges_and_in_their_order(drawn):
    matrix = matrix_of(*drawn, "til")
    values = {key: getattr(m, key)(matrix).value for key in ("forgetting", "forgetting_clipped", "bwt", "rem")}
    assert -values["bwt"] <= values["forgetting"] + 1e-12  # the best is at least what was just learnt
    assert max(values["forgetting"], 0) <= values["forgetting_clipped"] + 1e-12
    assert all(-1 <= value <= 1 for value in values.values())


@settings(max_examples=60, deadline=None)
@given(matrices())
def test_the_upper_triangle_changes_only_forward_transfer(drawn):
    rows, totals = drawn
    full = matrix_of(rows, totals, "dil")
    lower = matrix_of([row[: i + 1] for i, row in enumerate(rows)], totals, "dil")
    for key in (
        "acc",
        "aia",
        "forgetting",
        "bwt",
        "bwt_all",
        "forgetting_clipped",
        "forgetting_step",
        "cumulative_acc",
    ):
        assert getattr(m, key)(full) == getattr(m, key)(lower)


@settings(max_examples=60, deadline=None)
@given(matrices(), st.data())
def test_a_matrix_survives_its_dictionary(drawn, data):
    rows, totals = drawn
    holes = [[c if data.draw(st.booleans()) else None for c in row] for row in rows]
    matrix = matrix_of(holes, totals, "all", init=[0] * len(totals))
    assert AccuracyMatrix.from_dict(matrix.to_dict()) == matrix
