"""The only place where seeds are made: every random stream is keyed by (run seed, task id, purpose).

Nothing that is learnt may draw from a global generator, so that a run that never saw a task draws the same numbers
for its other tasks. Code that can only draw from the global generators (dropout, initialisers of other libraries)
runs inside :func:`seeded_globals`.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

RUN_LEVEL = -1
"""The task id of draws that belong to the run as a whole (class order, fixed projections)."""


def stream_seed(run_seed: int, task_id: int, purpose: str, *index: int) -> int:
    """Seed of one stream: 63 bits of a SHA-256 over all parts of its key.

    Args:
        run_seed: the run's ``seed``.
        task_id: the task whose data or parts the draw serves, or ``RUN_LEVEL``.
        purpose: what is drawn, for example ``shuffle``.
        index: further counters, such as the epoch.
    """
    key = b"cl_platform/rng/1\0" + struct.pack("<q", run_seed) + struct.pack("<i", task_id)
    key += purpose.encode() + b"\0" + b"".join(struct.pack("<q", i) for i in index)
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") & (2**63 - 1)


def stream(run_seed: int, task_id: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU ``torch.Generator`` of its own for the given key (see :func:`stream_seed`)."""
    generator = torch.Generator()
    generator.manual_seed(stream_seed(run_seed, task_id, purpose, *index))
    return generator


@contextmanager
def seeded_globals(run_seed: int, task_id: int, purpose: str, *index: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and ``random`` inside the block; restore them after it."""
    seed = stream_seed(run_seed, task_id, purpose, *index)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
