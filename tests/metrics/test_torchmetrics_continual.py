"""The torchmetrics classes over the evaluation log give the pure functions' values."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from evaluation_logs import Spec, curves_of, irregular, switch, three_tasks
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_platform.metrics import continual
from cl_platform.metrics.gap import gap_pairs, run_level
from cl_platform.metrics.matrix import Result
from cl_platform.metrics.torchmetrics_continual import (
    AverageAnytimeAccuracy,
    GapArea,
    GapDepth,
    GapRecoveryTime,
    GapResidual,
    GapTransient,
    LearningCurveArea,
    MinAccuracy,
    WindowedForgetting,
    WindowedPlasticity,
    WorstCaseAccuracy,
)

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")

GAPS = {
    GapDepth: "gap_depth",
    GapResidual: "gap_residual",
    GapTransient: "gap_transient",
    GapRecoveryTime: "gap_recovery_time",
    GapArea: "gap_area",
}
ALL = [
    MinAccuracy,
    WorstCaseAccuracy,
    AverageAnytimeAccuracy,
    lambda **kwargs: WindowedForgetting(window=3, **kwargs),
    lambda **kwargs: WindowedPlasticity(window=3, **kwargs),
    lambda **kwargs: LearningCurveArea(updates=2, **kwargs),
    *GAPS,
]
QUICK = switch((0.90, list(range(1, 9)), [0.70, 0.50, 0.60, 0.80, 0.89, 0.85, 0.91, 0.90]))


def feed(metric, evaluations: list[Spec]):
    for step, position, event, cells in evaluations:
        for evaluated, (right, images) in cells.items():
            metric.update(right, images, step, event, position, evaluated)
    return metric


def expected(evaluations: list[Spec]) -> list[float]:
    curves = curves_of(evaluations)
    run = run_level(curves, gap_pairs(curves))
    outcomes = [continual.min_acc(curves), continual.wc_acc(curves), continual.aaa(curves)]
    outcomes += [continual.wf(curves, 3), continual.wp(curves, 3), continual.lca(curves, 2)]
    outcomes += [run[key] for key in GAPS.values()]
    return [outcome.value if isinstance(outcome, Result) else math.nan for outcome in outcomes]


@pytest.mark.parametrize("log", [three_tasks(), irregular(), QUICK, three_tasks()[:6], []])
def test_values_are_those_of_the_pure_functions(log):
    for make, value in zip(ALL, expected(log), strict=True):
        found = feed(make(), log).compute()
        assert (found.dtype, found.shape) == (torch.float64, ())
        assert found.item() == pytest.approx(value, abs=1e-12, nan_ok=True)


def test_worked_examples():
    known = {
        MinAccuracy(): 0.5,
        WorstCaseAccuracy(): 19 / 30,
        WindowedForgetting(2): 4 / 15,
        WindowedPlasticity(10): 17 / 30,
        LearningCurveArea(4): 17 / 30,
        AverageAnytimeAccuracy(): 8.15 / 12,
    }
    for metric, value in known.items():
        assert feed(metric, three_tasks()).compute().item() == pytest.approx(value, abs=1e-9)
    gaps = {GapDepth: 0.4, GapResidual: 0, GapTransient: 0.4, GapRecoveryTime: 5, GapArea: 1.06}
    for cls, value in gaps.items():
        assert feed(cls(), QUICK).compute().item() == pytest.approx(value, abs=1e-9)


def test_window_and_tolerance_of_a_gap_reach_the_definition():
    assert feed(GapResidual(window=2), QUICK).compute().item() == pytest.approx(0.4)
    assert feed(GapRecoveryTime(tolerance=0.1), QUICK).compute().item() == 4
    assert math.isnan(feed(GapRecoveryTime(window=3), QUICK).compute().item())


@pytest.mark.parametrize("make", ALL)
def test_a_state_dict_restores_the_rows_and_training_goes_on(make):
    log = three_tasks()
    saved = feed(make(), log[:8]).state_dict()
    assert {rows.dtype for rows in saved["rows"]} == {torch.int64}
    restored = make()
    restored.load_state_dict(saved)
    whole = feed(make(), log).compute()
    assert torch.equal(feed(restored, log[8:]).compute(), whole) or bool(whole.isnan())
    again = make()
    again.load_state_dict(pickle.loads(pickle.dumps(restored.state_dict())))
    assert again.curves() == restored.curves()


def test_a_class_inside_a_module_is_saved_with_it():
    module = torch.nn.ModuleDict({"low": feed(MinAccuracy(), three_tasks())})
    fresh = torch.nn.ModuleDict({"low": MinAccuracy()})
    fresh.load_state_dict(module.state_dict())
    assert fresh["low"].curves() == module["low"].curves()


def test_an_evaluation_may_come_in_batches_and_in_any_order():
    halves = [
        (s, k, event, {j: (right // 2 + part * (right % 2), 5) for j, (right, _) in cells.items()})
        for part in (0, 1)
        for s, k, event, cells in reversed(three_tasks())
    ]
    metric = feed(AverageAnytimeAccuracy(), halves)
    assert metric.compute().item() == pytest.approx(8.15 / 12)


def test_processes_put_their_rows_together_even_one_without_any():
    other = torch.cat(feed(MinAccuracy(), three_tasks()[::2]).rows)

    def gather(rows: torch.Tensor, group: object) -> list[torch.Tensor]:
        assert (rows.dtype, rows.shape[1]) == (torch.int64, 6)
        return [rows, other]

    together = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True}
    mine = feed(MinAccuracy(**together), three_tasks()[1::2])
    assert mine.compute().item() == pytest.approx(0.5)
    assert len(mine.rows) == sum(len(cells) for *_, cells in three_tasks()[1::2])
    idle = MinAccuracy(**together)
    assert idle.compute().item() == pytest.approx(feed(MinAccuracy(), three_tasks()[::2]).compute().item())
    assert idle.rows == []


def test_reset_forgets_and_undefined_is_nan():
    metric = feed(MinAccuracy(), three_tasks())
    assert metric.compute().item() == pytest.approx(0.5)
    metric.reset()
    feed(metric, three_tasks()[:5])
    assert math.isnan(metric.compute().item())


def test_metrics_can_be_pickled_and_given_tensors():
    metric = WorstCaseAccuracy()
    metric.update(torch.tensor(0), torch.tensor(5), 0, "start", 0, 0)
    metric.update(torch.tensor(4), torch.tensor(5), 3, "end", 0, 0)
    assert pickle.loads(pickle.dumps(metric)).compute().item() == 0.8


@pytest.mark.parametrize(
    "row",
    [
        (1, 10, 0, "after", 0, 0),
        (11, 10, 0, "step", 0, 0),
        (-1, 10, 0, "step", 0, 0),
        (0, 0, 0, "step", 0, 0),
        (1, 10, 0, "step", 0, 1),
        (1, 10, -1, "step", 0, 0),
    ],
)
def test_a_row_that_cannot_be_is_refused(row):
    metric = MinAccuracy()
    with pytest.raises(ValueError):
        metric.update(*row)
    assert metric.rows == []


def test_arguments_out_of_range_are_refused():
    for make in (WindowedForgetting, WindowedPlasticity, GapDepth):
        with pytest.raises(ValueError, match="window 0"):
            make(window=0)
    with pytest.raises(ValueError, match="tolerance"):
        GapArea(tolerance=2.0)
    with pytest.raises(ValueError, match="updates -1"):
        LearningCurveArea(-1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_random_logs_give_the_pure_functions_values(lengths, data):
    log: list[Spec] = []
    for k, length in enumerate(lengths):
        begin = sum(lengths[:k])
        for s in range(begin, begin + length + 1):
            event = "start" if s == begin else "end" if s == begin + length else "step"
            log.append((s, k, event, {j: (data.draw(st.integers(0, 7)), 7) for j in range(k + 1)}))
    for make, value in zip(ALL, expected(log), strict=True):
        assert feed(make(), log).compute().item() == pytest.approx(value, abs=1e-12, nan_ok=True)
