"""After which updates the evaluation subsets are answered, and what that may cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_platform.metrics.evaluation_budget import next_base
from cl_platform.metrics.grid import Adaptive, Boundaries, Every, EveryStep, Grid, Plan, build_grid, images_per_task

AMPLE = 10**6  # an overhead that never binds


def walk(grid: Grid, updates: int, curve: Callable[[int], Mapping[int, int]]) -> list[int]:
    """Offsets that a begun grid evaluates."""
    found = []
    for offset in range(1, updates + 1):
        if grid.due(offset):
            grid.record(offset, curve(offset))
            found.append(offset)
    return found


def segment(k: int, updates: int, rate: str, curve: Callable[[int], int] = lambda o: 90) -> list[int]:
    grid = Adaptive(Plan([updates] * 2, 16, max_overhead=AMPLE, max_rate=rate, min_per_task=1), 28)
    grid.begin_task(k, updates, {0: 90} if k else {})
    return walk(grid, updates, lambda o: {0: curve(o), **({1: 0} if k else {})})


def flat_run(lengths: list[int], forwards: int, images: int) -> tuple[Adaptive, list[int]]:
    """A whole run without any new low, and each task's quota."""
    grid, quotas = Adaptive(Plan(lengths, forwards), images), []
    for k, updates in enumerate(lengths):
        grid.begin_task(k, updates, dict.fromkeys(range(k), 90))
        quotas.append(grid.quota.evaluations)
        assert len(walk(grid, updates, lambda o, k=k: dict.fromkeys(range(k + 1), 90))) == quotas[-1]
        grid.end_task()
    return grid, quotas


def dip(offset: int) -> int:
    return 90 - 5 * offset if offset <= 10 else min(90, 40 + 2 * (offset - 10))


def late(offset: int) -> int:
    return 90 if offset < 60 else 50 if offset < 70 else 88


# -- the adaptive grid within a task ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, updates, rate, curve, expected",
    [
        (0, 60, "0.2", lambda o: 90, [1, 3, 7, 15, 30, 60]),
        (1, 100, "0.1", lambda o: 90, [1, 2, 4, 7, 12, 21, 32, 47, 69, 100]),
        (1, 100, "0.1", dip, [1, 2, 4, 6, 8, 10, 12, 25, 50, 100]),
        (1, 100, "0.1", late, [1, 2, 4, 7, 12, 21, 32, 47, 69, 100]),
        (1, 156, "0.026", lambda o: 90, [1, 6, 31, 156]),
        (1, 5, "1", lambda o: 90, [1, 2, 3, 4, 5]),
        (1, 1, "0.1", lambda o: 90, [1]),
        (1, 100, "0.01", lambda o: 90, [100]),
    ],
)
def test_known_offsets(k: int, updates: int, rate: str, curve: Callable[[int], int], expected: list[int]) -> None:
    assert segment(k, updates, rate, curve) == expected


def test_only_old_tasks_steer() -> None:
    grid = Adaptive(Plan([100] * 2, 16, max_overhead=AMPLE), 28)
    grid.begin_task(1, 100, {0: 90})
    assert walk(grid, 100, lambda o: {0: 90, 1: 100 - o}) == segment(1, 100, "0.1")


def test_a_task_without_a_starting_low_steers_nothing() -> None:
    grid = Adaptive(Plan([100] * 3, 16, max_overhead=AMPLE), 28)
    grid.begin_task(2, 100, {1: 90})
    assert walk(grid, 100, lambda o: {0: 100 - o, 1: 90, 2: 0}) == segment(1, 100, "0.1")


def test_lows_last_beyond_a_task() -> None:
    grid = Adaptive(Plan([10] * 3, 16), 28)
    grid.begin_task(1, 10, {0: 90})
    grid.record(1, {0: 20, 1: 50})
    grid.end_task()
    grid.begin_task(2, 10, {0: 85, 1: 60})
    assert grid.low == {0: 20, 1: 60}


@given(st.integers(0, 60), st.integers(1, 60), st.integers(1, 70))
def test_the_next_offset_is_the_first_that_keeps_the_ratio(last: int, further: int, left: int) -> None:
    updates = last + further
    if left <= 1:
        expected = updates
    elif last == 0:
        expected = 1
    else:
        first = next(y for y in range(last + 1, updates + 1) if y**left >= updates * last ** (left - 1))
        expected = min(first, max(last + 1, updates - left + 1))
    assert next_base(last, updates, left) == expected


