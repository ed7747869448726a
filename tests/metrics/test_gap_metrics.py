"""The scalars of the stability gap on curves whose values are known by hand."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from evaluation_logs import curves_of, switch
from pytest import approx

from cl_platform.metrics import Result, Undefined
from cl_platform.metrics.gap import (
    GAP_DEFINITIONS,
    GapPair,
    by_switch,
    deepest,
    gap_pairs,
    kaplan_meier_median,
    noise_floor,
    run_level,
    survival,
)

CLOSE = 1e-9
Case = tuple[float, list[int], list[float]]
QUICK: Case = (0.90, list(range(1, 9)), [0.70, 0.50, 0.60, 0.80, 0.89, 0.85, 0.91, 0.90])
SPARSE: Case = (0.90, [1, 4, 8, 16], [0.70, 0.40, 0.85, 0.88])
NEVER: Case = (0.80, [1, 2, 3, 4, 5], [0.60, 0.30, 0.30, 0.35, 0.40])
NONE: Case = (0.80, [1, 2, 3], [0.80, 0.85, 0.90])
FALLEN: Case = (0.80, [1, 2, 3], [0.60, 0.70, 0.75])


def pair_of(case: Case, window: int | None = None) -> GapPair:
    (pair,) = gap_pairs(curves_of(switch(case)), window)
    return pair


@pytest.mark.parametrize(
    "case, window, expected",
    [
        (
            QUICK,
            None,
            {"depth": 0.4, "residual": 0, "transient": 0.4, "gain": 0, "recovery_time": 5, "lower": 4, "area": 1.06},
        ),
        (QUICK, None, {"area_mean": 0.1325, "low_offset": 2, "boundary_drop": 0}),
        (
            SPARSE,
            None,
            {"depth": 0.5, "residual": 0.02, "transient": 0.48, "recovery_time": 16, "lower": 8, "area": 2.54},
        ),
        (SPARSE, None, {"area_mean": 0.15875}),
        (
            NEVER,
            None,
            {"depth": 0.5, "residual": 0.4, "transient": 0.1, "low_offset": 2, "censored_at": 5, "area": 2.05},
        ),
        ((0.80, [1, 2, 3], [0.5, 0.5, 0.8]), None, {"low_offset": 1, "recovery_time": 3, "lower": 2, "area": 0.6}),
        (NONE, None, {"depth": 0, "gain": 0.1, "recovery_time": 0}),
        (
            FALLEN,
            5,
            {"depth": 0.2, "residual": 0.05, "transient": 0.15, "censored_at": 3, "window_cut": 1, "area": 0.35},
        ),
        ((0.80, [1, 2, 3], [0.6, 0.7, 0.79]), 2, {"residual": 0.1, "censored_at": 2, "area": 0.3, "window_cut": 0}),
    ],
)
def test_one_pair(case: Case, window: int | None, expected: dict[str, float]) -> None:
    pair = pair_of(case, window)
    assert {name: getattr(pair, name) for name in expected} == approx(expected, abs=CLOSE)


def test_status() -> None:
    assert [pair_of(case).status for case in (QUICK, NEVER, NONE)] == ["recovered", "censored", "no_gap"]
    assert pair_of(NEVER).recovery_time is None
    empty = pair_of((0.80, [], []))
    assert empty == GapPair(1, 0, "not_evaluated")


def test_run_level() -> None:
    pairs = [replace(pair_of(case), k=k) for k, case in enumerate((QUICK, SPARSE, NEVER, NONE), start=1)]
    run = run_level(curves_of(switch(QUICK)), pairs)
    assert list(run) == [definition.key for definition in GAP_DEFINITIONS]
    expected = {"gap_depth": 0.35, "gap_residual": 0.105, "gap_transient": 0.245, "gap_transient_share": 0.7}
    expected |= {"gap_depth_max": 0.5, "gap_recovered_share": 2 / 3, "gap_recovery_time": 16}
    for key, number in expected.items():
        assert run[key] == Result(approx(number, abs=CLOSE)), key
    deep = deepest(pairs)
    assert deep is not None
    assert (deep.k, deep.j) == (2, 0)
    assert by_switch(pairs)[3]["gap_depth"] == approx(0.5)


def test_undefined_run_level() -> None:
    one = curves_of([(0, 0, "start", {0: (1, 5)}), (3, 0, "end", {0: (4, 5)})])
    assert set(run_level(one, gap_pairs(one)).values()) == {Undefined("needs_two_tasks")}
    for case, reason in ((NEVER, "censored"), (NONE, "no_gap"), ((0.8, [], []), "not_evaluated")):
        curves = curves_of(switch(case))
        assert run_level(curves, gap_pairs(curves))["gap_recovery_time"] == Undefined(reason)
    curves = curves_of(switch(NONE))
    run = run_level(curves, gap_pairs(curves))
    assert run["gap_transient_share"] == run["gap_recovered_share"] == Undefined("no_gap")


def test_kaplan_meier() -> None:
    curve = survival([5, 8, 12], [8, 20])
    assert curve == [(5, Fraction(4, 5)), (8, Fraction(3, 5)), (12, Fraction(3, 10))]
    assert kaplan_meier_median([5, 8, 12], [8, 20]) == 12
    assert kaplan_meier_median([5], [8, 8]) is None


def test_noise_floor() -> None:
    assert noise_floor(0.9, 0.5, 100, 1) == approx(0.127020, abs=1e-6)
    assert noise_floor(0.9, 0.5, 100, 20) == approx(0.195935, abs=1e-6)
    assert noise_floor(0.9, 0.8, 100, 20) == approx(0.152671, abs=1e-6)
    assert pair_of(QUICK).depth_significant
    assert not pair_of(NONE).depth_significant


def test_a_drop_at_the_boundary_is_told_apart() -> None:
    spec = [(s, k, e, {0: (60, 100)} if (k, e) == (1, "start") else cells) for s, k, e, cells in switch(QUICK)]
    (pair,) = gap_pairs(curves_of(spec))
    assert pair.boundary_drop == approx(0.3)


def test_arguments() -> None:
    curves = curves_of(switch(QUICK))
    for arguments in ({"window": 0}, {"tolerance": -0.1}, {"tolerance": 2.0}):
        with pytest.raises(ValueError):
            gap_pairs(curves, **arguments)
