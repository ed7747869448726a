"""Energy from counters in a made-up tree of power zones and a made-up pynvml."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_platform import energy
from cl_platform.energy import EnergyMeter, gpus_of
from cl_platform.metrics.matrix import Undefined

RANGE = 1_000_000


class Zones:
    """A power-zone tree whose counters can be set."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(self, folder, name, value=0, limit=RANGE):
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / "name").write_text(f"{name}\n")
        (path / "max_energy_range_uj").write_text(f"{limit}\n")
        self.set(folder, value)
        return path / "energy_uj"

    def set(self, folder, value):
        (self.root / folder / "energy_uj").write_text(f"{value}\n")


@pytest.fixture
def zones(tmp_path):
    made = Zones(tmp_path)
    made.zone("intel-rapl:0", "package-0", 100)
    return made


def started(zones, **more):
    meter = EnergyMeter(root=zones.root, **more)
    meter.start()
    return meter


def refuse(monkeypatch, *names):
    """The files of these names may not be read, whoever runs the tests."""
    real = Path.read_text

    def read_text(self, *args, **kwargs):
        if self.name in names:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)


# -- CPU packages -----------------------------------------------------------------------------------------------------


def test_a_package_counts_the_difference_from_the_start(zones):
    meter = started(zones)
    zones.set("intel-rapl:0", 600_100)
    assert meter.stop() == 0.6
    assert meter.source == "rapl"
    assert meter.missing == {}


def test_all_packages_add_up_and_neither_their_parts_nor_the_platform_count_again(zones):
    zones.zone("intel-rapl:1", "package-1", 5)
    zones.zone("intel-rapl:0:0", "core", 7)
    zones.zone("intel-rapl:2", "psys", 9)
    zones.zone("intel-rapl-mmio:0", "package-0", 9)
    zones.zone("dtpm", "dtpm", 9)
    meter = started(zones)
    for folder in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        zones.set(folder, 250_000)
    assert meter.stop() == pytest.approx((249_900 + 249_995) / 1e6)


def test_a_counter_that_wraps_between_two_samples_gets_its_range_once(zones):
    zones.set("intel-rapl:0", 900_000)
    meter = started(zones)
    zones.set("intel-rapl:0", 200_000)
    meter.sample()
    zones.set("intel-rapl:0", 950_000)
    meter.sample()
    zones.set("intel-rapl:0", 100_000)
    assert meter.stop() == pytest.approx(0.3 + 0.75 + 0.15)


@given(first=st.integers(0, RANGE - 1), steps=st.lists(st.integers(0, RANGE - 1), max_size=20))
def test_however_often_it_wraps_the_sum_is_what_was_used(tmp_path_factory, first, steps):
    zones = Zones(tmp_path_factory.mktemp("powercap"))
    zones.zone("intel-rapl:0", "package-0", first)
    meter, value = started(zones), first
    for step in steps:
        value += step
        zones.set("intel-rapl:0", value % RANGE)
        meter.sample()
    assert meter.reading() == pytest.approx(sum(steps) / 1e6)


