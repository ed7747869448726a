"""What a grid would have seen of a log that holds every update."""

from __future__ import annotations

from fractions import Fraction

import pytest
from evaluation_logs import Spec, log_text, three_tasks

from cl_platform.metrics import Result, Undefined
from cl_platform.metrics.continual_log import parse
from cl_platform.metrics.grid import Adaptive, Boundaries, Every, EveryStep, Plan
from cl_platform.metrics.replay_grid import replay

AMPLE = 10**6  # an overhead that never binds


def every_step_log() -> list[Spec]:
    """Two tasks of 100 updates, 100 images; the old task dips at once and recovers, with a lone low at offset 60."""
    made: list[Spec] = [(0, 0, "start", {0: (0, 100)})]
    made += [(s, 0, "step", {0: (90, 100)}) for s in range(1, 101)]
    made += [(100, 0, "end", {0: (90, 100)}), (100, 1, "start", {0: (90, 100), 1: (0, 100)})]
    dip = {o: 90 - 5 * o if o <= 10 else min(90, 40 + 2 * (o - 10)) for o in range(1, 101)} | {60: 30}
    made += [(100 + o, 1, "step", {0: (dip[o], 100), 1: (o, 100)}) for o in range(1, 101)]
    return [*made, (200, 1, "end", {0: (90, 100), 1: (100, 100)})]


def test_a_replay_shows_what_the_grid_would_have_seen() -> None:
    log = parse(log_text(every_step_log()))
    seen = replay(log, "cil", Adaptive(Plan([100, 100], 16, max_overhead=AMPLE), 100))
    assert isinstance(seen.min_acc, Result)
    assert isinstance(seen.min_acc_every_step, Result)
    assert (seen.min_acc.value, seen.min_acc_every_step.value) == (0.42, 0.3)
    assert (len(seen.chosen[0]), len(seen.chosen[1])) == (5, 15)
    assert seen.chosen[1][:8] == (1, 2, 3, 5, 7, 9, 11, 13)  # the last fall is at 11: 42 of 100
    assert seen.share == Fraction(len(seen.chosen[0]) + len(seen.chosen[1]), 200)
    again = replay(log, "cil", Adaptive(Plan([100, 100], 16, max_overhead=AMPLE), 100))
    assert again == seen


def test_a_replay_of_every_step_is_the_log_itself() -> None:
    log = parse(log_text(every_step_log()))
    seen = replay(log, "cil", EveryStep())
    assert (seen.share, seen.min_acc, seen.log) == (1, seen.min_acc_every_step, log)


def test_a_replay_takes_the_end_of_a_task_for_its_last_update() -> None:
    log = parse(log_text(three_tasks()))  # 4 updates each, the last of which is an end
    seen = replay(log, "cil", Every(3))
    assert seen.chosen == {0: (3, 4), 1: (3, 4), 2: (3, 4)}
    assert seen.share == Fraction(1, 2)


def test_a_replay_of_one_task_has_no_min_acc() -> None:
    log = parse(log_text(every_step_log()[:101]))
    assert replay(log, "cil", Every(10)).min_acc == Undefined("needs_two_tasks")


def test_a_replay_needs_every_update_that_the_grid_wants() -> None:
    log = parse(log_text([e for e in every_step_log() if e[0] != 150]))
    with pytest.raises(ValueError, match="update 50 of the task at position 1"):
        replay(log, "cil", Every(10))
    assert replay(log, "cil", Boundaries()).share == 0


def test_a_replay_leaves_forgotten_tasks_out() -> None:
    log = parse(log_text(every_step_log()))
    seen = replay(log, "cil", Adaptive(Plan([100, 100], 16, max_overhead=AMPLE), 100), forgotten=[0])
    assert seen.min_acc == Undefined("needs_two_tasks")
