"""Boundary expanding (Chen et al., CVPR 2023, "Boundary Unlearning"): a class of its own for all that goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod
from cl_platform.unlearning.approximate.boundary_shrink import BoundaryConfig
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work

ROW_STD = 0.02
"""Standard deviation of the new row, as of the head's own by default."""


@dataclass(frozen=True)
class BoundaryExpandConfig(BoundaryConfig):
    """Keys of ``boundary_expand``."""


@unlearning_methods.register("boundary_expand")
class BoundaryExpand(ApproximateMethod):
    """Gives the head one more row, trains all images to forget to go there, and takes the row away again.

    The row never becomes part of the learner, so none can be left behind. Where the head alone is trained, features
    stay as they are and little is forgotten: ``moves_features`` in the report says so.
    """

    name = "boundary_expand"
    Config = BoundaryExpandConfig

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Train with the row, and let it go."""
        config: BoundaryExpandConfig = self.config
        drawn = torch.empty(1, work.learner.head.feature_dim)
        nn.init.trunc_normal_(drawn, std=ROW_STD, generator=work.stream("row"))
        weight = nn.Parameter(drawn.to(work.device))
        bias = nn.Parameter(torch.zeros(1, device=work.device))
        updates = Updates(work, config, more=(weight, bias))
        new = len(work.classes.seen)
        for epoch in range(config.epochs):
            for batch in work.shuffled("forget", work.forget, epoch, config.batch_size):
                features, logits = work.outputs(batch)
                grown = torch.cat(
                    (work.classes.competing(logits, batch.labels), F.linear(features, weight, bias)), dim=1
                )
                updates.step(F.cross_entropy(grown, torch.full_like(batch.labels, new)))  # grown: (B, S + 1)
            updates.end_epoch()
        return {"epochs": config.epochs, "forget_accuracy": work.forget_accuracy()}
