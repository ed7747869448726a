"""Experience replay: old images in every batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.strategies.base import Needs
from cl_platform.strategies.replay import Replay, ReplayConfig


@dataclass(frozen=True)
class ERConfig(ReplayConfig):
    """Keys of ``er``."""

    loss: str = setting("mean", doc="one mean over all rows, or mean(current) + weight * mean(replayed)",
                        choices=("mean", "sum"))  # fmt: skip
    weight: float = setting(1.0, doc="weight of the replayed mean, for loss=sum", min=0, only_with=("loss", ("sum",)))


@strategies.register("er")
class ER(Replay):
    """The cross-entropy of a batch runs over current and replayed images together, in one forward pass.

    Beside a strategy that owns the loss, its loss sees the replayed rows as well. ``loss=sum`` gives current and
    replayed images a mean each, as the code of the asymmetric cross-entropy paper does for its baseline.
    """

    name = "er"
    Config = ERConfig
    needs = Needs(boundaries=False)
    leaks = frozenset({"L-01", "L-05", "L-10"})
    rehearses = frozenset({"labels"})

    def widen(self, batch: Batch) -> Batch:
        """Append replayed rows."""
        replayed = self.draw()
        if replayed is None:
            return batch
        joined = batch.joined(replayed)
        if self.config.loss == "mean":
            return joined
        weights = torch.where(joined.is_replay, self.config.weight / len(replayed), 1.0 / len(batch))
        return joined.with_extra(weight=weights)
