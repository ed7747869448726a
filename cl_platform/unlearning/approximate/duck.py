"""DUCK (Cotogni et al. 2023, "DUCK: Distance-based Unlearning via Centroid Kinematics")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.finetuning import cosine_rate
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod, TrainingConfig
from cl_platform.unlearning.approximate.centroids import all_features, by_class, places, sampled_features, tied
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work

CENTROID_BATCHES = 50
"""Batches of retained images whose features make the centroids, at most."""

RELEASED_IMAGES, RELEASED_SHARE = 128, 0.1
"""``repair=released``: images of the first batch to forget that go on being moved, and the weight of that."""


@dataclass(frozen=True)
class DUCKConfig(TrainingConfig):
    """Keys of ``duck``."""

    lr: float = setting(4e-4, doc="learning rate", above=0)
    epochs: int = setting(50, doc="passes over the images to forget, at most", min=1)
    optimizer: str = setting("adam", doc="rule", choices=("sgd", "adam", "adamw"))
    weight_decay: float = setting(0.0, doc="decay of all that is trained", min=0)
    milestones: list[int] = setting(factory=lambda: [25, 40], doc="epochs at which the rate is halved")
    ratio: int = setting(5, doc="batches of retained images, and updates, for each batch to forget", min=1)
    forget_weight: float = setting(1.0, doc="lambda_1, weight of the distance to the centroids", min=0)
    retain_weight: float = setting(1.4, doc="lambda_2, weight of the cross-entropy on retained images", min=0)
    temperature: float = setting(2.0, doc="divides the retained images' logits", above=0)
    target: float = setting(0.01, doc="ends once accuracy on the images to forget is below", min=0, max=1)
    repair: str = setting("retain", doc="how it ends", choices=("retain", "released", "none"))
    repair_epochs: int = setting(2, doc="passes over the retained images at its end", min=0)
    repair_lr: float = setting(1e-4, doc="their learning rate", above=0)
    repair_batch_size: int = setting(512, doc="their batches", min=1)


def cosine_distances(features: Tensor, centroids: Tensor) -> Tensor:
    """``1 - cos`` (n, K) of features (n, D) and centroids (K, D)."""
    return 1 - F.normalize(features, dim=1) @ F.normalize(centroids, dim=1).T


@unlearning_methods.register("duck")
class DUCK(ApproximateMethod):
    """Pulls each image to forget towards the centroid of the nearest class that remains, beside the usual loss.

    Each image is tied once, before the first update, and the tie is kept by image. The released code keeps it by
    batch, which gives wrong ties to shuffled batches and, from the second epoch on, to others too, and compares the
    place of a centroid with a class id. Its repair stage keeps a tenth of the pull on some images
    (``repair=released``); here it trains on retained images alone.
    """

    name = "duck"
    Config = DUCKConfig
    needs_retain = True

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Tie, pull until the target is reached, repair."""
        config: DUCKConfig = self.config
        self.tie(work)
        updates = Updates(work, config)
        epochs, accuracy = 0, 1.0
        while epochs < config.epochs and accuracy >= config.target:
            for group in updates.optimizer.param_groups:
                group["lr"] = config.lr * 0.5 ** sum(epochs >= milestone for milestone in config.milestones)
            self._epoch(work, updates, epochs)
            updates.end_epoch()
            epochs, accuracy = epochs + 1, work.forget_accuracy()
        if config.repair != "none" and config.repair_epochs:
            self._repair(work)
        return {"epochs": epochs, "forget_accuracy": work.forget_accuracy(), "before_repair": accuracy}

    def tie(self, work: Work) -> None:
        """Measure the centroids and find the class of each image to forget."""
        assert work.retain is not None
        size = self.config.batch_size
        features, labels = sampled_features(work, work.retain, size, CENTROID_BATCHES)
        found = [(c, own.mean(0)) for c, own in by_class(work, features, labels, least=1)]
        self.classes = [c for c, _ in found]
        self.centroids = torch.stack([centroid for _, centroid in found])  # (K, D)
        distances = cosine_distances(all_features(work, work.forget, size), self.centroids)
        self.targets = tied(work, self.classes, distances)  # (n,) class ids, one per image to forget

    def pull(self, work: Work, batch: Batch) -> Tensor:
        """Mean cosine distance of images to forget from the centroids they are tied to."""
        wanted = self.centroids[places(self.classes, self.targets[batch.extra["row"]])]
        return (1 - F.cosine_similarity(work.features(batch).float(), wanted, dim=1)).mean()

    def _epoch(self, work: Work, updates: Updates, epoch: int) -> None:
        config: DUCKConfig = self.config
        assert work.retain is not None
        batches = -(-len(work.forget) // config.batch_size)
        for number, batch in enumerate(work.shuffled("forget", work.forget, epoch, config.batch_size)):
            kept_batches = work.shuffled("retain", work.retain, epoch * batches + number, config.batch_size)
            for kept in islice(kept_batches, config.ratio):
                stay = work.cross_entropy(kept, retained=True, temperature=config.temperature)
                updates.step(config.forget_weight * self.pull(work, batch) + config.retain_weight * stay)

    def _repair(self, work: Work) -> None:
        config: DUCKConfig = self.config
        assert work.retain is not None
        released = config.repair == "released"
        updates = Updates(work, replace(config, lr=config.repair_lr))
        temperature = config.temperature if released else 1.0
        rate = cosine_rate(config.repair_lr, 20 * config.repair_epochs * -(-len(work.forget) // config.batch_size))
        done = 0
        for epoch in range(config.repair_epochs):
            some = next(iter(work.shuffled("repair/forget", work.forget, epoch, RELEASED_IMAGES))) if released else None
            for kept in work.shuffled("repair/retain", work.retain, epoch, config.repair_batch_size):
                loss = work.cross_entropy(kept, retained=True, temperature=temperature)
                if some is not None:
                    loss = loss + RELEASED_SHARE * config.forget_weight * self.pull(work, some)
                    for group in updates.optimizer.param_groups:
                        group["lr"] = rate(done)
                updates.step(loss)
                done += 1
            updates.end_epoch()
