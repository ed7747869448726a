"""Seconds and memory by phase, rates, and what goes on after a resume; with a clock and a GPU made up for the test."""

import json
import sys
from fractions import Fraction

import lightning as L
import pytest
import torch
from tiny import built, config_of, digits, fit

import cl_platform.strategies  # noqa: F401  registers the strategies
from cl_platform.callbacks.cost_watch import CostWatch
from cl_platform.cost import PHASES, Cost
from cl_platform.metrics.efficiency import EFFICIENCY_DEFINITIONS
from cl_platform.metrics.matrix import Undefined


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def cost(clock):
    return Cost(clock)


# -- phases -----------------------------------------------------------------------------------------------------------


def test_a_phase_inside_another_belongs_to_itself_alone(cost, clock):
    with cost.phase("train"):
        clock.wait(2)
        for _ in range(3):
            with cost.phase("eval_continual"):
                clock.wait(5)
        clock.wait(1)
    with cost.phase("train"):
        clock.wait(10)
    with cost.phase("eval_continual"):  # at a bound of a task, outside training
        clock.wait(4)
    assert cost.seconds["train"] == 13
    assert cost.seconds["eval_continual"] == 19
    assert sum(cost.seconds.values()) == cost.total_seconds == 32


def test_phases_nest_to_any_depth_and_inside_their_own_kind(cost, clock):
    with cost.phase("boundary"):
        clock.wait(1)
        with cost.phase("train"):
            clock.wait(2)
            with cost.phase("checkpoint"):
                clock.wait(4)
            with cost.phase("train"):
                clock.wait(8)
    assert cost.seconds["boundary"] == 1
    assert cost.seconds["train"] == 10
    assert cost.seconds["checkpoint"] == 4


def test_a_phase_that_fails_is_counted_and_its_error_goes_on(cost, clock):
    with pytest.raises(ZeroDivisionError), cost.phase("train"), cost.phase("eval_continual"):
        clock.wait(3)
        raise ZeroDivisionError
    assert cost.seconds["eval_continual"] == 3
    assert cost.seconds["train"] == 0
    with cost.phase("report"):
        clock.wait(1)
    assert cost.seconds["report"] == 1


def test_an_unknown_phase_is_an_error(cost):
    with pytest.raises(KeyError), cost.phase("lunch"):
        pass
    assert "eval_continual" in PHASES


# -- rates ------------------------------------------------------------------------------------------------------------


def test_rates_are_over_training_without_the_evaluation_inside_it(cost, clock):
    assert cost.samples_per_second() is cost.images_per_second() is cost.eval_overhead() is None
    with cost.phase("train"):
        clock.wait(8)
        with cost.phase("eval_continual"):
            clock.wait(100)
    cost.images_trained, cost.images_forwarded_train = 80, 160
    assert cost.samples_per_second() == 10
    assert cost.images_per_second() == 20
    cost.forwards_train, cost.forwards_eval = 160, Fraction(241, 2)
    assert cost.eval_overhead() == 241 / 960


def test_the_record_is_json_and_names_what_is_defined(cost, clock):
    with cost.phase("train"):
        clock.wait(2)
    cost.updates, cost.forwards_train, cost.forwards_eval = 3, 30, Fraction(9, 2)
    found = json.loads(json.dumps(cost.report(params_total=5)))
    assert found["seconds"] == {**dict.fromkeys(PHASES, 0), "train": 2}
    assert found["eval_overhead"] == 0.05
    assert found["forwards_eval"] == 4.5
    assert found["first_update_seconds"] is None
    assert found["params_total"] == 5
    assert found["energy_joule"] is None
    assert found["energy"] == {"source": None, "reason": "no_counter"}
    assert found["peak_rss_bytes"] > 2**20
    beside = {
        "seconds_total",
        "updates",
        "images_trained",
        "images_forwarded_train",
        "peak_cuda_bytes_by_phase",
        "energy",
    }
    assert set(found) - beside <= {definition.key for definition in EFFICIENCY_DEFINITIONS}


# -- CUDA -------------------------------------------------------------------------------------------------------------


