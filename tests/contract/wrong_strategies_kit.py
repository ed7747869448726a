"""Strategies that break one promise of the contract each, and the right one that they start from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_platform.batch import Batch
from cl_platform.memory.build import BufferConfig, build_buffer
from cl_platform.random_streams import stream
from cl_platform.scenarios import Task
from cl_platform.slots import Slots
from cl_platform.strategies.base import Component, Context, ParameterGroup, Step, Strategy


@dataclass(frozen=True)
class Keys:
    """One key."""

    rate: float = 1.0


class Right(Strategy):
    """Trains the head on a frozen trunk; each task has a bias of its own, added to the features in training."""

    Config = Keys
    owns = frozenset({"features", "classification", "trainable", "prediction"})
    leaks = frozenset({"L-03", "L-05"})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shift = Slots(parameters=("bias",))
        self._task = -1

    def begin_task(self, task: Task) -> None:
        draws = stream(self.context.seed, task.task_id, "right/bias")
        self.shift.add(task.task_id, bias=0.01 * torch.randn(self.context.head.feature_dim, generator=draws))
        self._task = task.task_id

    def trainable(self) -> Iterator[ParameterGroup]:
        own = list(self.shift.parameters_of(self._task).values())
        yield ParameterGroup([*own, *self.context.head.parameters()], lr_scale=20 * self.config.rate)

    def forward(self, batch: Batch) -> Tensor:
        return self.context.plain_features(batch) + torch.stack(self.shift.all("bias")).sum(0)

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"ce": step.cross_entropy(step.seen_classes)}

    def predict(self, batch: Batch) -> Tensor:
        return self.context.head(self(batch))

    def seen_classes(self) -> list[int]:
        return self.context.head.classes


class LearnsNothing(Right):
    """Its rate is zero."""

    def trainable(self) -> Iterator[ParameterGroup]:
        for group in super().trainable():
            yield ParameterGroup(group.parameters, lr_scale=0.0)


class IdleTerm(Right):
    """A penalty on a copy of the parameters reaches none of them."""

    def losses(self, step: Step) -> dict[str, Tensor]:
        weights = torch.cat([p.detach().flatten() for p in self.context.head.parameters()])
        return {**super().losses(step), "decay": 0.01 * weights.square().sum()}


class ForgottenState(Right):
    """The scale of its answers lives in an attribute."""

    scale: Tensor | None = None

    def end_task(self, task: Task) -> None:
        self.scale = torch.stack([p.detach().abs().mean() for p in self.context.head.parameters()]).mean()

    def predict(self, batch: Batch) -> Tensor:
        logits = super().predict(batch)
        return logits if self.scale is None else logits / self.scale


class ForgottenCounter(Right):
    """Each task is trained with a weight that depends on how many there were in this process."""

    count = 0

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.count += 1

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"ce": step.cross_entropy(step.seen_classes) * (1 + 0.5 * self.count)}


class GlobalDraws(Right):
    """First values from the global generator."""

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        bias = self.shift.get(task.task_id, "bias")
        bias.data.add_(0.01 * torch.randn(bias.shape))


class BatchVote(Right):
    """The classes that the batch as a whole looks like are favoured."""

    def predict(self, batch: Batch) -> Tensor:
        logits = super().predict(batch)
        return logits + 0.1 * logits.softmax(1).mean(0)


class ReadsTaskIds(Right):
    """Where it is told the task, it answers with its number in mind."""

    def predict(self, batch: Batch) -> Tensor:
        known = (batch.task_ids >= 0)[:, None]
        return super().predict(batch) + torch.where(known, 0.1 * batch.task_ids[:, None], 0.0)


class Undeclared(Right):
    """A running mean of the features that no component names."""

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.register_buffer("average", torch.zeros(context.head.feature_dim))

    def after_update(self, step: Step) -> None:
        self.average.lerp_(step.features.detach().mean(0), 0.1)


class FalseOwner(Undeclared):
    """Says that the first task alone has shaped the mean."""

    def components(self) -> Iterator[Component]:
        yield from super().components()
        first = tuple(self.shift.task_ids[:1])
        yield Component("average", first, "statistics", {"average": self.average})


class KeepsReference(Right):
    """Remembers the parameters of every task, and does not let go of a dropped one's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._all: dict[int, list[nn.Parameter]] = {}

    def trainable(self) -> Iterator[ParameterGroup]:
        self._all[self._task] = list(self.shift.parameters_of(self._task).values())
        yield from super().trainable()


