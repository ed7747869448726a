"""Random labels (amnesiac unlearning; Graves et al., AAAI 2021, and the SalUn code): relearn with wrong answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod, TrainingConfig
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work


@dataclass(frozen=True)
class RandomLabelConfig(TrainingConfig):
    """Keys of ``random_label``."""


def drawn_labels(work: Work, epoch: int) -> Tensor:
    """Columns (n,) drawn uniformly for the images to forget: never their own class, never one that does not remain."""
    allowed = work.classes.others(work.forget.images.labels.to(work.device)).float().cpu()
    return torch.multinomial(allowed, 1, generator=work.stream("labels", epoch))[:, 0].to(work.device)


def relabel(work: Work, config: TrainingConfig, mask: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Train on all images in one shuffled mixture, those to forget under labels drawn anew in each epoch.

    Args:
        work: whose images.
        config: the training.
        mask: see :class:`Updates`.
    """
    assert work.retain is not None
    updates, count = Updates(work, config, mask=mask), len(work.forget)
    mixture = work.joined([work.forget, work.retain])
    for epoch in range(config.epochs):
        labels = drawn_labels(work, epoch)
        for batch in work.shuffled("mixture", mixture, epoch, config.batch_size):
            rows, columns = batch.extra["row"], work.classes.columns(batch.labels)
            columns = torch.where(rows < count, labels[rows.clamp_max(count - 1)], columns)
            updates.step(work.cross_entropy(batch, columns))
        updates.end_epoch()
    return {"epochs": config.epochs, "forget_accuracy": work.forget_accuracy()}


@unlearning_methods.register("random_label")
class RandomLabel(ApproximateMethod):
    """Cross-entropy on retained images, and on those to forget under random labels.

    The released code draws over all classes, the true one included; a whole task is to go here, so labels come from
    the classes that remain.
    """

    name = "random_label"
    Config = RandomLabelConfig
    needs_retain = True

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Train for all epochs."""
        return relabel(work, self.config)