def test_a_reserve_of_almost_everything_leaves_the_first_update() -> None:
    grid = Adaptive(Plan([100] * 2, 16, max_overhead=AMPLE, max_rate=0.03, reserve=0.9), 28)
    grid.begin_task(1, 100, {0: 90})
    assert walk(grid, 100, lambda o: {0: 90}) == [1, 100]


# -- quotas -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tasks, updates, forwards, images, quotas, overhead",
    [
        (10, 156, 16, 28, [6, *[12] * 8, 13], Fraction(581, 2340)),
        (10, 156, 16, 100, [*[3] * 8, 4, 4], Fraction(115, 468)),
        (10, 156, 128, 100, [8, 22, *[15] * 8], Fraction(5, 36)),
        (5, 90, 16, 30, [5, 12, 10, 9, 9], Fraction(7, 36)),
    ],
)
def test_known_quotas(
    tasks: int, updates: int, forwards: int, images: int, quotas: list[int], overhead: Fraction
) -> None:
    grid, found = flat_run([updates] * tasks, forwards, images)
    assert (found, grid.overhead, grid.evaluations) == (quotas, overhead, sum(quotas))
    assert overhead <= Fraction(1, 4)


@pytest.mark.parametrize(
    "tasks, updates, forwards, weight, expected",
    [
        (10, 156, 16, 1, 28),
        (10, 156, 128, 1, 100),
        (5, 90, 16, 1, 30),
        (10, 156, 32, 2, 28),  # prompts: two passes in training and in evaluation
        (10, 10, 16, 1, 25),
        (10, 156, 16, Fraction(1, 2), 56),
        (10, 0, 16, 1, 25),
    ],
)
def test_images_per_task_leave_room_for_twelve_evaluations(
    tasks: int, updates: int, forwards: int, weight: Fraction, expected: int
) -> None:
    assert images_per_task(Plan([updates] * tasks, forwards, weight)) == expected


def test_images_of_an_unknown_stream_are_for_one_task_of_1024_updates() -> None:
    assert images_per_task(Plan(None, 1)) == 64
    assert images_per_task(Plan([None], 1)) == 64


def test_shares_are_the_decimals_that_were_written() -> None:
    grid = Adaptive(Plan([100] * 2, 16, max_overhead=AMPLE, max_rate=0.29), 28)
    grid.begin_task(1, 100, {0: 90})
    assert grid.quota.evaluations == 29  # 0.29 * 100 is 28.999999999999996 in floats


def test_what_a_task_leaves_goes_to_the_next_up_to_its_allowance() -> None:
    grid = Adaptive(Plan([100] * 4, 16, max_overhead=AMPLE), 28)
    grid.begin_task(0, 100, {})
    assert grid.quota.evaluations == 5
    grid.end_task()  # nothing used of 10
    assert grid.carry == 10
    grid.begin_task(1, 100, {0: 90})
    assert grid.quota.evaluations == 20
    grid.record(1, {0: 90})
    grid.end_task()
    assert grid.carry == 10


def test_the_budget_thins_and_says_so() -> None:
    grid = Adaptive(Plan([156] * 10, 16), 28)
    grid.begin_task(0, 156, {})
    assert grid.notes() == ["evaluation thinned to 6 of 156 updates (evaluation.max_overhead)"]
    floored = Adaptive(Plan([156] * 10, 16), 100)  # 2 were affordable; later tasks make up for the third
    floored.begin_task(0, 156, {})
    assert floored.notes() == ["evaluation thinned to 3 of 156 updates (evaluation.max_overhead)"]
    ample = Adaptive(Plan([156] * 10, 128), 100)
    ample.begin_task(0, 156, {})
    assert ample.notes() == []


def test_a_floor_above_the_budget_is_told_once() -> None:
    plan = Plan([10] * 4, 16)
    grid, lines = Adaptive(plan, 100), []
    for k in range(4):
        grid.begin_task(k, 10, dict.fromkeys(range(k), 90))
        lines += [line for line in grid.notes() if "min_per_task" in line]
        walk(grid, 10, lambda o, k=k: dict.fromkeys(range(k + 1), 90))
        grid.end_task()
    assert grid.overhead == Fraction(3 * 100 * 10, 3 * 16 * 40)
    assert lines == ["evaluation.min_per_task=3 takes the overhead to 1.562, 1.312 above evaluation.max_overhead"]