class Gpu:
    """Stands in for ``torch.cuda``."""

    def __init__(self, monkeypatch, initialised=True):
        self.initialised, self.used, self.peak, self.waits = initialised, 0, 0, 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.initialised)
        for name in ("synchronize", "max_memory_allocated", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def use(self, peak, left=0):
        self.peak, self.used = max(self.peak, peak), left

    def synchronize(self):
        self.waits += 1

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.used


def test_each_phase_has_a_peak_of_its_own(cost, monkeypatch):
    gpu = Gpu(monkeypatch)
    with cost.phase("setup"):
        gpu.use(900, left=300)
    with cost.phase("train"):
        gpu.use(500, left=400)
        with cost.phase("eval_continual"):
            gpu.use(450, left=400)
        gpu.use(700, left=300)
    with cost.phase("eval_continual"):
        gpu.use(310, left=300)
    assert gpu.waits == 8
    found = cost.report()
    assert found["peak_cuda_bytes_by_phase"] == {"setup": 900, "eval_continual": 450, "train": 700}
    assert found["peak_cuda_bytes"] == 900
    gpu.use(2000)  # in no phase
    assert cost.report()["peak_cuda_bytes"] == 2000


def test_the_device_is_not_waited_for_inside_a_phase_nor_where_cuda_was_never_started(cost, monkeypatch):
    gpu = Gpu(monkeypatch, initialised=False)
    with cost.phase("train"):
        pass
    assert gpu.waits == 0
    found = cost.report()
    assert found["peak_cuda_bytes"] is found["peak_cuda_bytes_by_phase"] is None
    gpu.initialised = True
    with cost.phase("train"):
        before = gpu.waits
        cost.tick()
        assert gpu.waits == before == 1


def test_after_an_error_the_device_is_not_waited_for(cost, monkeypatch):
    gpu = Gpu(monkeypatch)
    with pytest.raises(ValueError), cost.phase("train"):
        raise ValueError
    assert gpu.waits == 1


def test_where_torch_was_not_imported_it_is_not(cost, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    with cost.phase("data"):
        pass
    assert cost.report()["peak_cuda_bytes"] is None
    assert "torch" not in sys.modules


# -- energy -----------------------------------------------------------------------------------------------------------


class Meter:
    def __init__(self, joule=4.0):
        self.joule, self.calls = joule, []

    def start(self):
        self.calls.append("start")

    def sample(self):
        self.calls.append("sample")

    def reading(self):
        return self.joule

    def stop(self):
        self.calls.append("stop")
        return self.joule

    def facts(self):
        return {"source": "rapl"}


def test_energy_is_read_at_least_once_a_minute_however_phases_and_steps_fall(cost, clock):
    meter = Meter()
    cost.measure_energy(meter)
    with cost.phase("train"):
        for _ in range(600):
            clock.wait(0.1)
            cost.tick()
    assert 2 <= meter.calls.count("sample") <= 4
    clock.wait(30)
    with cost.phase("report"):
        assert meter.calls[-1] == "sample"
    found = cost.report()
    assert meter.calls[-1] == "stop"
    assert found["energy_joule"] == 4.0
    assert found["energy"] == {"source": "rapl", "reason": None}


def test_energy_that_is_not_known_has_a_reason(cost):
    cost.measure_energy(Meter(Undefined("not_permitted")))
    found = json.loads(json.dumps(cost.report()))
    assert found["energy_joule"] is None
    assert found["energy"]["reason"] == "not_permitted"


# -- resume -----------------------------------------------------------------------------------------------------------


def spent(clock, joule):
    cost = Cost(clock)
    cost.measure_energy(Meter(joule))
    with cost.phase("train"):
        clock.wait(6)
    clock.wait(1)
    cost.images_trained, cost.images_forwarded_train, cost.updates = 60, 90, 6
    return cost


def test_a_resumed_run_has_the_cost_of_both_processes(clock):
    first = spent(clock, 4.0)
    first.first_update_seconds = 0.5
    state = json.loads(json.dumps(first.state()))
    clock.wait(1000)
    second = Cost(clock)
    second.measure_energy(Meter(2.5))
    second.load_state(state)
    with second.phase("train"):
        clock.wait(4)
    second.images_trained += 40
    found = second.report()
    assert found["seconds"]["train"] == 10
    assert found["seconds_total"] == 11
    assert found["samples_per_second"] == 10
    assert found["images_per_second"] == 9
    assert found["updates"] == 6
    assert found["first_update_seconds"] == 0.5
    assert found["energy_joule"] == 6.5


def test_energy_is_unknown_where_one_of_the_processes_did_not_know_it(clock):
    state = spent(clock, Undefined("not_permitted")).state()
    second = Cost(clock)
    second.measure_energy(Meter(2.5))
    second.load_state(state)
    assert second.report()["energy"]["reason"] == "not_permitted"


def test_peaks_are_the_largest_of_both_processes(clock, monkeypatch):
    gpu, first = Gpu(monkeypatch), Cost(clock)
    with first.phase("train"):
        gpu.use(900)
    state = first.state()
    second = Cost(clock)
    second.load_state({**state, "peak_rss_bytes": 2**50})
    with second.phase("train"):
        gpu.use(100)
    found = second.report()
    assert found["peak_cuda_bytes_by_phase"] == {"train": 900}
    assert found["peak_rss_bytes"] == 2**50


# -- while training ---------------------------------------------------------------------------------------------------


class Ends(L.Callback):
    """Notes after which batch the first update was known."""

    def __init__(self, cost):
        self.cost, self.known = cost, []

    def on_train_batch_end(self, *args):
        self.known.append(self.cost.first_update_seconds)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_first_update_is_timed_once_and_every_batch_keeps_the_meter_going(accumulated, monkeypatch):
    cost, ticks = Cost(), []
    monkeypatch.setattr(cost, "tick", lambda: ticks.append(1))
    config = config_of("finetune", trainer={"accumulate_grad_batches": accumulated})
    learner, ends = built(config, digits()), Ends(cost)
    for task in digits().tasks:
        fit(learner, config, task, CostWatch(cost), ends, epochs=2)
        learner.end_task(task)
    assert len(ticks) == len(ends.known) == 8
    assert ends.known[: accumulated - 1] == [None] * (accumulated - 1)
    assert set(ends.known[accumulated - 1 :]) == {cost.first_update_seconds}
    assert 0 < cost.first_update_seconds < 60
