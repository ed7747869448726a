"""Gap scalars and windows on random curves, dense and with holes, against loops that spell out the definitions."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist, median

from evaluation_logs import Spec, curves_of
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from cl_platform.metrics import continual as c
from cl_platform.metrics.gap import GapPair, by_switch, gap_pairs, run_level
from cl_platform.metrics.matrix import Outcome, Result, Undefined

CLOSE = 1e-9


class Run:
    """Right answers by (step, event, task), lengths and images of the tasks, and which updates were evaluated."""

    def __init__(self, lengths: list[int], images: list[int], right: dict, skipped: set[int]) -> None:
        self.lengths, self.images, self.right, self.skipped = lengths, images, right, skipped
        self.b = [sum(lengths[:k]) for k in range(len(lengths) + 1)]

    @property
    def tasks(self) -> range:
        return range(len(self.lengths))

    def events(self) -> list[tuple[int, int, str]]:
        found = []
        for k in self.tasks:
            found.append((self.b[k], k, "start"))
            for s in range(self.b[k] + 1, self.b[k + 1] + 1):
                if s == self.b[k + 1] or s not in self.skipped:
                    found.append((s, k, "end" if s == self.b[k + 1] else "step"))
        return found

    def log(self) -> list[Spec]:
        return [
            (s, k, e, {j: (self.right[s, e, j], self.images[j]) for j in range(k + 1)}) for s, k, e in self.events()
        ]

    def a(self, s: int, event: str, j: int) -> Fraction:
        return Fraction(self.right[s, event, j], self.images[j])

    def curve(self, j: int, k: int) -> dict[int, Fraction]:
        """Offset -> accuracy on task j after updates of task k."""
        return {s - self.b[k]: self.a(s, e, j) for s, at, e in self.events() if at == k and e != "start"}

    def visited(self, j: int) -> dict[int, Fraction]:
        return {s: self.a(s, e, j) for s, k, e in self.events() if k >= j and (e != "start" or k == j == 0)}


@st.composite
def runs(draw: st.DrawFn, holes: bool) -> Run:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    images = [draw(st.integers(1, 20) | st.just(10)) for _ in lengths]  # tenths meet a tolerance exactly
    skipped = draw(st.sets(st.integers(1, sum(lengths)))) if holes else set()
    run = Run(lengths, images, {}, skipped)
    events = [(s, k, e, j) for s, k, e in run.events() for j in range(k + 1)]
    values = draw(st.lists(st.integers(0, 20), min_size=len(events), max_size=len(events)))
    run.right = {(s, e, j): min(value, images[j]) for (s, _, e, j), value in zip(events, values, strict=True)}
    return run


def line(points: dict[int, Fraction], x: int) -> Fraction:
    """The value at x on the straight line between its neighbours."""
    left, right = max(p for p in points if p <= x), min(p for p in points if p >= x)
    if left == right:
        return points[x]
    return points[left] + (points[right] - points[left]) * Fraction(x - left, right - left)


def check_pair(run: Run, pair: GapPair, window: int | None, tolerance: Fraction) -> None:
    j, k, length = pair.j, pair.k, run.lengths[pair.k]
    limit = length if window is None else min(window, length)
    assert pair.window_cut == (window is not None and window > length)
    w = {o: v for o, v in run.curve(j, k).items() if o <= limit}
    if not w:
        assert pair == GapPair(k, j, window_cut=pair.window_cut)
        return
    pre = run.a(run.b[k], "end", j)
    low, last = min(w.values()), w[max(w)]
    depth = max(Fraction(0), pre - low)
    residual = min(max(Fraction(0), pre - last), depth)
    assert (pair.pre, pair.low) == (float(pre), float(low))
    assert (pair.depth, pair.residual) == (float(depth), float(residual))
    assert pair.transient == float(depth - residual)
    assert pair.gain == float(max(Fraction(0), last - pre))
    assert pair.boundary_drop == float(pre - run.a(run.b[k], "start", j))
    lowest = next(o for o in sorted(w) if w[o] == low)
    assert pair.low_offset == lowest
    losses = [max(Fraction(0), pre - line({0: pre, **w}, o)) for o in range(1, max(w) + 1)]
    assert pair.area == approx(float(sum(losses)), abs=CLOSE)
    assert pair.area_mean == approx(float(sum(losses) / len(losses)), abs=CLOSE)
    z, q = NormalDist().inv_cdf(1 - 0.025 / len(w)), float(pre + low) / 2
    assert pair.noise_floor == approx(z * math.sqrt(2 * q * (1 - q) / run.images[j]), abs=CLOSE)
    assert pair.depth_significant == (pair.depth > pair.noise_floor)
    back = [o for o in sorted(w) if o > lowest and w[o] >= pre - tolerance]
    if low >= pre - tolerance:
        assert (pair.status, pair.recovery_time, pair.lower, pair.censored_at) == ("no_gap", 0, None, None)
    elif back:
        before = max(o for o in w if o < back[0])
        assert (pair.status, pair.recovery_time, pair.lower) == ("recovered", back[0], before)
        assert pair.censored_at is None
    else:
        assert (pair.status, pair.recovery_time, pair.lower) == ("censored", None, None)
        assert pair.censored_at == max(w)


def kaplan_meier(pairs: list[GapPair]) -> int | None:
    left = Fraction(1)
    for t in range(1, 1 + max([p.recovery_time or p.censored_at or 0 for p in pairs], default=0)):
        watched = sum((p.recovery_time or p.censored_at or 0) >= t for p in pairs)
        done = sum(p.recovery_time == t for p in pairs)
        left *= 1 - Fraction(done, watched)
        if left <= Fraction(1, 2):
            return t
    return None


def check_run_level(run: Run, pairs: list[GapPair], found: dict[str, Outcome]) -> None:
    if len(run.lengths) == 1:
        assert set(found.values()) == {Undefined("needs_two_tasks")}
        return
    if any(pair.status == "not_evaluated" for pair in pairs):
        assert set(found.values()) == {Undefined("not_evaluated")}
        return
    for key in ("depth", "residual", "transient", "gain", "area", "area_mean", "boundary_drop"):
        terms = [getattr(pair, key) for pair in pairs]
        assert found[f"gap_{key}"] == Result(approx(sum(terms) / len(terms), abs=CLOSE))
        for k, scalars in by_switch(pairs).items():
            terms = [getattr(pair, key) for pair in pairs if pair.k == k]
            assert scalars[f"gap_{key}"] == approx(sum(terms) / len(terms), abs=CLOSE)
    assert found["gap_depth_max"] == Result(max(pair.depth for pair in pairs))
    depth, transient = sum(pair.depth for pair in pairs), sum(pair.transient for pair in pairs)
    expected = Result(approx(transient / depth, abs=CLOSE)) if depth else Undefined("no_gap")
    assert found["gap_transient_share"] == expected
    gaps = [pair for pair in pairs if pair.status != "no_gap"]
    times = [pair.recovery_time for pair in gaps if pair.status == "recovered"]
    if not gaps:
        assert found["gap_recovered_share"] == found["gap_recovery_time"] == Undefined("no_gap")
        return
    assert found["gap_recovered_share"] == Result(approx(len(times) / len(gaps), abs=CLOSE))
    middle = kaplan_meier(gaps)
    assert found["gap_recovery_time"] == (Undefined("censored") if middle is None else Result(float(middle)))
    if len(times) == len(gaps) and len(times) % 2:
        assert middle == median(times)


@settings(deadline=None, max_examples=100)
@given(st.booleans().flatmap(runs), st.none() | st.integers(1, 15), st.sampled_from([0, 2, 5, 10, 20]))
def test_gaps_equal_the_plain_loops(run: Run, window: int | None, hundredths: int) -> None:
    curves = curves_of(run.log())
    pairs = gap_pairs(curves, window, hundredths / 100)
    assert [(p.k, p.j) for p in pairs] == [(k, j) for k in run.tasks for j in range(k)]
    for pair in pairs:
        check_pair(run, pair, window, Fraction(hundredths, 100))
    check_run_level(run, pairs, run_level(curves, pairs))


@settings(deadline=None, max_examples=100)
@given(runs(holes=True), st.integers(1, 15))
def test_curves_with_holes_equal_the_plain_loops(run: Run, window: int) -> None:
    curves, last = curves_of(run.log()), run.b[-1]
    fall = rise = Fraction(0)
    for j in run.tasks:
        v = run.visited(j)
        pairs = [(m, n) for m in v for n in v if m < n and n - m < window]
        fall += max([Fraction(0), *(v[m] - v[n] for m, n in pairs)]) / len(run.tasks)
        rise += max([Fraction(0), *(v[n] - v[m] for m, n in pairs)]) / len(run.tasks)
    assert c.wf(curves, window).value == approx(float(fall), abs=CLOSE)
    assert c.wp(curves, window).value == approx(float(rise), abs=CLOSE)

    mean = pooled = first = Fraction(0)
    beta = min(run.lengths)
    for k in run.tasks:
        whole = [{0: run.a(run.b[k], "start", j), **run.curve(j, k)} for j in range(k + 1)]
        for o in range(1, run.lengths[k] + 1):
            values = [line(points, o) for points in whole]
            mean += sum(values) / (k + 1) / last
            right = sum(value * n for value, n in zip(values, run.images, strict=False))
            pooled += right / sum(run.images[: k + 1]) / last
        first += sum(line(whole[k], q) for q in range(beta + 1)) / (beta + 1) / len(run.tasks)
    assert c.aaa(curves).value == approx(float(mean), abs=CLOSE)
    assert c.aaa_samples(curves).value == approx(float(pooled), abs=CLOSE)
    assert c.lca(curves, beta).value == approx(float(first), abs=CLOSE)

    newest = len(run.tasks) - 1
    low = sum(min(v for s, v in run.visited(j).items() if s > run.b[j + 1]) for j in range(newest))
    assert c.wc_acc(curves).value == approx(float((run.a(last, "end", newest) + low) / (newest + 1)), abs=CLOSE)
    if newest:
        assert c.min_acc(curves).value == approx(float(low / newest), abs=CLOSE)
    else:
        assert c.min_acc(curves) == Undefined("needs_two_tasks")
