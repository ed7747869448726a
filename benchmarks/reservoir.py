"""How fast a reservoir decides, and apart from it how long the accepted images take to copy.

    python benchmarks/reservoir.py [--offers 1000000] [--slots 5120]

``blocks``: one call for all offers. ``batches``: a call of ``take`` per batch, from blocks computed ahead.
``decide``: the same with the counts by class and task that a buffer keeps. Copies are those of ``ReplayBuffer.write``
with images of 3 x 32 x 32 uint8. Times are CPU seconds of the process; of decisions the best of three repeats.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.memory.policies import Contents, Offers, Reservoir, last_writes

SHAPE = (3, 32, 32)


def best_cpu(call: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def in_blocks(slots: int, offers: int) -> None:
    last_writes(Reservoir(slots, 1).take(offers))


def in_batches(slots: int, offers: int, batch: int) -> None:
    policy = Reservoir(slots, 1)
    for _ in range(offers // batch):
        last_writes(policy.take(batch))


def with_counts(slots: int, offers: int, batch: int) -> None:
    policy, nothing = Reservoir(slots, 1), np.empty(0, dtype=np.int64)
    contents, labels = Contents(nothing, nothing, nothing), np.arange(batch) % 10
    offered = Offers(labels, np.zeros(batch, dtype=np.int64), np.arange(batch))
    for _ in range(offers // batch):
        policy.decide(offered, contents)


def copies(slots: int, offers: int, batch: int) -> tuple[float, int]:
    """CPU seconds inside ``write`` alone, and the rows written."""
    buffer = ReplayBuffer(Reservoir(slots, 1))
    buffer.allocate(SHAPE)
    images = torch.zeros(batch, *SHAPE, dtype=torch.uint8)
    seconds, written = 0.0, 0
    for k in range(offers // batch):
        offered = Offers.of(np.arange(batch) % 10, np.zeros(batch), np.arange(k * batch, (k + 1) * batch))
        decision = buffer.decide(offered)
        start = time.process_time()
        buffer.write(decision, offered, images[torch.from_numpy(decision.sources)], k)
        seconds += time.process_time() - start
        written += len(decision.slots)
    return seconds, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--offers", type=int, default=1_000_000)
    parser.add_argument("--slots", type=int, default=5120)
    options = parser.parse_args()
    torch.set_num_threads(1)
    slots, few = options.slots, max(options.offers // 10, 1)
    print(f"command: python {' '.join(sys.argv)}")
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, torch {torch.__version__}")
    seconds = best_cpu(lambda: in_blocks(slots, options.offers))
    print(f"{'blocks':24s} {options.offers / seconds / 1e6:8.2f} M decisions/s")
    for batch in (10, 32, 128):
        seconds = best_cpu(lambda: in_batches(slots, few, batch))  # noqa: B023
        print(f"{f'batches of {batch}':24s} {few / seconds / 1e6:8.2f} M decisions/s")
    for batch in (10, 32, 128):
        seconds = best_cpu(lambda: with_counts(slots, few, batch))  # noqa: B023
        print(f"{f'decide, batches of {batch}':24s} {few / seconds / 1e6:8.2f} M decisions/s")
    for batch in (10, 32, 128):
        seconds, written = copies(slots, few, batch)
        per_batch = seconds / (few // batch) * 1e6
        print(
            f"{f'copies, batches of {batch}':24s} {per_batch:8.1f} us a batch, {seconds / written * 1e6:.1f} us a row, "
            f"{written} of {few} rows written"
        )


if __name__ == "__main__":
    main()
