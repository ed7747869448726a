"""Negative preference optimisation (Zhang et al., COLM 2024) and SimNPO (Fan et al., 2024), for images.

Both were made for language models; a label counts as an answer of one token.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod, TrainingConfig
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work


@dataclass(frozen=True)
class PreferenceConfig(TrainingConfig):
    """Keys that both methods have."""

    lr: float = setting(1e-4, doc="learning rate", above=0)
    epochs: int = setting(10, doc="passes over the images to forget", min=1)
    forget_weight: float = setting(1.0, doc="weight of the images to forget", min=0)
    retain_weight: float = setting(1.0, doc="weight of the retained images' cross-entropy", min=0)


@dataclass(frozen=True)
class NPOConfig(PreferenceConfig):
    """Keys of ``npo``."""

    b: float = setting(0.1, doc="inverse temperature; towards 0 it becomes gradient ascent", above=0)


@dataclass(frozen=True)
class SimNPOConfig(PreferenceConfig):
    """Keys of ``simnpo``."""

    b: float = setting(2.5, doc="inverse temperature", above=0)
    g: float = setting(0.0, doc="margin, in log probability")


def npo_loss(answers: Tensor, before: Tensor, b: float) -> Tensor:
    """``(2/b) mean softplus(b (log p - log p0))``, ``2 ln 2 / b`` while nothing has changed; bounded below by 0.

    Args:
        answers: log p (B,) of the true class now.
        before: log p0 (B,) of the same images before.
        b: inverse temperature.
    """
    return 2 / b * F.softplus(b * (answers - before)).mean()


def simnpo_loss(answers: Tensor, b: float, g: float) -> Tensor:
    """``(2/b) mean softplus(b log p + b g)``, without a reference.

    Args:
        answers: log p (B,) of the true class; the length of an answer is 1.
        b: inverse temperature.
        g: margin.
    """
    return 2 / b * F.softplus(b * answers + b * g).mean()


def true_log_probability(work: Work, batch: Batch) -> Tensor:
    """log p (B,) of the true class."""
    logits = work.classes.competing(work.logits(batch), batch.labels)
    return logits.log_softmax(1).gather(1, work.classes.columns(batch.labels)[:, None])[:, 0]


class Preference(ApproximateMethod):
    """What both share: their loss on the images to forget, and cross-entropy beside it where images are retained.

    Images to forget come under the evaluation transform: one number per image stands for the answer before.
    """

    @abstractmethod
    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        """The loss on images to forget."""

    def prepare(self, work: Work) -> None:
        """What is needed before the first update."""

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Train for all epochs."""
        config: PreferenceConfig = self.config
        self.prepare(work)
        updates = Updates(work, config)
        for epoch in range(config.epochs):
            beside = None
            if work.retain is not None and config.retain_weight:
                beside = work.cycled("retain", work.retain, epoch, config.batch_size)
            for batch in work.shuffled("forget", work.forget, epoch, config.batch_size, augmented=False):
                loss = config.forget_weight * self.loss(true_log_probability(work, batch), batch)
                if beside is not None:
                    loss = loss + config.retain_weight * work.cross_entropy(next(beside), retained=True)
                updates.step(loss)
            updates.end_epoch()
        return {"epochs": config.epochs, "forget_accuracy": work.forget_accuracy()}


@unlearning_methods.register("npo")
class NPO(Preference):
    """Ascent whose weight ``2 p^b / (p^b + p0^b)`` fades as an image's probability falls below what it was."""

    name = "npo"
    Config = NPOConfig
    _before: Tensor

    @torch.no_grad()
    def prepare(self, work: Work) -> None:
        """Note each image's log probability before anything changes."""
        parts = [true_log_probability(work, b) for b in work.ordered(work.forget, self.config.batch_size)]
        self._before = torch.cat(parts)

    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        """Against what was answered before."""
        return npo_loss(answers, self._before[batch.extra["row"]], self.config.b)


@unlearning_methods.register("simnpo")
class SimNPO(Preference):
    """As ``npo`` without a model to compare with."""

    name = "simnpo"
    Config = SimNPOConfig

    def loss(self, answers: Tensor, batch: Batch) -> Tensor:
        """Against a margin."""
        return simnpo_loss(answers, self.config.b, self.config.g)