def test_without_any_counter_there_is_no_energy_and_no_guess(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        meter = EnergyMeter(root=root)
        meter.start()
        meter.sample()
        assert meter.stop() == Undefined("no_counter")
        assert meter.source is None
        assert meter.missing == {"rapl": "no_counter"}


@pytest.mark.parametrize("name", ["energy_uj", "max_energy_range_uj"])
def test_a_counter_that_may_not_be_read_is_not_permitted(zones, monkeypatch, name):
    refuse(monkeypatch, name)
    meter = started(zones)
    assert meter.stop() == Undefined("not_permitted")
    assert meter.missing == {"rapl": "not_permitted"}


def test_a_counter_that_is_lost_on_the_way_leaves_no_partial_sum(zones):
    meter = started(zones)
    zones.set("intel-rapl:0", 500_000)
    meter.sample()
    (zones.root / "intel-rapl:0" / "energy_uj").unlink()
    meter.sample()
    zones.set("intel-rapl:0", 600_000)
    assert meter.stop() == Undefined("no_counter")


def test_a_file_without_a_number_is_no_counter(zones):
    zones.set("intel-rapl:0", "unknown")
    assert started(zones).stop() == Undefined("no_counter")


def test_stopping_twice_gives_the_same(zones):
    meter = started(zones)
    zones.set("intel-rapl:0", 400_100)
    assert meter.stop() == 0.4
    zones.set("intel-rapl:0", 800_000)
    assert meter.stop() == 0.4


def test_what_stands_beside_the_number_is_json_and_says_what_was_measured(zones):
    meter = started(zones)
    meter.stop()
    facts = json.loads(json.dumps(meter.facts()))
    assert facts["source"] == "rapl"
    assert facts["seconds"] >= 0
    assert facts["measures"] == "the machine, not the process"


# -- GPUs -------------------------------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class NoPermission(NVMLError):
    pass


@pytest.fixture
def nvml(monkeypatch):
    module = types.ModuleType("pynvml")
    module.NVMLError, module.NVMLError_NoPermission = NVMLError, NoPermission
    module.energy, module.log = {"GPU-a": 5_000, 0: 7_000}, []
    module.nvmlInit = lambda: module.log.append("init")
    module.nvmlShutdown = lambda: module.log.append("shutdown")
    module.nvmlDeviceGetHandleByUUID = module.nvmlDeviceGetHandleByIndex = lambda gpu: gpu

    def consumption(handle):
        value = module.energy[handle]
        if isinstance(value, Exception):
            raise value
        return value

    module.nvmlDeviceGetTotalEnergyConsumption = consumption
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_gpus_count_in_millijoule_and_add_to_the_packages(zones, nvml):
    meter = started(zones, gpus=["GPU-a", 0])
    nvml.energy.update({"GPU-a": 6_500, 0: 7_250})
    zones.set("intel-rapl:0", 500_100)
    assert meter.stop() == pytest.approx(1.5 + 0.25 + 0.5)
    assert meter.source == "nvml+rapl"
    assert nvml.log == ["init", "shutdown"]


def test_a_run_on_the_cpu_asks_no_gpu(zones, nvml):
    assert started(zones).source == "rapl"
    assert nvml.log == []


@pytest.mark.parametrize(("error", "reason"), [(NVMLError("no"), "no_counter"), (NoPermission("no"), "not_permitted")])
def test_a_gpu_that_tells_nothing_is_missing_and_the_packages_still_count(zones, nvml, error, reason):
    nvml.energy["GPU-a"] = error
    meter = started(zones, gpus=["GPU-a"])
    zones.set("intel-rapl:0", 500_100)
    assert meter.stop() == 0.5
    assert meter.source == "rapl"
    assert meter.missing == {"nvml": reason}
    assert nvml.log == ["init", "shutdown"]


def test_a_refusal_is_told_before_an_absence(tmp_path, nvml):
    nvml.energy["GPU-a"] = NoPermission("no")
    meter = EnergyMeter(["GPU-a"], tmp_path)
    meter.start()
    assert meter.stop() == Undefined("not_permitted")


def test_a_gpu_counter_that_starts_anew_has_no_sum(tmp_path, nvml):
    meter = EnergyMeter(["GPU-a"], tmp_path)
    meter.start()
    nvml.energy["GPU-a"] = 10
    assert meter.stop() == Undefined("no_counter")


def test_without_pynvml_there_is_no_gpu_counter(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = EnergyMeter(["GPU-a"], tmp_path)
    meter.start()
    assert meter.stop() == Undefined("no_counter")
    assert set(meter.missing) == {"nvml", "rapl"}


def test_a_gpu_is_named_by_its_uuid(monkeypatch):
    properties = types.SimpleNamespace(uuid="12ab-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert gpus_of(torch.device("cuda", 0)) == ["GPU-12ab-34"]
    assert gpus_of(torch.device("cpu")) == []


def test_no_table_of_power_draws_stands_in_the_code():
    text = Path(energy.__file__).read_text().lower()
    assert "watt" not in text
    assert "tdp" not in text