class ClaimsIsolation(Right):
    """Says that nothing leaks, while the number of tasks weighs the loss."""

    leaks = frozenset()

    def trainable(self) -> Iterator[ParameterGroup]:
        own = [
            *self.shift.parameters_of(self._task).values(),
            *self.context.head.blocks.parameters_of(self._task).values(),
        ]
        yield ParameterGroup(own, lr_scale=20.0)

    def losses(self, step: Step) -> dict[str, Tensor]:
        return {"ce": step.cross_entropy(step.task.classes) / (0.3 + len(self.shift.task_ids))}


class LearnsFromQuestions(Right):
    """Counts the images that it was asked about."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("asked", torch.zeros((), dtype=torch.int64))

    def predict(self, batch: Batch) -> Tensor:
        self.asked += len(batch)
        return super().predict(batch)

    def components(self) -> Iterator[Component]:
        yield from super().components()
        yield Component("asked", tuple(self.shift.task_ids), "bookkeeping", {"asked": self.asked})


class NeedsTwoClasses(Right):
    """Takes it for granted that a task has a second class."""

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._pair = task.classes[:2][1]


class NeedsFullPrecision(Right):
    """Writes logits into a table of another number format."""

    def losses(self, step: Step) -> dict[str, Tensor]:
        rows = torch.arange(len(step.logits), device=step.logits.device)
        table = torch.zeros_like(step.logits, dtype=torch.float32)
        table[rows] = step.logits
        return {**super().losses(step), "size": 1e-4 * table.square().mean()}


class MovesTheTrunk(Right):
    """Nudges weights of the trunk that it does not say it trains."""

    def after_update(self, step: Step) -> None:
        with torch.no_grad():
            next(self.context.backbone.parameters()).mul_(0.999)


class FillsABuffer(Right):
    """Remembers images, and never looks at them again."""

    def attach(self, context: Context) -> None:
        super().attach(context)
        self.buffer = build_buffer(BufferConfig(size=20), context.seed, context.image_shape)

    def after_batch(self, step: Step) -> None:
        host, raw = step.host, step.batch.extra["raw"]
        self.buffer.insert(raw, host.labels, host.task_ids, host.example_ids, step.step_in_task)

    def components(self) -> Iterator[Component]:
        yield from super().components()
        owners = self.buffer.offered() | self.buffer.owners()
        yield Component("buffer", tuple(owners), "buffer", dict(self.buffer.state_dict()))

    def drop_task(self, task_id: int) -> None:
        super().drop_task(task_id)
        self.buffer.drop_task(task_id)


class Waits(Right):
    """Reads the loss at every step."""

    def losses(self, step: Step) -> dict[str, Tensor]:
        terms = super().losses(step)
        self._last = float(terms["ce"])
        return terms


class AnswersBackwards(Right):
    """Its columns stand in descending class id."""

    def seen_classes(self) -> list[int]:
        return super().seen_classes()[::-1]


class KeepsFromRunToRun(Right):
    """What a learner draws depends on those before it in the process."""

    made = 0

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        KeepsFromRunToRun.made += 1
        self.shift.get(task.task_id, "bias").data.mul_(KeepsFromRunToRun.made)


class NoDefaults(Right):
    """A key without a default."""

    @dataclass(frozen=True)
    class Config:
        """One key."""

        rate: float


class RaisesInTraining(Right):
    """Cannot compute its loss."""

    def losses(self, step: Step) -> dict[str, Tensor]:
        raise KeyError("teacher")


class Unused:
    """No strategy at all."""
