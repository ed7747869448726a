"""Selective synaptic dampening (Foster et al., AAAI 2024): weaken weights that matter more to what goes than to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod
from cl_platform.unlearning.approximate.work import Pool, Work

ALPHA, ALPHA_VIT = 10.0, 5.0
"""Selection by default, at most; the released script halves it for vision transformers."""


@dataclass(frozen=True)
class SSDConfig:
    """Keys of ``ssd``."""

    alpha: float | None = setting(
        None, doc="how much more a weight must matter to what goes than to all; null: up to 10, ViT 5", min=0
    )
    lambda_: float = setting(1.0, doc="strength of the dampening; smaller is stronger", min=0)
    batch_size: int = setting(64, doc="images over which a gradient is averaged before it is squared", min=1)


def importance(work: Work, pools: Sequence[Pool], size: int) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient of the batch's mean cross-entropy, by parameter.

    Not the Fisher information of single images: it depends on the batches, which therefore have a fixed size and the
    order of the data, and hold images of one task each.
    """
    total = {name: torch.zeros_like(parameter) for name, parameter in work.parameters.items()}
    count = 0
    for pool in pools:
        for batch in work.ordered(pool, size):
            loss = work.cross_entropy(batch)
            slopes = torch.autograd.grad(loss, list(work.parameters.values()), allow_unused=True)
            for name, slope in zip(total, slopes, strict=True):
                if slope is not None:
                    total[name] += slope.square()
            count += 1
    return {name: values / count for name, values in total.items()}


def dampened(
    weight: Tensor, forget: Tensor, everything: Tensor, alpha: float, strength: float
) -> tuple[Tensor, Tensor]:
    """New weights, and which of them were selected: ``w min(strength I / I_f, 1)`` where ``I_f > alpha I``.

    Args:
        weight: w.
        forget: I_f, importances on the images to forget.
        everything: I, importances on all images, those to forget included.
        alpha: selection.
        strength: lambda.
    """
    selected = forget > alpha * everything
    divisor = torch.where(selected, forget, torch.ones_like(forget))  # above 0 wherever it is used
    factor = (strength * everything / divisor).clamp(max=1.0)
    return torch.where(selected, weight * factor, weight), selected


def selection(alpha: float | None, vit: bool, ratio: float) -> float:
    """The alpha in force.

    ``I`` is a mean over batches that those to forget are among, so ``I_f / I`` can be no more than ``ratio``. The
    published value was chosen for one class among twenty, half of what is possible there; one task among five would be
    left untouched by it. So the default is never more than half of what is possible.

    Args:
        alpha: as configured, ``None`` for the default.
        vit: whether the backbone is a vision transformer.
        ratio: number of all batches for each one to forget.

    Raises:
        UserError: no weight can be selected.
    """
    if alpha is None:
        return min(ALPHA_VIT if vit else ALPHA, ratio / 2)
    if alpha >= ratio:
        raise UserError(
            "unlearning.ssd.alpha", alpha,
            f"selects nothing: one of {ratio:.3g} batches is to be forgotten, and no weight can matter more to it",
            f"Set unlearning.ssd.alpha below {ratio:.3g}, or to null",
        )  # fmt: skip
    return alpha


@unlearning_methods.register("ssd")
class SSD(ApproximateMethod):
    """Two passes of gradients and one multiplication; nothing is trained."""

    name = "ssd"
    Config = SSDConfig
    needs_retain = True

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Measure and dampen."""
        config: SSDConfig = self.config
        pools = [work.forget, *work.pools.values()]
        going, *staying = (-(-len(pool) // config.batch_size) for pool in pools)
        alpha = selection(config.alpha, work.learner.backbone.kind == "vit", 1 + sum(staying) / going)
        forget = importance(work, [work.forget], config.batch_size)
        everything = importance(work, pools, config.batch_size)
        count = 0
        with torch.no_grad():
            for name, parameter in work.parameters.items():
                weight, selected = dampened(parameter, forget[name], everything[name], alpha, config.lambda_)
                parameter.copy_(weight)
                count += int(selected.sum())
        share = count / sum(p.numel() for p in work.parameters.values())
        return {"alpha": alpha, "dampened_share": share, "forget_accuracy": work.forget_accuracy()}
