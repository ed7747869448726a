"""Feature distillation: features stay where the learner before the task had them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.registry import strategies
from cl_platform.strategies.base import Needs, Pass, Step, Strategy

LOSSES = ("mfro", "mse", "cosine")


@dataclass(frozen=True)
class FeatureDistillationConfig:
    """Keys of ``feature_distillation``."""

    alpha: float = setting(1.0, doc="weight of the distance", min=0)
    loss: str = setting("mfro", doc="distance of new and old features", choices=LOSSES)
    on: str | None = setting(
        None, doc="rows compared; null: current without a buffer, else both", choices=("current", "replay", "both")
    )


def feature_distance(new: Tensor, old: Tensor, loss: str = "mfro") -> Tensor:
    """Distance between features (B, D), in float32 at least; its gradient is finite where they are equal.

    Args:
        new: the learner's.
        old: the teacher's.
        loss: ``mfro``: mean over rows of ``|new - old|_2 / sqrt(D)``, not squared; ``mse``: mean over all entries of
            the squared difference; ``cosine``: 1 - mean over rows of the cosine.
    """
    new, old = (h.to(torch.promote_types(h.dtype, torch.float32)) for h in (new, old))
    if loss == "mse":
        return F.mse_loss(new, old)
    if loss == "cosine":
        return 1.0 - F.cosine_similarity(new, old, dim=1).mean()
    return torch.linalg.vector_norm(new - old, dim=1).mean() / new.shape[1] ** 0.5


@strategies.register("feature_distillation")
class FeatureDistillation(Strategy):
    """Adds ``alpha * D(h(x), h_old(x))``, with ``h`` the features before the head and ``h_old`` the teacher's.

    The teacher is the learner at the end of the task before, in eval mode, on the same augmented view. With replay,
    the rows of every pass of the step are compared, in one mean. No gradient of this term reaches the head.
    """

    name = "feature_distillation"
    Config = FeatureDistillationConfig
    leaks = frozenset({"L-01", "L-04", "L-14"})
    needs = Needs(teacher=True)
    stability = frozenset({"kd"})

    def __init__(self, config: FeatureDistillationConfig) -> None:
        super().__init__(config)
        self.needs = Needs(teacher=True, buffer=config.on == "replay")  # type: ignore[misc]

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The distance, from the second task on.

        Raises:
            UserError: the features are frozen, so that they cannot move.
        """
        teacher = self.context.teacher
        if teacher is None or not teacher.ready or not self.config.alpha:
            return {}
        if not step.features.requires_grad:
            raise UserError(
                "strategy", self.name, "the features are frozen in this run and cannot move",
                "Leave it out, or train the backbone",
            )  # fmt: skip
        compared = [chosen for chosen in self._compared(step) if len(chosen.batch)]
        if not compared:
            return {}
        new = torch.cat([chosen.features for chosen in compared])
        old = torch.cat([teacher(chosen.batch).features for chosen in compared])
        return {"kd": self.config.alpha * feature_distance(new, old, self.config.loss)}

    def _compared(self, step: Step) -> list[Pass]:
        """The passes of the step, cut to the rows in question; all but the first hold replayed rows alone."""
        first, *replayed = step.passes
        if self.config.on == "current":
            return [first.rows(0, step.current)]
        if self.config.on == "replay":
            return [first.rows(step.current, len(first.batch)), *replayed]
        return step.passes
