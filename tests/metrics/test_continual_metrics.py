"""Metrics of continual evaluation on curves whose values are known by hand, and against plain loops."""

from __future__ import annotations

from fractions import Fraction

import pytest
from evaluation_logs import curves_of, irregular, three_tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from cl_platform.metrics import Outcome, Result, Undefined
from cl_platform.metrics import continual as c
from cl_platform.metrics.gap import gap_pairs

CLOSE = 1e-9


def value(outcome: Outcome) -> float:
    assert isinstance(outcome, Result)
    assert isinstance(outcome.value, float)
    return outcome.value


def terms(outcome: Outcome) -> list[float]:
    assert isinstance(outcome, Result)
    assert outcome.per_task is not None
    return list(outcome.per_task.values())


def test_worst_cases() -> None:
    curves = curves_of(three_tasks())
    assert value(c.min_acc(curves)) == approx(0.5, abs=CLOSE)
    assert terms(c.min_acc(curves)) == approx([0.4, 0.6], abs=CLOSE)
    assert [s for s, _ in c.min_acc_curve(curves)] == list(range(5, 13))
    assert [v for _, v in c.min_acc_curve(curves)] == approx([0.4] * 4 + [0.5] * 4, abs=CLOSE)
    expected = [0.3, 0.6, 0.8, 0.9, 0.45, 0.55, 0.65, 0.65, 7 / 15, 8 / 15, 0.6, 19 / 30]
    assert c.wc_acc_curve(curves) == [(s, approx(v, abs=CLOSE)) for s, v in enumerate(expected, start=1)]
    assert value(c.wc_acc(curves)) == approx(19 / 30, abs=CLOSE)
    assert value(c.coverage(curves)) == 1


def test_the_state_before_the_first_update_of_the_next_task_is_no_minimum() -> None:
    lower = [(s, k, e, {0: (1, 10)} if s == 4 and e == "end" else cells) for s, k, e, cells in three_tasks()]
    assert value(c.min_acc(curves_of(lower))) == approx(0.5, abs=CLOSE)


@pytest.mark.parametrize(
    "window, falls, rises",
    [(2, [0.5, 0.3, 0], [0.3, 0.2, 0.2]), (3, [0.5, 0.3, 0], [0.5, 0.4, 0.4]), (10, [0.5, 0.3, 0], [0.8, 0.4, 0.5])],
)
def test_windows(window: int, falls: list[float], rises: list[float]) -> None:
    curves = curves_of(three_tasks())
    assert terms(c.wf(curves, window)) == approx(falls, abs=CLOSE)
    assert terms(c.wp(curves, window)) == approx(rises, abs=CLOSE)
    assert value(c.wf(curves, window)) == approx(sum(falls) / 3, abs=CLOSE)
    assert value(c.wp(curves, window)) == approx(sum(rises) / 3, abs=CLOSE)


def test_a_rise_after_a_fall_counts_from_the_lowest_point() -> None:
    curves = curves_of([(s, 0, "step", {0: (n, 10)}) for s, n in [(1, 5), (2, 1), (3, 9)]])
    assert value(c.wf(curves, 3)) == approx(0.4, abs=CLOSE)
    assert value(c.wp(curves, 3)) == approx(0.8, abs=CLOSE)
    for flat in ([(1, 0, "step", {0: (5, 10)})], [(s, 0, "step", {0: (5, 10)}) for s in (1, 2, 3)]):
        assert value(c.wf(curves_of(flat), 10)) == value(c.wp(curves_of(flat), 10)) == 0


def test_irregular_grid() -> None:
    curves = curves_of(irregular())
    expected = [0.35, 0.35, 0.45, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85]
    seen = c.seen_mean(curves)
    assert [seen[s] for s in range(11, 21)] == approx(expected, abs=CLOSE)
    assert value(c.aaa(curves)) == approx((10 * 0.9 + 10 * 0.605) / 20, abs=CLOSE)
    assert value(c.aaa_samples(curves)) == approx(value(c.aaa(curves)), abs=CLOSE)
    assert terms(c.lca(curves, 5))[1] == approx(0.391667, abs=1e-6)
    assert terms(c.lca(curves, 10))[1] == approx(0.577273, abs=1e-6)
    assert [terms(c.wf(curves, d))[0] for d in (2, 3)] == approx([0.4, 0.6], abs=CLOSE)
    assert [terms(c.wp(curves, d))[0] for d in (2, 3, 11)] == approx([0, 0.2, 0.5], abs=CLOSE)
    (pair,) = gap_pairs(curves)
    assert (pair.area, pair.area_mean) == approx((3.25, 0.325), abs=CLOSE)
    assert value(c.coverage(curves)) == approx(0.4)


def test_first_updates_and_average_over_updates() -> None:
    curves = curves_of(three_tasks())
    assert [value(c.lca(curves, b)) for b in (0, 2, 4)] == approx([1 / 15, 11 / 30, 17 / 30], abs=CLOSE)
    assert c.lca(curves, 5) == Undefined("segment_shorter_than_beta")
    expected = [0.3, 0.6, 0.8, 0.9, 0.45, 0.65, 0.85, 0.8, 0.5, 0.7, 0.8, 0.8]
    assert list(c.seen_mean(curves).values()) == approx(expected, abs=CLOSE)
    assert value(c.aaa(curves)) == approx(0.679167, abs=1e-6)


