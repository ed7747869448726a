"""Gradient difference (NegGrad+; Kurmanji et al., NeurIPS 2023): descend on what stays, ascend on what goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cl_platform.config import setting
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod, TrainingConfig
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work


@dataclass(frozen=True)
class GradDiffConfig(TrainingConfig):
    """Keys of ``grad_diff``."""

    epochs: int = setting(5, doc="passes over the images to retain", min=1)
    w: float = setting(0.95, doc="weight of the retained images' loss, 1 - w of the ascent", min=0, max=1)


@unlearning_methods.register("grad_diff")
class GradDiff(ApproximateMethod):
    """``w CE(retain) - (1 - w) CE(forget)``, one batch of each per update.

    An epoch passes over the images to retain; those to forget are repeated beside them, from their start anew in each
    epoch. The value that published code passes by default is shared with other methods and would mean mostly ascent.
    """

    name = "grad_diff"
    Config = GradDiffConfig
    needs_retain = True

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Train for all epochs."""
        config: GradDiffConfig = self.config
        assert work.retain is not None
        updates = Updates(work, config)
        for epoch in range(config.epochs):
            forget = work.cycled("forget", work.forget, epoch, config.batch_size)
            for kept in work.shuffled("retain", work.retain, epoch, config.batch_size):
                descent = work.cross_entropy(kept, retained=True)
                updates.step(config.w * descent - (1 - config.w) * work.cross_entropy(next(forget)))
            updates.end_epoch()
        return {"epochs": config.epochs, "forget_accuracy": work.forget_accuracy()}
