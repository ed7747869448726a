"""A-GEM (Chaudhry et al., ICLR 2019): no step against the gradient of a draw from the memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.strategies.base import Step
from cl_platform.strategies.reference import ReferenceConfig, ReferenceGradients
from cl_platform.strategies.replay import ReplayConfig

TINY = 1e-12


@dataclass(frozen=True)
class AGEMConfig(ReferenceConfig, ReplayConfig):
    """Keys of ``agem``."""

    exclude_current: bool = setting(True, doc="never draw examples of the task being trained")


@strategies.register("agem")
class AGEM(ReferenceGradients):
    """Where the step's gradient and that of one draw of remembered images disagree, the part against it is removed.

    One constraint for all old tasks together: a single task's loss may still rise. What is promised holds for the
    gradient, not for what momentum, Adam or weight decay make of it. The constraint starts with the second task.
    """

    name = "agem"
    Config = AGEMConfig
    leaks = frozenset({"L-01", "L-10"})

    def after_backward(self, step: Step) -> None:
        """Project the gradient of all losses together."""
        replayed = self.draw() if self._past else None
        if replayed is None:
            return
        parameters = self.moving()
        project([p.grad for p in parameters], self.reference(step, replayed, parameters))  # type: ignore[misc]


@torch.no_grad()
def project(gradients: Sequence[Tensor], references: Sequence[Tensor | None]) -> None:
    """``g - min(g.r, 0) / (r.r + 1e-12) r`` in place; not a bit changes where ``g.r >= 0``. The host reads nothing.

    Args:
        gradients: the parts of g.
        references: the parts of r; ``None`` stands for zeros.
    """
    pairs = [(g, r) for g, r in zip(gradients, references, strict=True) if r is not None]
    if not pairs:
        return
    dot = torch.stack([(g * r).sum(dtype=torch.float64) for g, r in pairs]).sum()
    square = torch.stack([r.square().sum(dtype=torch.float64) for _, r in pairs]).sum()
    factor = dot / (square + TINY)
    for gradient, reference in pairs:
        projected = gradient - factor.to(gradient.dtype) * reference
        gradient.copy_(torch.where(dot < 0, projected, gradient))
