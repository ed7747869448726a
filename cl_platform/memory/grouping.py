"""Ranks inside groups, shares between groups, and counts by class and task: integers on the host."""

from __future__ import annotations

import numpy as np

from cl_platform.memory.uniforms import Ints


def occurrence(groups: Ints) -> Ints:
    """How many earlier members of its group stand before each element; (n,) int64."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)])
    sizes = np.diff(np.r_[starts, len(ordered)])
    before = np.empty(len(groups), dtype=np.int64)
    before[order] = np.arange(len(groups)) - np.repeat(starts, sizes)
    return before


def shares(counts: Ints, total: int) -> Ints:
    """Divide ``total`` places among groups as evenly as their sizes allow, by water-filling.

    ``L`` is the largest integer with ``sum min(count, L) <= total``; each group gets ``min(count, L)``, and what is
    left goes one by one to groups with more than ``L``, in their order.

    Args:
        counts: (k,) int64 sizes, >= 0.
        total: places to give away.

    Returns:
        (k,) int64; all of ``counts`` where the total suffices.
    """
    if counts.sum() <= total:
        return counts.copy()
    ascending = np.sort(counts)
    below = np.cumsum(ascending) - ascending  # places that the smaller groups take whole
    levels = (total - below) // np.arange(len(counts), 0, -1)
    level = levels[np.argmax(ascending > levels)]
    given: Ints = np.minimum(counts, level)
    given[np.flatnonzero(counts > level)[: total - given.sum()]] += 1
    return given


class Ledger:
    """How many examples of each class and task were offered, in order of first appearance.

    Attributes:
        counts: examples by (class id, task id).
        total: their sum.
    """

    def __init__(self) -> None:
        self.counts: dict[tuple[int, int], int] = {}
        self.total = 0

    def add(self, labels: Ints, task_ids: Ints) -> Ints:
        """Count a batch.

        Args:
            labels: (n,) class ids.
            task_ids: (n,) task ids.

        Returns:
            (n,) the number of examples of the same class and task that were offered before each one.
        """
        before, counts = [], self.counts
        for pair in zip(labels.tolist(), task_ids.tolist(), strict=True):
            count = counts.get(pair, 0)
            before.append(count)
            counts[pair] = count + 1
        self.total += len(before)
        return np.array(before, dtype=np.int64)

    @property
    def classes(self) -> dict[int, int]:
        """Examples offered of each class, in order of first appearance."""
        return self._summed(0)

    @property
    def tasks(self) -> dict[int, int]:
        """Examples offered of each task, in order of first appearance."""
        return self._summed(1)

    def _summed(self, part: int) -> dict[int, int]:
        found: dict[int, int] = {}
        for pair, count in self.counts.items():
            found[pair[part]] = found.get(pair[part], 0) + count
        return found

    def drop_task(self, task_id: int) -> int:
        """Forget what a task offered; the number of its examples."""
        dropped = self.tasks.get(task_id, 0)
        self.counts = {pair: count for pair, count in self.counts.items() if pair[1] != task_id}
        self.total -= dropped
        return dropped

    def to_array(self) -> Ints:
        """(k, 3) int64: class id, task id, count."""
        rows = [(label, task, count) for (label, task), count in self.counts.items()]
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    def load_array(self, rows: Ints) -> None:
        """Take back what :meth:`to_array` gave."""
        self.counts = {(label, task): count for label, task, count in rows.tolist()}
        self.total = sum(self.counts.values())
