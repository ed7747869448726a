"""SCAR (Bonato et al., ECCV 2024, "Is Retain Set All You Need in Machine Unlearning? Restoring Performance of
Unlearned Models with Out-Of-Distribution Images")."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod, TrainingConfig
from cl_platform.unlearning.approximate.centroids import all_features, by_class, places, sampled_features, tied
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work

TINY = 1e-6
"""Absolute feature values below it count as this large: a square root has no slope at 0."""


@dataclass(frozen=True)
class SCARConfig(TrainingConfig):
    """Keys of ``scar``."""

    lr: float = setting(5e-4, doc="learning rate", above=0)
    epochs: int = setting(30, doc="passes over the images to forget, at most", min=1)
    batch_size: int = setting(1024, doc="images of a batch", min=1)
    optimizer: str = setting("adam", doc="rule", choices=("sgd", "adam", "adamw"))
    weight_decay: float = setting(0.0, doc="decay of all that is trained", min=0)
    ratio: int = setting(6, doc="batches of surrogate images, and updates, for each batch to forget", min=1)
    forget_weight: float = setting(1.0, doc="lambda_1, weight of the distance to other classes", min=0)
    retain_weight: float = setting(5.0, doc="lambda_2, weight of the distillation on surrogate images", min=0)
    temperature: float = setting(1.0, doc="divides the original's logits, as released", above=0)
    gamma1: float = setting(3.0, doc="shrinkage towards the mean variance", min=0)
    gamma2: float = setting(3.0, doc="shrinkage towards the mean covariance", min=0)
    target: float = setting(0.01, doc="ends once accuracy on the images to forget is below", min=0, max=1)


def tukey(features: Tensor) -> Tensor:
    """``sign(z) |z|^0.5``, the square root of features that are not negative; transformers have negative ones too."""
    return features.sign() * features.abs().clamp_min(TINY).sqrt()


def shrunk(covariance: Tensor, gamma1: float, gamma2: float) -> Tensor:
    """``S + g1 V1 I + g2 V2 (1 - I)`` with the means V1 of the variances and V2 of the other entries that are not 0."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    beside = covariance * (1 - eye)
    v1, v2 = covariance.diagonal().mean(), beside.sum() / (beside != 0).sum().clamp_min(1)
    return covariance + gamma1 * v1 * eye + gamma2 * v2 * (1 - eye)


def inverse_correlation(features: Tensor, gamma1: float, gamma2: float) -> Tensor:
    """Pseudo-inverse (D, D) of the correlations of features (k, D), the covariance shrunk twice before; in float64."""
    covariance = torch.cov(features.double().T)
    covariance = shrunk(shrunk(covariance, gamma1, gamma2), gamma1, gamma2)
    sigma = covariance.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    inverse: Tensor = torch.linalg.pinv(covariance / (sigma[:, None] * sigma[None]), hermitian=True)
    return inverse.to(features.dtype)


def mahalanobis(points: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """``d^T S^-1 d`` (n,) of the differences of unit-length points (n, D) from a unit-length mean (D,)."""
    difference = F.normalize(points, dim=1) - F.normalize(mean, dim=0)
    return ((difference @ inverse) * difference).sum(1)


def distillation(answers: Tensor, original: Tensor, gone: Tensor, temperature: float) -> Tensor:
    """Mean ``KL(original || now)`` over images that the original gives to a class that stays.

    Args:
        answers: logits (B, S) now.
        original: logits (B, S) before; those of classes that go are set to the least one of all.
        gone: (S,) bool, the columns of classes that go.
        temperature: divides the original's logits alone.
    """
    stays = ~gone[original.argmax(1)]  # (B,)
    lowered = torch.where(gone, original.min(), original) / temperature
    each = F.kl_div(answers.log_softmax(1), lowered.log_softmax(1), reduction="none", log_target=True).sum(1)
    return torch.where(stays, each, torch.zeros_like(each)).sum() / stays.sum().clamp_min(1)


@unlearning_methods.register("scar")
class SCAR(ApproximateMethod):
    """Moves features of what goes into the nearest other class, and holds answers on surrogate images.

    Distances are those of Mahalanobis under each remaining class's own covariance; every image is tied to one class
    before the first update. Surrogate images come from outside the stream; without any, retained images stand for them,
    and then the method's claim to need none does not hold: the report says which.
    """

    name = "scar"
    Config = SCARConfig
    needs_retain = True

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Tie, move until the target is reached."""
        config: SCARConfig = self.config
        assert work.retain is not None
        original = work.frozen()
        self.tie(work)
        surrogate = work.surrogate or work.retain
        gone = torch.tensor(work.classes.going, device=work.device)
        updates, batches = Updates(work, config), -(-len(work.forget) // config.batch_size)
        epochs, accuracy = 0, 1.0
        while epochs < config.epochs and accuracy >= config.target:
            for number, batch in enumerate(work.shuffled("forget", work.forget, epochs, config.batch_size)):
                others = work.shuffled("surrogate", surrogate, epochs * batches + number, config.batch_size)
                for kept in islice(others, config.ratio):
                    with torch.no_grad():
                        before = original.logits(kept)
                    stay = distillation(work.logits(kept), before, gone, config.temperature)
                    updates.step(config.forget_weight * self.away(work, batch) + config.retain_weight * stay)
            updates.end_epoch()
            epochs, accuracy = epochs + 1, work.forget_accuracy()
        source = "retained images" if work.surrogate is None else "images outside the stream"
        return {"epochs": epochs, "forget_accuracy": accuracy, "surrogate": source}

    def tie(self, work: Work) -> None:
        """Measure the remaining classes and find the nearest one of each image to forget.

        Raises:
            UserError: no remaining class has two images, which a covariance takes.
        """
        assert work.retain is not None
        config: SCARConfig = self.config
        features, labels = sampled_features(work, work.retain, config.batch_size, None)
        found = [(c, tukey(own)) for c, own in by_class(work, features, labels, least=2)]
        if not found:
            raise UserError(
                "unlearning.method",
                f"approximate:{self.name}",
                "it needs two images or more of a remaining class",
                "Use another method",
            )
        self.classes = [c for c, _ in found]
        self.means = torch.stack([own.mean(0) for _, own in found])  # (K, D)
        self.inverses = torch.stack([inverse_correlation(own, config.gamma1, config.gamma2) for _, own in found])
        going = tukey(all_features(work, work.forget, config.batch_size))
        distances = torch.stack(
            [mahalanobis(going, mean, inverse) for mean, inverse in zip(self.means, self.inverses, strict=True)], dim=1
        )  # (n, K)
        self.targets = tied(work, self.classes, distances)  # (n,) class ids, one per image to forget

    def away(self, work: Work, batch: Batch) -> Tensor:
        """Mean distance of images to forget from the classes they are tied to."""
        points = tukey(work.features(batch).float())
        tied_to = places(self.classes, self.targets[batch.extra["row"]]).cpu()
        parts = []
        for place in tied_to.unique().tolist():  # one class at a time: a matrix for each image would not fit
            rows = (tied_to == place).nonzero()[:, 0].to(points.device)
            parts.append(mahalanobis(points[rows], self.means[place], self.inverses[place]))
        return torch.cat(parts).mean()
