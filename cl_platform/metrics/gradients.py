"""Metric 5.1: how large are the gradients that learn and those that protect, and do they agree?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined

GRADIENT_DEFINITIONS: tuple[Definition, ...] = (
    Definition("5.1", "grad_plasticity_norm", "Length of the gradient of the current batch's loss.", "norm", "up"),
    Definition("5.1", "grad_stability_norm", "Length of the gradient of the terms that protect.", "norm", "up"),
    Definition("5.1", "grad_cos", "Cosine of the angle between the two.", "cosine", "up"),
)


@dataclass(frozen=True)
class Decomposition:
    """The two gradients of one step.

    Attributes:
        plasticity_norm: L2 norm of the gradient of what is learnt now.
        stability_norm: L2 norm of the gradient of what protects earlier tasks.
        cosine: in [-1, 1], undefined (``zero_norm``) where one of them is zero.
    """

    plasticity_norm: float
    stability_norm: float
    cosine: Outcome


def decompose(plasticity: Sequence[Tensor | None], stability: Sequence[Tensor | None]) -> Decomposition:
    """Norms and cosine of two gradients, each a tensor per parameter, ``None`` counting as zero; sums in float64.

    Raises:
        ValueError: lists of different lengths.
    """
    first, second, product = 0.0, 0.0, 0.0
    for one, other in zip(plasticity, stability, strict=True):
        p = None if one is None else one.detach().double()
        s = None if other is None else other.detach().double()
        first += 0.0 if p is None else float(torch.sum(p * p))
        second += 0.0 if s is None else float(torch.sum(s * s))
        product += 0.0 if p is None or s is None else float(torch.sum(p * s))
    norms = math.sqrt(first), math.sqrt(second)
    if min(norms) == 0.0:
        return Decomposition(*norms, Undefined("zero_norm"))
    return Decomposition(*norms, Result(max(-1.0, min(1.0, product / (norms[0] * norms[1])))))