def test_one_task_and_missing_evaluations() -> None:
    one = curves_of([(0, 0, "start", {0: (1, 5)}), (3, 0, "end", {0: (4, 5)})])
    assert value(c.wc_acc(one)) == approx(0.8)
    assert c.min_acc(one) == c.coverage(one) == Undefined("needs_two_tasks")
    begun = curves_of(three_tasks()[:6])
    assert c.min_acc(begun) == Undefined("not_evaluated")
    assert c.wc_acc(curves_of(three_tasks()[:2])) == Undefined("not_evaluated")


def test_wilson_interval() -> None:
    known = {(50, 100): (0.403832, 0.596168), (0, 100): (0, 0.036993), (100, 100): (0.963007, 1)}
    for counts, expected in {**known, (7, 10): (0.396778, 0.892209)}.items():
        assert c.wilson(*counts) == approx(expected, abs=1e-6)
    point = c.accuracy_curve(curves_of(three_tasks()), 0)[9]
    assert (point.step, point.accuracy, point.low < 0.5 < point.high) == (9, 0.5, True)
    with pytest.raises(ValueError):
        c.wilson(1, 0)


@st.composite
def every_step(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Lengths, images, right answers at the own start, and the right answers of task j after each later update."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    images = [draw(st.integers(1, 20)) for _ in lengths]
    firsts = [draw(st.integers(0, n)) for n in images]
    sizes = [sum(lengths[j:]) for j in range(len(lengths))]
    curves = [draw(st.lists(st.integers(0, n), min_size=m, max_size=m)) for n, m in zip(images, sizes, strict=True)]
    return lengths, images, firsts, curves


@settings(deadline=None, max_examples=50)
@given(every_step(), st.integers(1, 15))
def test_equals_the_plain_loops(drawn, window: int) -> None:
    lengths, images, firsts, right = drawn
    tasks, b = len(lengths), [sum(lengths[:k]) for k in range(len(lengths) + 1)]

    def count(j: int, s: int) -> int:
        return firsts[j] if s == b[j] else right[j][s - b[j] - 1]

    def a(j: int, s: int) -> Fraction:
        return Fraction(count(j, s), images[j])

    log = []
    for k in range(tasks):
        for s in range(b[k], b[k + 1] + 1):
            event = "start" if s == b[k] else "end" if s == b[k + 1] else "step"
            log.append((s, k, event, {j: (count(j, s), images[j]) for j in range(k + 1)}))
    curves, last = curves_of(log), b[-1]
    visited = [range(0 if j == 0 else b[j] + 1, last + 1) for j in range(tasks)]
    fall = rise = Fraction(0)
    for v, j in zip(visited, range(tasks), strict=True):
        pairs = [(m, n) for m in v for n in v if m < n and n - m < window]
        fall += max([Fraction(0), *(a(j, m) - a(j, n) for m, n in pairs)]) / tasks
        rise += max([Fraction(0), *(a(j, n) - a(j, m) for m, n in pairs)]) / tasks
    assert value(c.wf(curves, window)) == approx(float(fall), abs=CLOSE)
    assert value(c.wp(curves, window)) == approx(float(rise), abs=CLOSE)

    mean = pooled = Fraction(0)
    for k in range(tasks):
        for s in range(b[k] + 1, b[k + 1] + 1):
            mean += sum(a(j, s) for j in range(k + 1)) / (k + 1) / last
            pooled += Fraction(sum(count(j, s) for j in range(k + 1)), sum(images[: k + 1])) / last
            low = sum(min(a(j, t) for t in range(b[j + 1] + 1, s + 1)) for j in range(k))
            assert dict(c.wc_acc_curve(curves))[s] == approx(float((a(k, s) + low) / (k + 1)), abs=CLOSE)
            if k:
                assert dict(c.min_acc_curve(curves))[s] == approx(float(low / k), abs=CLOSE)
                final = low / k
    assert value(c.aaa(curves)) == approx(float(mean), abs=CLOSE)
    assert value(c.aaa_samples(curves)) == approx(float(pooled), abs=CLOSE)
    assert (
        c.min_acc(curves) == Undefined("needs_two_tasks")
        if tasks == 1
        else value(c.min_acc(curves)) == approx(float(final), abs=CLOSE)
    )
    beta = min(lengths)
    first = sum(a(k, b[k] + q) for k in range(tasks) for q in range(beta + 1)) / (beta + 1) / tasks
    assert value(c.lca(curves, beta)) == approx(float(first), abs=CLOSE)
    for pair in gap_pairs(curves):
        pre, steps = a(pair.j, b[pair.k]), range(b[pair.k] + 1, b[pair.k + 1] + 1)
        values = [a(pair.j, s) for s in steps]
        depth = max(Fraction(0), pre - min(values))
        assert pair.depth == float(depth)
        assert pair.residual == float(min(depth, max(Fraction(0), pre - values[-1])))
        assert pair.low_offset == 1 + values.index(min(values))
        assert pair.area == approx(float(sum(max(Fraction(0), pre - x) for x in values)), abs=CLOSE)
