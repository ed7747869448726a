"""RanPAC (McDonnell et al., NeurIPS 2023): ridge regression on a fixed random projection of frozen features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, stream
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.base import Component, Context, Needs, Strategy
from cl_platform.strategies.statistics import (
    Derived,
    class_sums,
    counted,
    gram,
    grid_scale,
    on_grid,
    pooled,
    refuse_rounding,
    solve_positive,
)

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

BOUND_KEY = "strategy.ranpac.bound"
CHUNK = 1024
FIT_SHARE = 0.8
RIDGES = tuple(10.0**power for power in range(-8, 9))
SMALL_WIDTH, SMALL, LARGE = 768, 2000, 10000
"""Below this width of the trunk 2,000 projections, else the paper's 10,000."""


@dataclass(frozen=True)
class RanPACConfig:
    """Keys of ``ranpac``."""

    projections: int | None = setting(None, doc="M, random features; 0: none; null: by the width", min=0)
    ridge: float | None = setting(None, doc="lambda; null: chosen on each task's own images", min=0)
    bound: float | None = setting(None, doc="largest random feature; null: 4096, or 64 without projection", above=0)
    max_bytes: int = setting(2**32, doc="bound on the bytes of all tasks' statistics", min=0)


@strategies.register("ranpac")
class RanPAC(Strategy):
    """``h = relu(f R)`` with a fixed Gaussian ``R``; the answer is the largest of ``h (G + lambda I)^-1 Q``.

    ``G = sum h h^T`` and ``Q = sum h y^T`` are kept per task on an integer grid and added up in ascending task id, so
    that the order of images and tasks changes no bit and a dropped task leaves none. ``lambda`` is one of 17 powers of
    ten, fitted on four fifths of the newest task's images and judged by the squared error on the rest. The trunk stays
    as it was pretrained: the paper's variant without first-session adaptation, its phase 1.
    """

    name = "ranpac"
    Config = RanPACConfig
    needs = Needs(gradient=False, boundaries=False)
    owns = frozenset({"features", "classification", "trainable", "prediction"})
    query = "only"

    projection: Tensor

    def __init__(self, config: RanPACConfig) -> None:
        super().__init__(config)
        self.stats = Slots(buffers=("sum", "count", "classes", "gram", "ridge"))
        self._solved: Derived[tuple[Tensor, float]] = Derived()

    def attach(self, context: Context) -> None:
        """Draw the projection.

        Raises:
            UserError: the statistics of all tasks would take more than ``max_bytes``.
        """
        super().attach(context)
        config, width = self.config, context.backbone.feature_dim
        chosen = config.projections
        drawn = chosen if chosen is not None else SMALL if width < SMALL_WIDTH else LARGE
        self.size = drawn or width
        price = 8 * context.total_tasks * self.size**2
        if price > config.max_bytes:
            raise UserError(
                "strategy.ranpac.projections", drawn,
                f"the {context.total_tasks} tasks' moments would take {price / 2**30:.1f} GiB of "
                f"max_bytes={config.max_bytes / 2**30:.1f} GiB",
                f"Set strategy.ranpac.projections={SMALL}, or raise strategy.ranpac.max_bytes",
            )  # fmt: skip
        self.bound = config.bound or (4096.0 if drawn else 64.0)
        self.scale = grid_scale(self.bound)
        noise = torch.randn(width, drawn, generator=stream(context.seed, RUN_LEVEL, "ranpac/projection"))
        self.register_buffer("projection", noise.to(next(context.backbone.parameters()).device))  # (D, M)

    def project(self, features: Tensor) -> Tensor:
        """Random features (n, M) in float64 of features (n, D)."""
        if not self.projection.shape[1]:
            return features.double()
        return F.relu(features.double() @ self.projection.double())

    def end_task(self, task: Task) -> None:
        """Add up the task's moments, and choose its ridge."""
        features = self.context.cache.features(task.task_id, "train", task.train)
        labels = task.train.labels.to(features.device)
        generator = stream(self.context.seed, task.task_id, "ranpac/split")
        order = torch.randperm(len(labels), generator=generator).to(features.device)
        fitted = max(1, int(FIT_SHARE * len(labels)))
        fit, rest = order[:fitted], order[fitted:]
        record = self._moments(features[fit], labels[fit], task.classes)
        ridge = self.config.ridge
        if ridge is None:
            ridge = self._choose_ridge(record, features, labels, fit, rest)
        judged = self._moments(features[rest], labels[rest], task.classes)
        for name in ("gram", "sum", "count"):
            record[name] = record[name] + judged[name]  # integers: as if all had been added up at once
        refuse_rounding(record["gram"], len(labels), self.bound, BOUND_KEY)
        chosen = torch.tensor(ridge, dtype=torch.float64, device=features.device)
        self.stats.add(task.task_id, ridge=chosen, **record)

    def _moments(self, features: Tensor, labels: Tensor, classes: tuple[int, ...]) -> dict[str, Tensor]:
        size = {"dtype": torch.float64, "device": features.device}
        product = torch.zeros(self.size, self.size, **size)  # type: ignore[call-overload]
        record = class_sums(torch.zeros(0, self.size, **size), labels[:0], classes)  # type: ignore[call-overload]
        for rows, of in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
            grid = on_grid(self.project(rows), self.bound, BOUND_KEY)
            product += gram(grid, self.bound, BOUND_KEY)
            part = class_sums(grid, of, classes)
            record["sum"] += part["sum"]
            record["count"] += part["count"]
        return {"gram": product, **record}

    def _choose_ridge(
        self, fitted: dict[str, Tensor], features: Tensor, labels: Tensor, fit: Tensor, rest: Tensor
    ) -> float:
        if not len(rest):
            return 1.0  # a single image: nothing to judge on
        targets = (labels[:, None] == fitted["classes"]).double()  # (n, C)
        asked = self.project(features[rest])
        if len(fit) < self.size:
            known = self.project(features[fit])
            paths = ridge_path(known @ known.T, targets[fit], asked @ known.T, RIDGES)
        else:
            matrix = fitted["gram"] / self.scale**2
            paths = ridge_path(matrix, fitted["sum"].T / self.scale, asked, RIDGES)
        errors = torch.stack([(found - targets[rest]).square().mean() for found in paths])
        return RIDGES[int(errors.argmin())]

    def _solve(self) -> tuple[Tensor, float]:
        _, total, _ = pooled(self.stats.all("classes"), self.stats.all("sum"), self.stats.all("count"))
        moments = torch.zeros_like(self.stats.all("gram")[0])
        for record in self.stats.all("gram"):  # ascending task id
            moments += record
        ridge = float(self.stats.all("ridge")[-1])
        return solve_positive(moments / self.scale**2, total.T / self.scale, ridge)

    def _weights(self) -> tuple[Tensor, float]:
        return self._solved.get(list(self.stats.buffers()), self._solve)

    def seen_classes(self) -> list[int]:
        """Classes with at least one training image, ascending."""
        return counted(self.stats)

    def forward(self, batch: Batch) -> Tensor:
        """The frozen trunk's features (B, D)."""
        return batch.extra["query"]

    def predict(self, batch: Batch) -> Tensor:
        """Regression scores (B, S); towards 1 for the class, 0 for the others."""
        if not self.stats.task_ids:
            return torch.zeros(len(batch), 0, device=batch.labels.device)
        return self.project(batch.extra["query"]) @ self._weights()[0]

    def components(self) -> Iterator[Component]:
        """A record belongs to its task; no data shaped the projection."""
        yield Component("projection", (), "projection", {"projection": self.projection})
        yield from super().components()

    def drop_task(self, task_id: int) -> None:
        """Remove the task's record; the ridge is then that of the newest one left."""
        super().drop_task(task_id)
        self._solved.clear()

    def inspect(self) -> dict[str, Any]:
        """Number of random features, the ridges chosen, and the one that solving took."""
        ridges = {str(t): float(self.stats.get(t, "ridge")) for t in self.stats.task_ids}
        facts: dict[str, Any] = {"projections": self.projection.shape[1], "ridges": ridges}
        if ridges:
            facts["ridge"] = self._weights()[1]
        return facts


def ridge_path(matrix: Tensor, right: Tensor, left: Tensor, ridges: tuple[float, ...]) -> Iterator[Tensor]:
    """``left (matrix + ridge I)^-1 right`` for every ridge, from one eigendecomposition.

    Args:
        matrix: (k, k), symmetric: ``H^T H`` with ``right = H^T Y`` and ``left`` the images asked about, or ``H H^T``
            with ``right = Y`` and ``left = V H^T``, which is the same and smaller for few images.
        right: (k, C).
        left: (m, k).
        ridges: values above 0.
    """
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0)
    rotated, turned = left @ vectors, vectors.T @ right
    for ridge in ridges:
        yield rotated @ (turned / (values + ridge)[:, None])
