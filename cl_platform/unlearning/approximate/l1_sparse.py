"""Sparsity-aware fine-tuning (Jia et al., NeurIPS 2023, "Model Sparsity Can Simplify Machine Unlearning")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cl_platform.config import setting
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.base import ApproximateMethod, TrainingConfig
from cl_platform.unlearning.approximate.updates import Updates
from cl_platform.unlearning.approximate.work import Work


@dataclass(frozen=True)
class L1SparseConfig(TrainingConfig):
    """Keys of ``l1_sparse``."""

    g: float = setting(5e-4, doc="strength of the L1 norm in the first epoch; it falls to 0 in a line", min=0)


def strength(g: float, epoch: int, epochs: int) -> float:
    """``g (1 - e/E)``: full in the first epoch, ``g/E`` in the last."""
    return g * (1 - epoch / epochs)


def weights_of(work: Work) -> list[nn.Parameter]:
    """What the norm runs over: trained weights, no biases and no scales of normalisation layers."""
    return [parameter for parameter in work.parameters.values() if parameter.dim() > 1]


@unlearning_methods.register("l1_sparse")
class L1Sparse(ApproximateMethod):
    """Fine-tunes on what stays, under an L1 norm that loosens with the epochs.

    Nothing pushes away from the images to forget, so little of them may be forgotten. The released norm runs over all
    parameters, biases and normalisation layers among them; here over trained weights.
    """

    name = "l1_sparse"
    Config = L1SparseConfig
    needs_retain = True

    def unlearn(self, work: Work) -> dict[str, Any]:
        """Train for all epochs."""
        config: L1SparseConfig = self.config
        assert work.retain is not None
        updates, weights = Updates(work, config), weights_of(work)
        for epoch in range(config.epochs):
            now = strength(config.g, epoch, config.epochs)
            for batch in work.shuffled("retain", work.retain, epoch, config.batch_size):
                loss = work.cross_entropy(batch, retained=True)
                if weights:
                    loss = loss + now * torch.stack([weight.abs().sum() for weight in weights]).sum()
                updates.step(loss)
            updates.end_epoch()
        return {"epochs": config.epochs, "forget_accuracy": work.forget_accuracy()}
