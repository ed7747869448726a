"""What a run costs: seconds by phase, images per second, forward passes, memory, energy."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

PHASES = ("setup", "data", "train", "boundary", "eval_continual", "eval_boundary", "checkpoint", "report")
METER_SECONDS = 20.0
"""Least time between two readings of the energy counters."""

COUNTED = ("images_trained", "images_forwarded_train", "updates")
"""Counters that go on after a resume."""


class Meter(Protocol):
    """An energy meter; a value without a number has a ``reason``."""

    def start(self) -> None:
        """Count from here on."""
        ...

    def sample(self) -> None:
        """Read the counters."""
        ...

    def reading(self) -> Any:
        """Joule so far, or an object with a ``reason``."""
        ...

    def stop(self) -> Any:
        """The last reading."""
        ...

    def facts(self) -> dict[str, Any]:
        """What belongs beside the number."""
        ...


@dataclass
class _Open:
    """A phase that is running: since when, and the seconds of the phases inside it."""

    name: str
    start: float
    inside: float = 0.0


class Cost:
    """Stopwatch over the phases of a run, and counters that go into ``cost.json``.

    A phase inside another belongs to itself alone: its seconds and its memory are not those of the outer one.

    Args:
        clock: seconds, ever growing.

    Attributes:
        seconds: by phase.
        first_update_seconds: the run's first update, or ``None``; part of the training phase.
        images_trained: training images of the tasks.
        images_forwarded_train: the same with the rows that replay added.
        updates: optimizer updates.
        forwards_train: images sent forward in training.
        forwards_eval: those of continual evaluation, in units of a whole pass.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.first_update_seconds: float | None = None
        self.images_trained = 0
        self.images_forwarded_train = 0
        self.updates = 0
        self.forwards_train = 0
        self.forwards_eval: Fraction | float = 0
        self._clock, self._start, self._before = clock, clock(), 0.0
        self._open: list[_Open] = []
        self._peaks: dict[str, int] = {}
        self._peak_rss = 0
        self._meter: Meter | None = None
        self._metered = -METER_SECONDS
        self._joule_before: float | str = 0.0

    # -- phases -------------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds and its most CUDA memory to a phase; phases may stand inside phases.

        The device is waited for at both ends, and only if CUDA is in use already.
        """
        if name not in self.seconds:
            raise KeyError(name)
        self._edge()
        running = _Open(name, self._clock())
        self._open.append(running)
        ended = False
        try:
            yield
            ended = True
        finally:
            self._edge(wait=ended)  # after an error of the device, waiting would hide it
            self._open.pop()
            passed = self._clock() - running.start
            self.seconds[name] += passed - running.inside
            if self._open:
                self._open[-1].inside += passed

    def _edge(self, wait: bool = True) -> None:
        """Between two phases: wait for the device, and book its peak to the phase that ran until now."""
        self.tick()
        cuda = _cuda()
        if cuda is None or not wait:
            return
        cuda.synchronize()
        if self._open:
            name = self._open[-1].name
            self._peaks[name] = max(self._peaks.get(name, 0), cuda.max_memory_allocated())
        cuda.reset_peak_memory_stats()

    @property
    def total_seconds(self) -> float:
        """Seconds since the stopwatch was made, and those of the processes that the run was resumed from."""
        return self._before + self._clock() - self._start

    # -- energy -------------------------------------------------------------------------------------------------------

    def measure_energy(self, meter: Meter) -> None:
        """Count energy from here on."""
        meter.start()
        self._meter, self._metered = meter, self._clock()

    def tick(self) -> None:
        """Read the energy counters if that is due; cheap, and to be called at least once in 40 seconds."""
        if self._meter is not None and self._clock() - self._metered >= METER_SECONDS:
            self._metered = self._clock()
            self._meter.sample()

    def _joule(self, value: Any) -> float | str:
        """All joule of the run, or the reason why they are not known."""
        if isinstance(self._joule_before, str):
            return self._joule_before
        return value.reason if hasattr(value, "reason") else self._joule_before + float(value)

    # -- the record ---------------------------------------------------------------------------------------------------

    def samples_per_second(self) -> float | None:
        """Training images of the tasks per second of training; ``None`` before any training."""
        return self._per_second(self.images_trained)

    def images_per_second(self) -> float | None:
        """Training images with the rows that replay added, per second of training; ``None`` where not counted."""
        return self._per_second(self.images_forwarded_train)

    def _per_second(self, images: int) -> float | None:
        train = self.seconds["train"]
        return images / train if train and images else None

    def eval_overhead(self) -> float | None:
        """Continual evaluation's forwards over three times training's; ``None`` before any training."""
        return float(self.forwards_eval / (3 * self.forwards_train)) if self.forwards_train else None

    def report(self, **more: Any) -> dict[str, Any]:
        """Content of ``cost.json``; the energy meter is stopped."""
        joule = self._joule(self._meter.stop()) if self._meter is not None else "no_counter"
        known = not isinstance(joule, str)
        facts = self._meter.facts() if self._meter is not None else {"source": None}
        return {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "seconds_total": round(self.total_seconds, 3),
            "first_update_seconds": self.first_update_seconds,
            "samples_per_second": self.samples_per_second(),
            "images_per_second": self.images_per_second(),
            "updates": self.updates,
            "images_trained": self.images_trained,
            "images_forwarded_train": self.images_forwarded_train,
            "forwards_train": self.forwards_train,
            "forwards_eval": float(self.forwards_eval),
            "eval_overhead": self.eval_overhead(),
            "peak_rss_bytes": max(self._peak_rss, peak_rss_bytes()),
            "peak_cuda_bytes": self._peak_cuda(),
            "peak_cuda_bytes_by_phase": dict(self._peaks) or None,
            "energy_joule": joule if known else None,
            "energy": {**facts, "reason": None if known else joule},
            **more,
        }

    def _peak_cuda(self) -> int | None:
        """Over all phases, and what runs now in none or in one that has not ended."""
        cuda = _cuda()
        if cuda is not None:
            return max([*self._peaks.values(), cuda.max_memory_allocated()])
        return max(self._peaks.values(), default=None)

    def state(self) -> dict[str, Any]:
        """What :meth:`load_state` needs to go on in another process, as plain JSON; running phases are left out."""
        return {
            **{name: getattr(self, name) for name in COUNTED},
            "seconds": dict(self.seconds),
            "seconds_total": self.total_seconds,
            "first_update_seconds": self.first_update_seconds,
            "peak_rss_bytes": max(self._peak_rss, peak_rss_bytes()),
            "peak_cuda_bytes_by_phase": dict(self._peaks),
            "joule": self._joule(self._meter.reading()) if self._meter is not None else "no_counter",
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Add what an earlier process of the same run had spent; to be called once."""
        for name in COUNTED:
            setattr(self, name, getattr(self, name) + state[name])
        for name, value in state["seconds"].items():
            self.seconds[name] += value
        self._before += state["seconds_total"]
        if state["first_update_seconds"] is not None:
            self.first_update_seconds = state["first_update_seconds"]
        self._peak_rss = max(self._peak_rss, state["peak_rss_bytes"])
        for name, value in state["peak_cuda_bytes_by_phase"].items():
            self._peaks[name] = max(self._peaks.get(name, 0), value)
        self._joule_before = state["joule"]


def _cuda() -> Any:
    """``torch.cuda`` where it is in use already, else ``None``; never starts it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far; Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float, tenths: bool = False) -> str:
    """Seconds in words, as a person reads them; with ``tenths`` of a second below 10."""
    if seconds < 120:
        return f"{seconds:.1f} s" if tenths and seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
