"""Metric 5.3: does the confidence of an answer say how often such answers are right? (Guo et al. 2017, ECE)"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined

BINS = 15

CALIBRATION_DEFINITIONS: tuple[Definition, ...] = (
    Definition("5.3", f"ece_{BINS}", "Distance of confidence and accuracy, mean over images.", "fraction", "down"),
    Definition("5.3", "overconfidence", "Mean confidence minus accuracy, with its sign.", "fraction", "down"),
)


@dataclass
class BinCounts:
    """What calibration is computed from: images by confidence, in equal bins ``[lo, hi)``; those at 1 have their own.

    Each list has one entry per bin and one more for a confidence of exactly 1. Made by :meth:`empty`.

    Attributes:
        counts: images.
        confidence: their confidences summed, in float64.
        right: right answers among them.

    Raises:
        ValueError: lists of different lengths, or counts outside 0 <= right <= images.
    """

    counts: list[int]
    confidence: list[float]
    right: list[int]

    def __post_init__(self) -> None:
        if not 2 <= len(self.counts) == len(self.confidence) == len(self.right):
            raise ValueError("the lists of a calibration count do not have one length of at least 2")
        if not all(0 <= c <= n for c, n in zip(self.right, self.counts, strict=True)):
            raise ValueError(f"right answers {self.right} of images {self.counts}")
        if not all(math.isfinite(c) for c in self.confidence):
            raise ValueError("a sum of confidences is not finite")

    @classmethod
    def empty(cls, bins: int = BINS) -> BinCounts:
        """No image yet.

        Raises:
            ValueError: less than one bin.
        """
        return cls([0] * (bins + 1), [0.0] * (bins + 1), [0] * (bins + 1))

    @property
    def bins(self) -> int:
        """Number of equal bins between 0 and 1."""
        return len(self.counts) - 1

    @property
    def total(self) -> int:
        """Number of images."""
        return sum(self.counts)

    def add(self, confidence: Tensor, right: Tensor) -> None:
        """Count a batch.

        Args:
            confidence: probability of the answer (B,), in [0, 1]; binned in float32.
            right: whether the answer is right (B,), bool or 0 and 1.

        Raises:
            ValueError: shapes that differ, a confidence outside [0, 1] or NaN, a ``right`` that is neither 0 nor 1.
        """
        if confidence.dim() != 1 or confidence.shape != right.shape:
            raise ValueError(f"confidences {tuple(confidence.shape)} for answers {tuple(right.shape)}")
        values = confidence.detach().to("cpu", torch.float32)  # (B,)
        hits = right.detach().cpu()
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError("a confidence is not within 0 and 1")
        if not bool(((hits == 0) | (hits == 1)).all()):
            raise ValueError("right must be 0 or 1")
        edges = torch.linspace(0, 1, self.bins + 1)  # float32: the values on an edge are the same in every precision
        places = torch.bucketize(values, edges, right=True) - 1  # (B,)
        size = self.bins + 1
        counts = torch.bincount(places, minlength=size).tolist()
        sums = torch.bincount(places, weights=values.double(), minlength=size).tolist()
        hit = torch.bincount(places[hits.bool()], minlength=size).tolist()
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.confidence = [a + b for a, b in zip(self.confidence, sums, strict=True)]
        self.right = [a + b for a, b in zip(self.right, hit, strict=True)]

    def merge(self, other: BinCounts) -> None:
        """Count the images of another object as well.

        Raises:
            ValueError: another number of bins.
        """
        if other.bins != self.bins:
            raise ValueError(f"{other.bins} bins cannot be added to {self.bins}")
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.confidence = [a + b for a, b in zip(self.confidence, other.confidence, strict=True)]
        self.right = [a + b for a, b in zip(self.right, other.right, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON; :meth:`from_dict` restores an equal object."""
        return {"counts": list(self.counts), "confidence": list(self.confidence), "right": list(self.right)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> BinCounts:
        """What :meth:`to_dict` wrote, also after a trip through JSON.

        Raises:
            ValueError: see the class.
            KeyError: a part is missing.
        """
        return cls(
            [int(n) for n in state["counts"]],
            [float(c) for c in state["confidence"]],
            [int(n) for n in state["right"]],
        )


def confidences(logits: Tensor) -> Tensor:
    """Probability of the most probable class (B,), float32, from logits (B, C); classes out of choice are ``-inf``."""
    probabilities: Tensor = logits.detach().float().softmax(dim=-1)
    return probabilities.amax(dim=-1)


def ece(bins: BinCounts) -> Outcome:
    """5.3, [0, 1]: expected calibration error, ``sum_b n_b / n * |accuracy_b - mean confidence_b|``."""
    if not bins.total:
        return Undefined("empty")
    # n_b cancels: a bin's share times its two means are the sums themselves
    gaps = [abs(right - sure) for right, sure in zip(bins.right, bins.confidence, strict=True)]
    return Result(math.fsum(gaps) / bins.total)


def overconfidence(bins: BinCounts) -> Outcome:
    """5.3, [-1, 1]: mean confidence minus accuracy; below 0 the answers are better than they claim."""
    if not bins.total:
        return Undefined("empty")
    return Result((math.fsum(bins.confidence) - sum(bins.right)) / bins.total)
