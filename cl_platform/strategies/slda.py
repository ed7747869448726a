"""Deep SLDA (Hayes & Kanan, CVPR workshops 2020): linear discriminant analysis on frozen features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import UserError
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
    solve_positive,
)

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

BOUND_KEY = "strategy.slda.bound"
STREAMED = ("mean", "count", "covariance", "updates")


@dataclass(frozen=True)
class SLDAConfig:
    """Keys of ``slda``."""

    epsilon: float = setting(1e-4, doc="shrinkage of the covariance to the identity; 1: nearest mean", min=0, max=1)
    update: str = setting("exact", doc="pooled covariance, or the paper's running one", choices=("exact", "streaming"))
    base_init: str = setting("none", doc="first covariance of update=streaming", choices=("none", "oas"))
    bound: float = setting(64.0, doc="largest absolute feature value of update=exact", above=0)

    def __post_init__(self) -> None:
        if self.base_init != "none" and self.update != "streaming":
            raise UserError(
                "strategy.slda.base_init", self.base_init, "belongs to strategy.slda.update=streaming", "Set both"
            )


@strategies.register("slda")
class SLDA(Strategy):
    """Class means and one covariance; the score of a class is ``w f - m w / 2`` with ``w = L m``.

    ``L = ((1 - epsilon) S + epsilon I)^-1``, without class priors. ``update=exact`` keeps counts, sums and second
    moments of each task on an integer grid and adds them up in ascending task id, so that ``S`` is the within-class
    covariance of all images and a dropped task leaves no bit. ``update=streaming`` is the paper's rule, image by image:
    it centres an image at its class mean so far (at 0 for a class's first) and weights by all images seen, which makes
    ``S`` depend on the order; nothing can be taken out of it again.
    """

    name = "slda"
    Config = SLDAConfig
    needs = Needs(gradient=False, boundaries=False)
    owns = frozenset({"features", "classification", "trainable", "prediction"})
    query = "only"
    draws = False

    def __init__(self, config: SLDAConfig) -> None:
        super().__init__(config)
        if config.update == "streaming":
            self.leaks = frozenset({"L-12"})  # type: ignore[misc]
        self.stats = Slots(buffers=("sum", "count", "classes", "gram"))
        self.trained = Slots(buffers=("order",))
        self.scale = grid_scale(config.bound)
        self._solved: Derived[tuple[list[int], Tensor, Tensor, float]] = Derived()

    def attach(self, context: Context) -> None:
        """Create the running statistics of ``update=streaming``."""
        super().attach(context)
        if self.config.update == "streaming":
            width, device = context.backbone.feature_dim, next(context.backbone.parameters()).device
            options: dict[str, Any] = {"dtype": torch.float64, "device": device}
            self.register_buffer("mean", torch.zeros(context.num_classes, width, **options))
            self.register_buffer("count", torch.zeros(context.num_classes, dtype=torch.int64, device=device))
            self.register_buffer("covariance", torch.zeros(width, width, **options))
            self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))

    mean: Tensor
    count: Tensor
    covariance: Tensor
    updates: Tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("mean", "count"):  # rows for classes that were added since
            known, here = state_dict.get(f"{prefix}{name}"), getattr(self, name, None)
            if known is not None and here is not None and len(known) < len(here):
                state_dict[f"{prefix}{name}"] = torch.cat((known, known.new_zeros(here[len(known) :].shape)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def end_task(self, task: Task) -> None:
        """Take the task's training features in."""
        features = self.context.cache.features(task.task_id, "train", task.train)
        labels = task.train.labels.to(features.device)
        if self.config.update == "streaming":
            self._stream(features.double(), labels)
            order = torch.tensor(len(self.trained.task_ids), device=features.device)
            self.trained.add(task.task_id, order=order)
            return
        grid = on_grid(features, self.config.bound, BOUND_KEY)
        record = class_sums(grid, labels, task.classes)
        self.stats.add(task.task_id, gram=gram(grid, self.config.bound, BOUND_KEY), **record)

    def _stream(self, features: Tensor, labels: Tensor) -> None:
        if self.config.base_init == "oas" and not int(self.updates):
            for c in labels.unique().tolist():
                self.mean[c] = features[labels == c].mean(0)
            self.count += torch.bincount(labels, minlength=len(self.count))
            self.covariance.copy_(_oas(features - self.mean[labels]))
            self.updates += len(features)
            return
        t = int(self.updates)
        for x, c in zip(features, labels.tolist(), strict=True):
            delta = x - self.mean[c]
            scatter = torch.outer(delta, delta) * (t / (t + 1))
            self.covariance.mul_(t).add_(scatter).div_(t + 1)
            self.count[c] += 1
            self.mean[c] += delta / self.count[c]
            t += 1
        self.updates.fill_(t)

    def _summary(self) -> tuple[list[int], Tensor, Tensor]:
        """Classes with an image, ascending, their means (S, D), and the covariance (D, D)."""
        if self.config.update == "streaming":
            known = self.count.nonzero()[:, 0]
            return known.tolist(), self.mean[known], self.covariance
        width = self.context.backbone.feature_dim
        if not self.stats.task_ids:
            nothing = torch.zeros(0, width, dtype=torch.float64)
            return [], nothing, torch.zeros(width, width, dtype=torch.float64)
        classes, total, count = pooled(self.stats.all("classes"), self.stats.all("sum"), self.stats.all("count"))
        moments = torch.zeros_like(self.stats.all("gram")[0])
        for record in self.stats.all("gram"):  # ascending task id
            moments += record
        means = total / (count[:, None] * self.scale)
        between = (means * count[:, None]).T @ means
        return classes, means, (moments / self.scale**2 - between) / count.sum().clamp_min(1)

    def _solve(self) -> tuple[list[int], Tensor, Tensor, float]:
        classes, means, covariance = self._summary()
        epsilon = self.config.epsilon
        weights, ridge = solve_positive((1 - epsilon) * covariance, means.T, epsilon)  # (D, S)
        return classes, weights, -0.5 * (means * weights.T).sum(1), ridge

    def _discriminant(self) -> tuple[list[int], Tensor, Tensor, float]:
        if self.config.update == "streaming":
            return self._solved.get([self.mean, self.count, self.covariance], self._solve)
        return self._solved.get(list(self.stats.buffers()), self._solve)

    def seen_classes(self) -> list[int]:
        """Classes with at least one training image, ascending."""
        if self.config.update == "streaming":
            return self.count.nonzero()[:, 0].tolist()
        return counted(self.stats)

    def forward(self, batch: Batch) -> Tensor:
        """The frozen trunk's features (B, D)."""
        return batch.extra["query"]

    def predict(self, batch: Batch) -> Tensor:
        """Scores (B, S)."""
        _, weights, bias, _ = self._discriminant()
        return batch.extra["query"].double() @ weights + bias

    def components(self) -> Iterator[Component]:
        """A record belongs to its task; running statistics to all tasks so far."""
        if self.config.update == "exact":
            yield from super().components()
            return
        tasks = tuple(self.trained.task_ids)
        yield Component("trained", tasks, "lineage", dict(self.trained.state_dict()))
        for name in STREAMED:
            yield Component(name, tasks, "statistics", {name: getattr(self, name)})

    def drop_task(self, task_id: int) -> None:
        """Remove the task's record; of the running statistics its classes' means, while the covariance stays."""
        self.stats.drop(task_id)
        if self.config.update == "streaming":
            own = self.context.own_classes(task_id)
            self.mean[own], self.count[own] = 0.0, 0
        self._solved.clear()

    def inspect(self) -> dict[str, Any]:
        """The rule of the covariance, and the ridge that its inversion took."""
        facts: dict[str, Any] = {"rule": f"{self.config.update} covariance"}
        if self.seen_classes():
            facts["ridge"] = self._discriminant()[3]
        return facts


def _oas(centred: Tensor) -> Tensor:
    """Oracle approximating shrinkage of the covariance of centred rows (n, d), as scikit-learn does it."""
    from sklearn.covariance import OAS

    fitted = OAS(assume_centered=True).fit(centred.cpu().numpy())
    return torch.from_numpy(fitted.covariance_).to(centred)
