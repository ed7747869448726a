"""Exemplars whose mean stays close to the mean of their class (Rebuffi et al., CVPR 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_platform.errors import UserError
from cl_platform.memory.grouping import occurrence
from cl_platform.memory.policies import Contents, Decision, Offers, Policy
from cl_platform.memory.uniforms import Ints


def herding_order(features: NDArray[Any], count: int) -> Ints:
    """The examples in the order in which herding picks them.

    Pick ``k`` minimises ``|mu - (f + sum of the picks before) / k|`` over the examples not picked yet, with features
    of unit length: ``argmax f . w`` for ``w = mu``, then ``w + mu - f_pick``. The published code may pick an
    example twice and then updates ``w`` all the same; here picked ones are left out first.

    Args:
        features: (n, D); brought to unit length here. Ties go to the earlier row.
        count: how many to pick; all if there are fewer.

    Returns:
        (min(n, count),) int64 rows.
    """
    values = np.ascontiguousarray(features, dtype=np.float64)
    values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    mean = values.mean(axis=0)
    direction, free = mean.copy(), np.ones(len(values), dtype=np.bool_)
    picks = np.empty(min(count, len(values)), dtype=np.int64)
    for k in range(len(picks)):
        scores = np.einsum("nd,d->n", values, direction)  # row by row: equal rows tie exactly
        picks[k] = np.argmax(np.where(free, scores, -np.inf))
        free[picks[k]] = False
        direction += mean - values[picks[k]]
    return picks


class Herding(Policy):
    """``capacity // classes`` exemplars of each class in herding order, chosen when a task ends.

    Older classes are cut to their first ones, which are what herding would have chosen. A class that returns in
    another task counts once more, so that no task's exemplars depend on another task's images.
    """

    name = "herding"
    when = "task_end"
    needs_features = True

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)

    def decide(self, offers: Offers, contents: Contents) -> Decision:
        """See :class:`Policy`. ``offers`` is a whole task with the features of its images in evaluation mode."""
        if offers.features is None or len(offers.features) != len(offers):
            raise ValueError("herding needs one feature vector for each offered example")
        self._count(offers)
        groups = len(self.ledger.counts)
        count = self.capacity // groups
        if count == 0:
            allowed = f"holds no exemplar for each of {groups} classes"
            raise UserError("buffer.size", self.capacity, allowed, f"Set buffer.size to at least {groups}")
        old, new = _codes(contents.labels, contents.task_ids), _codes(offers.labels, offers.task_ids)
        keep = np.flatnonzero((occurrence(old) < count) & ~np.isin(old, new))
        picks = []
        for code in np.unique(new):
            members = np.flatnonzero(new == code)
            members = members[np.argsort(offers.example_ids[members], kind="stable")]
            picks.append(members[herding_order(offers.features[members], count)])
        sources = np.concatenate(picks)
        slots = np.arange(len(keep), len(keep) + len(sources))
        return Decision(slots, sources, keep if len(keep) < len(contents) else None)


def _codes(labels: Ints, task_ids: Ints) -> Ints:
    return task_ids * 2**31 + labels
