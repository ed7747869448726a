"""Optimizers and schedules, made anew for every task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cl_platform.config import setting

if TYPE_CHECKING:
    from cl_platform.strategies.base import ParameterGroup

SCHEDULES = ("constant", "cosine", "cosine_lagged", "steps")


@dataclass(frozen=True)
class OptimizerConfig:
    """Keys of ``optimizer``; a key left ``null`` takes the value recommended in the strategy's own file."""

    name: str = setting("adam", doc="rule", choices=("adam", "adamw", "sgd"))
    lr: float = setting(1e-3, doc="learning rate of an update", above=0)
    lr_per_256: float | None = setting(
        None, doc="learning rate at batch 256, scaled by batch/256; replaces lr", above=0
    )
    weight_decay: float = setting(0.0, doc="decay of the current task's trained parameters", min=0)
    momentum: float = setting(0.9, doc="momentum of sgd", min=0, max=1)
    nesterov: bool = setting(False, doc="Nesterov momentum of sgd")
    schedule: str = setting("constant", doc="course of the rate over a task's epochs", choices=SCHEDULES)
    milestones: list[int] = setting(factory=list, doc="schedule=steps: epochs of a task at which the rate falls")
    gamma: float = setting(0.1, doc="schedule=steps: factor of the rate at each of them", above=0)

    def rate(self, batch_size: int) -> float:
        """Learning rate of the first update."""
        return self.lr if self.lr_per_256 is None else self.lr_per_256 * batch_size / 256


def build_optimizer(
    config: OptimizerConfig, groups: Sequence[ParameterGroup], batch_size: int
) -> torch.optim.Optimizer:
    """A fresh optimizer over the current task's parameter groups."""
    lr = config.rate(batch_size)
    parameters: list[dict[str, Any]] = [
        {
            "params": group.parameters,
            "lr": lr * group.lr_scale,
            "weight_decay": config.weight_decay if group.weight_decay is None else group.weight_decay,
        }
        for group in groups
        if group.parameters
    ]
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, nesterov=config.nesterov)
    rule = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return rule(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8)


def schedule_factor(config: OptimizerConfig, epochs: int) -> Callable[[int], float]:
    """Factor of the learning rate in epoch 0..epochs-1.

    ``cosine`` falls to 0 after the last epoch. ``cosine_lagged`` is the rule of CODA-Prompt's released code: one
    epoch late and stretched, so that the first two epochs run at the full rate and the last is above 0; a single
    epoch, where that code divides by zero, runs at the full rate.
    """
    name = config.schedule
    if name == "steps":
        return lambda epoch: config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    if name == "cosine":
        return lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / max(1, epochs)))
    if name == "cosine_lagged" and epochs > 1:
        return lambda epoch: math.cos(99 * math.pi * max(epoch - 1, 0) / (200 * (epochs - 1)))
    return lambda epoch: 1.0
