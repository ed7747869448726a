"""SalUn (Fan et al., ICLR 2024, "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_platform.config import setting
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod, TrainingConfig
from cl_platform.unlearning.approximate.random_label import relabel
from cl_platform.unlearning.approximate.work import Work


@dataclass(frozen=True)
class SalUnConfig(TrainingConfig):
    """Keys of ``salun``."""

    lr: float = setting(0.013, doc="learning rate", above=0)
    q: float = setting(0.5, doc="share of all numbers, the most salient ones, that may change", above=0, max=1)


def saliency(work: Work, size: int) -> dict[str, Tensor]:
    """``|sum over batches of the gradient of the mean cross-entropy|`` on the images to forget, by parameter.

    The weights stay where they are during the pass; the released code takes an optimizer step after each batch of it.
    """
    total = {name: torch.zeros_like(parameter) for name, parameter in work.parameters.items()}
    for batch in work.shuffled("saliency", work.forget, 0, size):
        slopes = torch.autograd.grad(work.cross_entropy(batch), list(work.parameters.values()), allow_unused=True)
        for name, slope in zip(total, slopes, strict=True):
            if slope is not None:
                total[name] += slope
    return {name: values.abs() for name, values in total.items()}


def top_share(values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of the largest ``share`` of all entries together, not tensor by tensor; of equal ones the first."""
    flat = torch.cat([tensor.flatten() for tensor in values.values()])
    count = int(share * len(flat))
    mask = torch.zeros_like(flat, dtype=torch.bool)
    if count:
        bound = flat.kthvalue(len(flat) - count + 1).values
        above, level = flat > bound, flat == bound
        mask = above | (level & (level.cumsum(0) <= count - above.sum()))
    parts = mask.split([tensor.numel() for tensor in values.values()])
    return {name: part.view(values[name].shape) for name, part in zip(values, parts, strict=True)}


@unlearning_methods.register("salun")
class SalUn(ApproximateMethod):
    """Random labels that move only the numbers to which the images to forget matter most.

    All others keep their bits: weight decay and momentum would move them even without a gradient.
    """

    name = "salun"
    Config = SalUnConfig
    needs_retain = True

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Measure, mask, train for all epochs."""
        config: SalUnConfig = self.config
        mask = top_share(saliency(work, config.batch_size), config.q)
        salient = sum(int(moves.sum()) for moves in mask.values())
        return {**relabel(work, config, mask), "salient": salient}
