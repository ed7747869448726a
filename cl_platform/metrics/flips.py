"""Metrics 5.2: images whose answer turned between two evaluations; few net losses can hide many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cl_platform.metrics.confusion import class_ids
from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined

FLIP_DEFINITIONS: tuple[Definition, ...] = (
    Definition("5.2", "negative_flip_rate", "Images right before and wrong after.", "fraction", "down"),
    Definition("5.2", "positive_flip_rate", "Images wrong before and right after.", "fraction", "up"),
    Definition("5.2", "churn", "Images answered differently before and after.", "fraction", "down"),
)


@dataclass(frozen=True)
class Flips:
    """Counts over the same images in two evaluations; counts of disjoint images add up with ``+``.

    Attributes:
        negative: right before, wrong after.
        positive: wrong before, right after.
        changed: another answer, right or not.
        total: images.

    Raises:
        ValueError: counts that no two evaluations can have.
    """

    negative: int = 0
    positive: int = 0
    changed: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        parts = min(self.negative, self.positive)
        if parts < 0 or not self.negative + self.positive <= self.changed <= self.total:
            raise ValueError(f"{self} contradicts itself")

    def __add__(self, other: Flips) -> Flips:
        return Flips(
            self.negative + other.negative,
            self.positive + other.positive,
            self.changed + other.changed,
            self.total + other.total,
        )

    @classmethod
    def between(
        cls,
        before: Tensor | Sequence[int],
        after: Tensor | Sequence[int],
        labels: Tensor | Sequence[int],
    ) -> Flips:
        """Compare the predicted class ids of two evaluations with the labels, each (N,) and of the same images.

        Raises:
            ValueError: lengths that differ, or ids that are not integers.
        """
        u, v = class_ids(before, "predictions before"), class_ids(after, "predictions after")
        truth = class_ids(labels, "labels")
        if not len(u) == len(v) == len(truth):
            raise ValueError(f"{len(u)} and {len(v)} predictions for {len(truth)} labels")
        was, now = u == truth, v == truth  # (N,)
        return cls(int((was & ~now).sum()), int((~was & now).sum()), int((u != v).sum()), len(truth))


def negative_flip_rate(flips: Flips) -> Outcome:
    """5.2, [0, 1]: share of the images that were right before and are wrong after."""
    return _share(flips.negative, flips.total)


def positive_flip_rate(flips: Flips) -> Outcome:
    """5.2, [0, 1]: share of the images that were wrong before and are right after."""
    return _share(flips.positive, flips.total)


def churn(flips: Flips) -> Outcome:
    """5.2, [0, 1]: share of the images with another answer, whether right or not."""
    return _share(flips.changed, flips.total)


def _share(count: int, total: int) -> Outcome:
    return Result(count / total) if total else Undefined("empty")
