"""Energy from the machine's own counters (efficiency 6.8): NVML for GPUs, RAPL for CPU packages; never an estimate.

The counters measure the machine, whoever uses it, not this process.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cl_platform.metrics.matrix import Undefined

if TYPE_CHECKING:
    import torch

POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"intel-rapl:\d+")
"""Folders of whole zones; those inside them (cores, memory) have a second number. AMD's are called intel as well."""

SAMPLE_SECONDS = 60
"""A counter that wraps must be read at least this often, so that it wraps at most once between two readings."""


class Counter(Protocol):
    """Something that counts energy upwards."""

    def advance(self) -> float:
        """Joule since the last call, or since the counter was made.

        Raises:
            PermissionError: not allowed.
            OSError: not there, or not there any more.
        """
        ...


class RaplPackage:
    """The microjoule counter of one CPU package; it wraps at ``max_energy_range_uj``.

    Args:
        folder: the package's folder under the kernel's power zones.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last = self._read("energy_uj")
        self._range = self._read("max_energy_range_uj")

    def advance(self) -> float:
        """Joule since the last call."""
        now = self._read("energy_uj")
        passed = now - self._last if now >= self._last else now - self._last + self._range
        self._last = now
        return passed / 1e6

    def _read(self, name: str) -> int:
        try:
            return int((self._folder / name).read_text())
        except ValueError as error:
            raise OSError(f"{self._folder / name} holds no number") from error


class NvmlGpu:
    """The millijoule counter of one GPU.

    Args:
        nvml: the module ``pynvml``, initialised.
        gpu: UUID such as ``GPU-...``, or NVML's index.
    """

    def __init__(self, nvml: Any, gpu: str | int) -> None:
        self._nvml = nvml
        find = nvml.nvmlDeviceGetHandleByUUID if isinstance(gpu, str) else nvml.nvmlDeviceGetHandleByIndex
        self._handle = _asked(nvml, find, gpu)
        self._last = self._read()

    def advance(self) -> float:
        """Joule since the last call."""
        now = self._read()
        if now < self._last:
            raise OSError("the driver was loaded anew")
        passed, self._last = now - self._last, now
        return passed / 1e3

    def _read(self) -> int:
        return int(_asked(self._nvml, self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handle))


def _asked(nvml: Any, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except nvml.NVMLError as error:
        refused = isinstance(error, nvml.NVMLError_NoPermission)
        raise (PermissionError if refused else OSError)(str(error)) from error


class EnergyMeter:
    """Joule that pass between :meth:`start` and :meth:`stop` in everything that can be counted here.

    Args:
        gpus: the GPUs that the run uses; none for a run on the CPU.
        root: where the kernel lists its power zones.

    Attributes:
        missing: part (``nvml`` or ``rapl``) -> why it is not counted: ``no_counter`` or ``not_permitted``.
    """

    def __init__(self, gpus: Sequence[str | int] = (), root: Path = POWERCAP) -> None:
        self._gpus, self._root = tuple(gpus), root
        self._counters: dict[str, list[Counter]] = {}
        self._joule: dict[str, float] = {}
        self.missing: dict[str, str] = {}
        self._nvml: Any = None
        self._started = self._seconds = 0.0

    @property
    def source(self) -> str | None:
        """What is counted: ``rapl``, ``nvml`` or ``nvml+rapl``; ``None`` for nothing."""
        return "+".join(sorted(self._joule)) or None

    def start(self) -> None:
        """Count from here on."""
        self._started = time.perf_counter()
        parts = {"rapl": self._packages} | ({"nvml": self._devices} if self._gpus else {})
        for part, find in parts.items():
            try:
                self._counters[part] = find()
                self._joule[part] = 0.0
            except OSError as error:
                self._lose(part, error)

    def sample(self) -> None:
        """Read all counters; to be called at least every ``SAMPLE_SECONDS``."""
        if self._counters:
            self._seconds = time.perf_counter() - self._started
        for part, counters in list(self._counters.items()):
            try:
                self._joule[part] += sum(counter.advance() for counter in counters)
            except OSError as error:
                self._lose(part, error)

    def reading(self) -> float | Undefined:
        """Joule so far of all parts that are counted, or why there is none."""
        self.sample()
        if self._joule:
            return sum(self._joule.values())
        return Undefined("not_permitted" if "not_permitted" in self.missing.values() else "no_counter")

    def stop(self) -> float | Undefined:
        """The last :meth:`reading`; asking again gives the same."""
        value = self.reading()
        self._counters.clear()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None
        return value

    def facts(self) -> dict[str, Any]:
        """What belongs beside the number, JSON-ready: ``source``, ``missing``, ``seconds`` covered, ``measures``."""
        return {
            "source": self.source,
            "missing": dict(self.missing),
            "seconds": round(self._seconds, 3),
            "measures": "the machine, not the process",
        }

    def _packages(self) -> list[Counter]:
        found: list[Counter] = []
        folders = sorted(self._root.iterdir()) if self._root.is_dir() else []
        for folder in folders:
            if PACKAGE.fullmatch(folder.name) and _zone(folder) != "psys":  # which holds the packages once more
                found.append(RaplPackage(folder))
        if not found:
            raise OSError(f"no package under {self._root}")
        return found

    def _devices(self) -> list[Counter]:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise OSError("pynvml is not installed") from error
        _asked(nvml, nvml.nvmlInit)
        self._nvml = nvml
        return [NvmlGpu(nvml, gpu) for gpu in self._gpus]

    def _lose(self, part: str, error: OSError) -> None:
        """A part that was not counted to the end has no sum."""
        self._counters.pop(part, None)
        self._joule.pop(part, None)
        self.missing[part] = "not_permitted" if isinstance(error, PermissionError) else "no_counter"


def _zone(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""


def gpus_of(device: torch.device) -> list[str]:
    """NVML's name of the GPU behind a device, as :class:`EnergyMeter` takes it; empty for other devices."""
    if device.type != "cuda":
        return []
    import torch

    return [f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
