"""Gradient ascent (NegGrad; Golatkar et al., CVPR 2020, as in the Unlearn-Sparse code): learning, backwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cl_platform.config import setting
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod, TrainingConfig
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work


@dataclass(frozen=True)
class GradAscentConfig(TrainingConfig):
    """Keys of ``grad_ascent``."""

    lr: float = setting(1e-4, doc="learning rate", above=0)
    epochs: int = setting(5, doc="passes over the images to forget, at most", min=1)
    clip: float | None = setting(1.0, doc="largest norm of the gradient; null: any", above=0)


@unlearning_methods.register("grad_ascent")
class GradAscent(ApproximateMethod):
    """Ascends the cross-entropy on the images to forget.

    The objective has no lower bound: left alone it diverges, and kept tasks go first where layers are shared. So the
    gradient is clipped, and the ascent ends once accuracy on these images has come down to chance.
    """

    name = "grad_ascent"
    Config = GradAscentConfig

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Ascend until chance or until the epochs are over."""
        config: GradAscentConfig = self.config
        updates = Updates(work, config, clip=config.clip)
        accuracy, epochs = work.forget_accuracy(), 0
        while accuracy > work.classes.chance and epochs < config.epochs:
            for batch in work.shuffled("forget", work.forget, epochs, config.batch_size):
                updates.step(-work.cross_entropy(batch))
            updates.end_epoch()
            accuracy, epochs = work.forget_accuracy(), epochs + 1
        return {"epochs": epochs, "forget_accuracy": accuracy, "chance": work.classes.chance}
