"""Strategies that break the isolation of tasks, each in one way; and the right one that some of them start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.backbones.base import Backbone
from cl_platform.batch import Batch
from cl_platform.heads import Head
from cl_platform.random_streams import RUN_LEVEL, seeded_globals, stream
from cl_platform.scenarios import Task, TaskLoader
from cl_platform.strategies.base import ParameterGroup, Step, Strategy
from cl_platform.strategies.nmc import NMC
from cl_platform.strategies.routing import kmeans
from cl_platform.strategies.s_lora import SLoRA
from cl_platform.strategies.s_prompt import SPrompt


def bn_trunk() -> Backbone:
    """A convolution, a batch norm and a pooling with random weights, in eval mode; 16 pixels to 8 features."""
    with seeded_globals(0, RUN_LEVEL, "bn_trunk"):
        parts = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return Backbone(nn.Sequential(*parts).eval(), "cnn", 8, 16)


@dataclass(frozen=True)
class Nothing:
    """No keys."""


class LocalHeads(Strategy):
    """Right: a frozen trunk, and for each task head rows trained by the loss over its own classes."""

    name = "local_heads"
    Config = Nothing
    owns = frozenset({"features", "classification", "trainable"})

    def begin_task(self, task: Task) -> None:
        self._rows = self.context.head.parameters_for(task.classes)

    def trainable(self) -> Iterator[ParameterGroup]:
        yield ParameterGroup(self._rows)

    def forward(self, batch: Batch) -> Tensor:
        return self.context.plain_features(batch)

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"ce": step.cross_entropy(step.task.classes)}


class TrunkInTrainMode(LocalHeads):
    """The trunk's statistics follow the batches although its weights are frozen."""

    def widen(self, batch: Batch) -> Batch:
        self.context.backbone.model.train()
        return batch


class DecayedRows(LocalHeads):
    """The optimizer holds all rows, so that weight decay moves those of other tasks."""

    def trainable(self) -> Iterator[ParameterGroup]:
        yield ParameterGroup(list(self.context.head.parameters()), weight_decay=0.1)


class CountsTasks(LocalHeads):
    """Says that nothing leaks, and divides the loss by the number of tasks seen."""

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"ce": step.cross_entropy(step.task.classes) / len(self.context.head.blocks.task_ids)}


class WritesElsewhere(LocalHeads):
    """Keeps a running mean of the features that no component declares."""

    def attach(self, context) -> None:
        super().attach(context)
        self.register_buffer("average", torch.zeros(context.head.feature_dim))

    def after_batch(self, step: Step) -> None:
        self.average.lerp_(step.features.detach().mean(0), 0.1)


class OneProductHead(Head):
    """Logits by one matrix product over all rows, as a head that grows by concatenation computes them."""

    def forward(self, features: Tensor) -> Tensor:
        weight, bias = torch.cat(self.blocks.all("weight")), torch.cat(self.blocks.all("bias"))
        order = torch.cat(self.blocks.all("classes")).argsort()
        return F.linear(features, weight, bias).index_select(1, order)


class OneProduct(LocalHeads):
    """Local losses on the logits of such a head."""

    def attach(self, context) -> None:
        super().attach(context)
        context.head.__class__ = OneProductHead


class KeptMoments(SLoRA):
    """One optimizer for all tasks: its moments are there already when a task begins."""

    _kept: list[dict[str, Tensor]] | None = None

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.trainable() for p in group.parameters]

    def after_backward(self, step: Step) -> None:
        if step.step_in_task == 0 and self._kept is not None:
            for parameter, state in zip(self._trained(), self._kept, strict=True):
                self.context.optimizer().state[parameter] = {name: value.clone() for name, value in state.items()}

    def after_update(self, step: Step) -> None:
        state = self.context.optimizer().state
        self._kept = [{name: value.clone() for name, value in state[p].items()} for p in self._trained()]


class GlobalOrder(TaskLoader):
    """Images in an order drawn from one generator that all tasks share."""

    generator = torch.Generator()

    def order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.task_set), generator=self.generator)


class RunningSums(NMC):
    """Class sums of floats over all tasks, from which a dropped task's are subtracted."""

    def attach(self, context) -> None:
        super().attach(context)
        shape = (context.num_classes, context.backbone.feature_dim)
        self.register_buffer("total", torch.zeros(shape, dtype=torch.float64))
        self._own: dict[int, Tensor] = {}

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        features = F.normalize(self.context.cache.features(task.task_id, "train", task.train).double(), dim=1)
        self._own[task.task_id] = torch.zeros_like(self.total).index_add_(0, task.train.labels, features)
        self.total += self._own[task.task_id]

    def drop_task(self, task_id: int) -> None:
        super().drop_task(task_id)
        self.total -= self._own.pop(task_id)


class PooledRouter(SPrompt):
    """Centroids of the features of all tasks so far together."""

    _pool: Tensor | None = None

    def _centroids(self, task: Task) -> Tensor:
        features = F.normalize(self.context.cache.features(task.task_id, "train", task.train).double(), dim=1)
        self._pool = features if self._pool is None else torch.cat([self._pool, features])
        return kmeans(self._pool, self.config.clusters, stream(self.context.seed, task.task_id, "router"))
