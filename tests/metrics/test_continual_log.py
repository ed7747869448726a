"""Writing and reading the log of continual evaluation."""

from __future__ import annotations

import pytest
from evaluation_logs import BROKEN, curves_of, log_text, three_tasks
from pytest import approx

from cl_platform.metrics import Result, Undefined
from cl_platform.metrics import continual as c
from cl_platform.metrics.continual_log import HEADER, Curves, LogRow, cut_after, format_rows, parse
from cl_platform.metrics.gap import gap_pairs, run_level


def test_a_broken_file_names_its_bad_rows_and_uses_the_rest() -> None:
    log = parse(BROKEN, "eval.csv")
    assert [bad.line for bad in log.bad_rows] == [9, 12]
    assert "correct 12" in log.bad_rows[0].reason
    assert str(log.bad_rows[1]).startswith("eval.csv, line 12: truncated")
    curves = Curves.of(log, "cil")
    minimum = c.min_acc(curves)
    assert isinstance(minimum, Result)
    assert minimum.value == approx(0.4, abs=1e-9)
    assert c.wc_acc(curves) == Undefined("incomplete_evaluation")
    assert c.wc_acc_curve(curves)[-1] == (5, approx(0.45, abs=1e-9))
    (pair,) = gap_pairs(curves)
    assert (pair.depth, pair.residual, pair.transient) == approx((0.5, 0.2, 0.3), abs=1e-9)
    assert pair.censored_at == 4
    assert pair.area == approx(1.4, abs=1e-9)


def test_header_only_is_empty() -> None:
    curves = Curves.of(parse(HEADER), "cil")
    outcomes = [c.min_acc(curves), c.wc_acc(curves), c.wf(curves, 10), c.wp(curves, 10), c.lca(curves), c.aaa(curves)]
    outcomes += [c.aaa_samples(curves), c.coverage(curves), *run_level(curves, gap_pairs(curves)).values()]
    assert set(outcomes) == {Undefined("empty")}
    assert c.min_acc_curve(curves) == c.wc_acc_curve(curves) == []


@pytest.mark.parametrize("text", ["", HEADER.rstrip(), HEADER.replace("\n", "\r\n"), "step,event\n"])
def test_another_header_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="first line"):
        parse(text)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("1,0,0,0,step,0,cil,1", "8 columns"),
        ("1,0,0,0,step,0,cil,1.5,2", "not an integer"),
        ("1,0,0,0,step,0,cil,1,10\r", "not an integer"),
        ("1,0,0,0,stop,0,cil,1,2", "unknown event"),
        ("1,0,0,0,step,0,ci,1,2", "unknown prediction_space"),
        ("1,0,0,0,step,0,cil,0,0", "not above 0"),
        ("1,0,0,0,step,0,cil,-1,2", "not within"),
        ("-1,0,0,0,step,0,cil,1,2", "negative"),
        ("1,0,0,0,step,1,cil,1,2", "not yet seen"),
        ("1,1,0,0,step,0,cil,1,2", "not the task at position"),
        ("", "1 columns"),
    ],
)
def test_bad_rows(line: str, reason: str) -> None:
    log = parse(f"{HEADER}{line}\n0,0,0,0,start,0,cil,1,2\n", task_ids=[0, 1])
    assert len(log.rows) == 1
    assert [(bad.line, reason in bad.reason) for bad in log.bad_rows] == [(2, True)]


def test_the_later_of_two_equal_keys_wins_and_is_named() -> None:
    log = parse(f"{HEADER}1,0,0,0,step,0,cil,1,2\n1,0,0,0,step,0,cil,2,2\n")
    assert [row.correct for row in log.rows] == [2]
    assert [(bad.line, "line 3" in bad.reason) for bad in log.bad_rows] == [(2, True)]


def test_round_trip_with_ids_that_are_not_positions() -> None:
    rows = [LogRow(0, 0, 7, 0, "start", 7, "cil", 1, 2), LogRow(4, 1, 3, 2, "end", 7, "cil", 1, 2)]
    rows.append(LogRow(4, 1, 3, 2, "end", 3, "til", 2, 2))
    log = parse(HEADER + format_rows(rows[:1]) + format_rows(rows[1:]))
    assert not log.bad_rows
    assert log.task_ids == (7, 3)
    assert sorted(log.rows, key=repr) == sorted(rows, key=repr)
    assert format_rows(rows[::-1]).splitlines()[1].split(",")[5] == "3"
    with pytest.raises(ValueError, match="not within"):
        format_rows([LogRow(0, 0, 7, 0, "start", 7, "cil", 3, 2)])


def test_cutting_for_a_resume_restores_the_bytes_of_the_checkpoint() -> None:
    full, until = log_text(three_tasks()), log_text([e for e in three_tasks() if e[1] <= 1])
    assert cut_after(full, 1) == (until, full.count("\n") - until.count("\n"))  # the next start has the same step
    assert cut_after(full, 2) == (full, 0)
    assert cut_after(until + "9,2,2,0,st", 1) == (until, 1)


def test_end_overrides_step_and_a_forgotten_task_is_not_needed() -> None:
    both = [(0, 0, "start", {0: (0, 9)}), (1, 0, "step", {0: (1, 9)}), (1, 0, "end", {0: (2, 9)})]
    assert curves_of(both).visited(0) == {0: (0, 9), 1: (2, 9)}
    later = [*both, (1, 1, "start", {1: (0, 9)}), (2, 1, "end", {1: (3, 9)})]
    assert not curves_of(later).evaluations[-1].complete
    curves = curves_of(later, forgotten=(0,))
    assert curves.evaluations[-1].complete
    assert c.wc_acc(curves) == Result(3 / 9)
    with pytest.raises(ValueError, match="space"):
        Curves.of(parse(HEADER), "xil")
