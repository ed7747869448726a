"""DER++ (Buzzega et al., NeurIPS 2020): remembered logits are matched, and remembered labels learnt again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cl_platform.config import setting
from cl_platform.heads import cross_entropy
from cl_platform.registry import strategies
from cl_platform.strategies.base import Step
from cl_platform.strategies.der import DER, DERConfig


@dataclass(frozen=True)
class DERPPConfig(DERConfig):
    """Keys of ``derpp``."""

    alpha: float = setting(0.1, doc="weight of the matched logits", min=0)
    beta: float = setting(0.5, doc="weight of the replayed labels", min=0)


@strategies.register("derpp")
class DERPP(DER):
    """DER, plus ``beta`` times the cross-entropy of a second, independent draw, which has a forward pass of its own."""

    name = "derpp"
    Config = DERPPConfig
    stability = frozenset({"logits", "labels"})
    rehearses = frozenset({"logits", "labels"})

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Both terms, each on a draw of its own."""
        terms = super().losses(step)
        replayed = self.draw() if self.config.beta > 0 else None
        if replayed is not None:
            logits = step.forward(replayed).logits
            terms["labels"] = self.config.beta * cross_entropy(logits, replayed.labels, step.seen_classes)
        return terms
