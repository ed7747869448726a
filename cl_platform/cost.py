"""What a run costs: seconds by phase, samples per second, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PHASES = ("setup", "data", "train", "boundary", "eval_boundary", "checkpoint", "report")


class Cost:
    """Stopwatch over the phases of a run, and counters that go into ``cost.json``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.images_trained = 0
        self.updates = 0
        self._start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @property
    def total_seconds(self) -> float:
        """Seconds since the stopwatch was made."""
        return time.perf_counter() - self._start

    def samples_per_second(self) -> float | None:
        """Training images of the current task per second of training; ``None`` before any training."""
        train = self.seconds["train"]
        return self.images_trained / train if train and self.images_trained else None

    def report(self, **more: Any) -> dict[str, Any]:
        """Content of ``cost.json``."""
        import torch

        return {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "seconds_total": round(self.total_seconds, 3),
            "samples_per_second": self.samples_per_second(),
            "updates": self.updates,
            "images_trained": self.images_trained,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            **more,
        }


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far; Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
