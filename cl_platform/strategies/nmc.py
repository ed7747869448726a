"""Nearest class mean on frozen features (Janson et al. 2022, "A Simple Baseline that Questions the Use of
Pretrained-Models in Continual Learning")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.base import Needs, Strategy
from cl_platform.strategies.statistics import class_sums, counted, grid_scale, on_grid, pooled

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class NMCConfig:
    """Keys of ``nmc``."""

    mean: str = setting("normalised", doc="averaged are L2-normalised or raw features", choices=("normalised", "raw"))
    distance: str = setting("cosine", doc="how an image meets a class mean", choices=("cosine", "euclidean"))
    bound: float | None = setting(None, doc="largest absolute feature value; null: 1 normalised, 64 raw", above=0)


@strategies.register("nmc")
class NMC(Strategy):
    """Class sums and counts per task on an integer grid; an image goes to the nearest class mean.

    Nothing is trained. Sums are exact whatever the order, so that removing a task's record leaves the bytes of a
    learner that never saw it. Defaults: mean of normalised features, cosine; ``distance=euclidean`` with normalised
    means is the paper's released rule; ``mean=raw distance=cosine`` is known as SimpleCIL.
    """

    name = "nmc"
    Config = NMCConfig
    needs = Needs(gradient=False, boundaries=False)
    owns = frozenset({"features", "classification", "trainable", "prediction"})
    query = "only"
    draws = False

    def __init__(self, config: NMCConfig) -> None:
        super().__init__(config)
        self.stats = Slots(buffers=("sum", "count", "classes"))
        self.bound = config.bound or (1.0 if config.mean == "normalised" else 64.0)
        self.scale = grid_scale(self.bound)

    def end_task(self, task: Task) -> None:
        """Add up the task's training features per class."""
        features = self.context.cache.features(task.task_id, "train", task.train)
        labels = task.train.labels.to(features.device)
        self.stats.add(task.task_id, **self._record(features, labels, task.classes))

    def _record(self, features: Tensor, labels: Tensor, classes: tuple[int, ...]) -> dict[str, Tensor]:
        features = features.double()  # in float32 a normalised value could round to just above 1
        if self.config.mean == "normalised":
            features = F.normalize(features, dim=1)
        return class_sums(on_grid(features, self.bound, "strategy.nmc.bound"), labels, classes)

    def seen_classes(self) -> list[int]:
        """Classes with at least one training image, ascending."""
        return counted(self.stats)

    def _means(self) -> tuple[list[int], Tensor]:
        if not self.stats.task_ids:
            return [], torch.zeros(0, self.context.backbone.feature_dim, dtype=torch.float64)
        classes, total, count = pooled(self.stats.all("classes"), self.stats.all("sum"), self.stats.all("count"))
        return classes, total / (count[:, None] * self.scale)  # (S, D) float64

    def forward(self, batch: Batch) -> Tensor:
        """The frozen trunk's features (B, D)."""
        return batch.extra["query"]

    def predict(self, batch: Batch) -> Tensor:
        """Closeness (B, S) to each class mean, larger is nearer."""
        _, means = self._means()
        features = batch.extra["query"].double()
        if self.config.mean == "normalised" or self.config.distance == "cosine":
            features = F.normalize(features, dim=1)
        if self.config.distance == "cosine":
            return features @ F.normalize(means, dim=1).T  # (B, S)
        return features @ means.T - 0.5 * means.square().sum(1)

    def inspect(self) -> dict[str, Any]:
        """Which of the rules called nearest class mean this is."""
        return {"rule": f"mean of {self.config.mean} features, {self.config.distance}"}
