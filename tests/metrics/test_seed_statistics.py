"""Mean, deviation and band over seeds, against hand-worked numbers, the library's t test and its definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cl_platform.metrics import Undefined
from cl_platform.metrics.seeds import OverSeeds, curve_over_seeds, over_seeds, t_quantile

FRACTIONS = st.floats(-1, 1, allow_nan=False)


def test_three_seeds_worked_by_hand():
    found = over_seeds([0.5, 0.6, 0.7])
    assert found.n == 3
    assert found.mean == pytest.approx(0.6)
    assert found.sd == pytest.approx(0.1)  # divisor 2; the population's would be 0.0816
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert (found.low, found.high) == pytest.approx((0.6 - found.half, 0.6 + found.half))


@pytest.mark.parametrize(("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (100, 1.984)])
def test_quantiles_are_those_of_printed_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-5)


@given(st.lists(FRACTIONS, min_size=2, max_size=12))
def test_the_band_is_the_confidence_interval_of_the_mean(values):
    found = over_seeds(values)
    spread = math.sqrt(sum((v - sum(values) / len(values)) ** 2 for v in values) / (len(values) - 1))
    assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-12)
    assert found.sd == pytest.approx(spread, abs=1e-9)
    if spread > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


@given(st.lists(FRACTIONS, min_size=2, max_size=8), st.randoms())
def test_the_order_of_the_seeds_does_not_matter(values, random):
    mixed = list(values)
    random.shuffle(mixed)
    assert over_seeds(mixed) == over_seeds(values)


@given(FRACTIONS, st.integers(2, 9))
def test_equal_values_have_a_band_of_width_zero(value, n):
    found = over_seeds([value] * n)
    assert (found.mean, found.sd, found.low, found.high) == (value, 0.0, value, value)


def test_one_seed_has_a_mean_and_no_band():
    found = over_seeds([0.25])
    assert found == OverSeeds(1, 0.25)
    assert found.sd is found.low is found.high is found.half is None


def test_no_value_at_all_has_no_mean():
    assert over_seeds([]) == OverSeeds(0)
    assert over_seeds([Undefined("no_gap"), Undefined("no_gap")]) == OverSeeds(0, missing={"no_gap": 2})


def test_runs_without_a_value_are_counted_and_enter_no_mean():
    found = over_seeds([0.2, Undefined("censored"), 0.4, Undefined("no_gap"), Undefined("censored")])
    assert (found.n, found.runs) == (2, 5)
    assert found.mean == pytest.approx(0.3)
    assert found.missing == {"censored": 2, "no_gap": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="no value of a metric"):
        over_seeds([0.1, value])


@pytest.mark.parametrize(("degrees", "share"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_a_quantile_needs_a_degree_of_freedom_and_a_share(degrees, share):
    with pytest.raises(ValueError, match="degrees of freedom"):
        t_quantile(degrees, share)


def test_a_curve_has_a_band_where_every_run_has_a_value():
    curves = [{1: 0.1, 2: 0.2, 5: 0.5}, {1: 0.3, 5: 0.5, 9: 0.0}]
    found = curve_over_seeds(curves, [9, 5, 1, 1, 2])
    assert [step for step, _ in found] == [1, 5]
    assert [value.mean for _, value in found] == pytest.approx([0.2, 0.5])
    assert curve_over_seeds([], [1, 2]) == []
