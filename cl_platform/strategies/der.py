"""Dark experience replay (Buzzega et al., NeurIPS 2020): remembered logits are matched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.strategies.base import Needs, Step
from cl_platform.strategies.replay import Replay, ReplayConfig


@dataclass(frozen=True)
class DERConfig(ReplayConfig):
    """Keys of ``der``."""

    insert: str = setting(
        "every_epoch", doc="offer an example once, or in every epoch", choices=("first_epoch", "every_epoch")
    )
    alpha: float = setting(0.3, doc="weight of the matched logits", min=0)


@strategies.register("der")
class DER(Replay):
    """The cross-entropy of the current batch plus ``alpha`` times the squared distance to stored logits.

    Stored are the raw logits of the training-mode forward pass of the step in which the example came, before that
    step's update; they are matched on a new augmentation. Columns of classes that came later are left out of the sum,
    while the mean still divides by all current columns.
    """

    name = "der"
    Config = DERConfig
    needs = Needs(boundaries=False)
    stores_logits = True
    stability = frozenset({"logits"})

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The distance on one draw."""
        replayed = self.draw()
        if replayed is None or self.config.alpha == 0:
            return {}
        replayed = self.context.targets(replayed)
        logits = step.forward(replayed).logits
        return {"logits": self.config.alpha * logit_distance(logits, replayed.extra["stored"], replayed.extra["known"])}


def logit_distance(logits: Tensor, stored: Tensor, known: Tensor) -> Tensor:
    """Mean over the entries (b, S) of the squared difference; an entry that was not stored counts as zero."""
    return torch.where(known, logits.float() - stored, 0.0).square().mean()