# -- unknown and wrong lengths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [None, [None, None], [None, 50]])
def test_a_task_of_unknown_length_is_planned_as_if_alone_and_doubled_when_passed(updates: list[int | None]) -> None:
    grid = Adaptive(Plan(updates, 2), 100)
    grid.begin_task(0, None, {})
    affordable = 3 * 2 * 1024 // 4 // 100
    assert grid.quota.evaluations == -(-affordable // 2)
    assert grid.notes() == ["evaluation thinned to 8 of the first 1024 updates (evaluation.max_overhead)"]
    found = walk(grid, 5000, lambda o: {0: 50})
    assert {1, 1024, 2048, 4096} <= set(found)
    assert len([o for o in found if o <= 2048]) <= 15
    assert (grid.quota.updates, grid.quota.evaluations) == (8192, -(-(3 * 2 * 8192 // 4 // 100) // 2))
    assert grid.overhead is None


def test_a_task_longer_than_planned_goes_on_being_evaluated() -> None:
    grid = Adaptive(Plan([20, 20], 16, max_overhead=AMPLE, max_rate=0.2), 28)
    grid.begin_task(1, 20, {0: 90})
    assert [o for o in walk(grid, 60, lambda o: {0: 90}) if o >= 20][:1] == [20]
    assert grid.quota.updates == 80
    assert grid.used <= grid.quota.evaluations == 16


def test_a_task_without_updates_is_never_evaluated() -> None:
    grid = Adaptive(Plan([0, 0], 16), 25)
    for k in range(2):
        grid.begin_task(k, 0, {})
        assert (grid.quota.evaluations, grid.notes(), grid.overhead) == (0, [], None)
        grid.end_task()


def test_a_stream_may_grow_beyond_its_plan() -> None:
    grid = Adaptive(Plan([100], 16), 28)
    grid.begin_task(2, 100, {0: 90, 1: 90})
    assert walk(grid, 100, lambda o: {0: 90, 1: 90, 2: 90})[-1] == 100


# -- the other grids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid, expected",
    [
        (EveryStep(), [1, 2, 3, 4, 5, 6, 7]),
        (Every(3), [3, 6, 7]),
        (Every(7), [7]),
        (Boundaries(), []),
    ],
)
def test_offsets_of_the_plain_grids(grid: Grid, expected: list[int]) -> None:
    grid.begin_task(0, 7, {})
    assert walk(grid, 7, lambda o: {0: 5}) == expected
    grid.end_task()


def test_the_last_update_of_a_task_of_unknown_length_is_none_in_particular() -> None:
    grid = Every(3)
    grid.begin_task(0, None, {})
    assert walk(grid, 7, lambda o: {0: 5}) == [3, 6]


def test_every_step_prints_its_overhead() -> None:
    grid = EveryStep(Plan([10] * 2, 16), 32)
    grid.begin_task(0, 10, {})
    assert grid.notes() == ["evaluation after every update has an overhead of 1; evaluation.max_overhead is ignored"]
    walk(grid, 10, lambda o: {0: 1})
    assert grid.overhead == Fraction(1, 3)
    grid.begin_task(1, 10, {0: 1})
    assert grid.notes() == []
    walk(grid, 10, lambda o: {0: 1})
    assert grid.overhead == 1


def test_names_of_the_grids() -> None:
    plan = Plan([10], 16)
    made = {name: type(build_grid(name, plan, 25)) for name in ("adaptive", "every_step", "every", "boundaries", "off")}
    assert list(made.values()) == [Adaptive, EveryStep, Every, Boundaries, Boundaries]
    with pytest.raises(ValueError, match="sometimes"):
        build_grid("sometimes", plan, 25)


@pytest.mark.parametrize(
    "key, value",
    [("max_overhead", 0), ("max_rate", 0), ("max_rate", 1.1), ("min_per_task", 0), ("reserve", 1), ("weight", 0)],
)
def test_a_plan_refuses_what_is_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        Plan([10], 16, **{key: value})


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="k 0"):
        Every(0)
    with pytest.raises(ValueError, match="images 0"):
        Adaptive(Plan([10], 16), 0)
    grid = EveryStep()
    grid.begin_task(0, 5, {})
    grid.record(2, {0: 1})
    with pytest.raises(ValueError, match="offset 2"):
        grid.record(2, {0: 1})
    with pytest.raises(ValueError, match="Boundaries"):
        grid.load_dict(Boundaries().to_dict())


# -- properties -------------------------------------------------------------------------------------------------------


@st.composite
def runs(draw) -> tuple[Callable[[], Grid], list[int], list[list[dict[int, int]]], list[dict[int, int]]]:
    """How to make a grid, real updates, right answers after each update, lows at each start."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    told = [draw(st.sampled_from([n, n, n, None])) for n in lengths]
    plan = Plan(
        draw(st.sampled_from([lengths, told, None])),
        draw(st.sampled_from([1, 16, Fraction(33, 2)])),
        draw(st.sampled_from([1, 2, Fraction(1, 3)])),
        draw(st.sampled_from([0.25, "0.05", AMPLE])),
        draw(st.sampled_from([0.05, 0.1, 0.37, 1.0])),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([0, 0.2, 0.9])),
    )
    images, k = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    name = draw(st.sampled_from(["adaptive", "adaptive", "adaptive", "every", "every_step", "off"]))
    random = draw(st.randoms(use_true_random=False))
    curves = [[{j: random.randint(0, 9) for j in range(p + 1)} for _ in range(n)] for p, n in enumerate(lengths)]
    lows = [{j: random.randint(5, 9) for j in range(p)} for p in range(len(lengths))]
    return lambda: build_grid(name, plan, images, k), lengths, curves, lows


@settings(max_examples=150, deadline=None)
@given(runs())
def test_first_and_last_update_are_evaluated_and_the_quota_holds(run) -> None:
    make, lengths, curves, lows = run
    grid = make()
    for p, updates in enumerate(lengths):
        grid.begin_task(p, updates, lows[p])
        found = walk(grid, updates, lambda o, p=p: curves[p][o - 1])
        if isinstance(grid, Adaptive):
            quota = grid.quota.evaluations
            assert 1 <= len(found) <= quota <= updates
            assert found[-1] == updates
            assert found[0] == (1 if quota > 1 else updates)
        grid.end_task()


@settings(max_examples=150, deadline=None)
@given(runs(), st.data())
def test_a_restored_grid_decides_as_the_one_that_went_on(run, data) -> None:
    make, lengths, curves, lows = run
    cut = data.draw(st.integers(0, sum(lengths) + len(lengths)))

    def decisions(interrupted: bool) -> list[object]:
        grid, made, moment = make(), [], 0
        for p, updates in enumerate(lengths):
            unknown = p % 3 == 2  # a task whose length nobody tells
            grid.begin_task(p, None if unknown else updates, lows[p])
            made.append(grid.notes())
            for offset in range(1, updates + 2):
                if interrupted and moment == cut:
                    state = json.loads(json.dumps(grid.to_dict()))
                    grid = make()
                    grid.load_dict(state)
                    assert grid.to_dict() == state
                moment += 1
                if offset <= updates and grid.due(offset):
                    made.append((p, offset))
                    grid.record(offset, curves[p][offset - 1])
            made += [grid.notes(), grid.overhead, grid.evaluations]
            grid.end_task()
        return made

    assert decisions(interrupted=True) == decisions(interrupted=False)


@settings(max_examples=100, deadline=None)
@given(runs())
def test_asking_changes_nothing(run) -> None:
    make, lengths, curves, lows = run
    grid = make()
    grid.begin_task(0, lengths[0], lows[0])
    before = grid.to_dict()
    for offset in range(1, 3 * lengths[0]):
        grid.due(offset)
    assert grid.to_dict() == before


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 200), st.integers(1, 100))
def test_without_a_binding_floor_the_overhead_stays_within_its_bound(
    lengths: list[int], forwards: int, images: int
) -> None:
    grid, told = Adaptive(Plan(lengths, forwards), images), False
    for k, updates in enumerate(lengths):
        grid.begin_task(k, updates, dict.fromkeys(range(k), 90))
        walk(grid, updates, lambda o, k=k: dict.fromkeys(range(k + 1), 90 - o))
        told |= any("min_per_task" in line for line in grid.notes())
        grid.end_task()
    assert grid.overhead is not None
    assert (grid.overhead > Fraction(1, 4)) == told
