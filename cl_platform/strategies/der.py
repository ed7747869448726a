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
    columns: str = setting(
        "seen", doc="the mean divides by the seen columns, or by as many as the stream has classes",
        choices=("seen", "all"),
    )  # fmt: skip


@strategies.register("der")
class DER(Replay):
    """The cross-entropy of the current batch plus ``alpha`` times the squared distance to stored logits.

    Stored are the raw logits of the training-mode forward pass of the step in which the example came, before that
    step's update; they are matched on a new augmentation. Columns of classes that came later are left out of the sum,
    while the mean still divides by all current columns. The released code has a column for every class from the start
    and divides by that many: ``columns=all`` gives a published ``alpha`` its meaning.
    """

    name = "der"
    Config = DERConfig
    needs = Needs(boundaries=False)
    stores_logits = True
    leaks = frozenset({"L-01", "L-10", "L-11"})
    stability = frozenset({"logits"})
    rehearses = frozenset({"logits"})

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The distance on one draw."""
        rows = self.drawn()
        if rows is None or self.config.alpha == 0:
            return {}
        replayed = self.context.targets(self.ready(rows))
        logits = step.forward(replayed).logits
        width = self.context.declared[0] if self.config.columns == "all" else None
        distance = logit_distance(logits, replayed.extra["stored"], replayed.extra["known"], width)
        return {"logits": self.config.alpha * distance}


def logit_distance(logits: Tensor, stored: Tensor, known: Tensor, width: int | None = None) -> Tensor:
    """Mean over the entries (b, S) of the squared difference; an entry that was not stored counts as zero.

    Args:
        logits: (b, S).
        stored: (b, S).
        known: (b, S), which of them were stored.
        width: columns that the mean divides by; S by default.
    """
    squares = torch.where(known, logits.float() - stored, 0.0).square()
    return squares.mean() if width is None else squares.sum() / (len(squares) * width)
