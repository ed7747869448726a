"""Boundary shrink (Chen et al., CVPR 2023, "Boundary Unlearning"): hand what goes over to its nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod, TrainingConfig
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work

LEVELS = 255
"""Grey levels of stored images: an attacked image is rounded to them."""


@dataclass(frozen=True)
class BoundaryConfig(TrainingConfig):
    """Keys that both boundary methods have."""

    lr: float = setting(1e-5, doc="learning rate", above=0)
    epochs: int = setting(10, doc="passes over the images to forget", min=1)
    batch_size: int = setting(64, doc="images of a batch", min=1)
    weight_decay: float = setting(0.0, doc="decay of all that is trained", min=0)


@dataclass(frozen=True)
class BoundaryShrinkConfig(BoundaryConfig):
    """Keys of ``boundary_shrink``."""

    epsilon: float = setting(0.1, doc="step of the attack in units of the pixels' range 0..1", above=0)


def attacked(original: Work, batch: Batch, normalised: Tensor, epsilon: float) -> Batch:
    """Images one step further along the sign of the loss's gradient, in pixels within 0..1, rounded to grey levels.

    Args:
        original: the learner before it forgets.
        batch: labels of the images.
        normalised: (B, 3, S, S), the images as the network takes them.
        epsilon: length of the step in pixels; normalisation is undone before it and applied after it.
    """
    trunk = original.learner.backbone
    mean, std = (torch.tensor(three, device=normalised.device).view(1, 3, 1, 1) for three in (trunk.mean, trunk.std))
    images = normalised.detach().requires_grad_()
    loss = original.cross_entropy(original.seen_as(images, batch))
    (slope,) = torch.autograd.grad(loss, images)
    with torch.no_grad():
        pixels = (images * std + mean + epsilon * slope.sign()).clamp(0, 1)  # std is above 0: the sign is the pixels'
        pixels = (pixels * LEVELS).round() / LEVELS
        return original.seen_as((pixels - mean) / std, batch)


@torch.no_grad()
def neighbours(original: Work, batch: Batch) -> Tensor:
    """Columns (B,) that the original prefers for attacked images among those that remain.

    An attack may fail; the preferred class would then be the very one that has to go.
    """
    logits = original.logits(batch)
    return logits.masked_fill(~original.classes.others(batch.labels), float("-inf")).argmax(1)


@unlearning_methods.register("boundary_shrink")
class BoundaryShrink(ApproximateMethod):
    """Trains each image to forget to be answered as the original answers it just beyond the nearest boundary.

    The attack is made in pixel space. In the released code it undoes another normalisation than was applied, which
    makes its step about two and a half times as long as meant.
    """

    name = "boundary_shrink"
    Config = BoundaryShrinkConfig

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Attack the original, train the copy."""
        config: BoundaryShrinkConfig = self.config
        original, updates = work.frozen(), Updates(work, config)
        for epoch in range(config.epochs):
            for batch in work.shuffled("forget", work.forget, epoch, config.batch_size):
                images = batch.images
                if images.dim() == 2:  # the learner reads kept features, the attack needs what they were made from
                    images = work.view(work.forget, batch.extra["row"].cpu())
                beyond = attacked(original, batch, images, config.epsilon)
                updates.step(work.cross_entropy(batch, neighbours(original, beyond)))
            updates.end_epoch()
        return {"epochs": config.epochs, "forget_accuracy": work.forget_accuracy()}
