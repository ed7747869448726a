"""What strategies see of the learner, and what they ask it to do for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from cl_platform.backbones.feature_cache import FeatureCache
from cl_platform.batch import Batch
from cl_platform.finetuning import Finetuning
from cl_platform.heads import Head

if TYPE_CHECKING:
    from cl_platform.backbones import Backbone, PromptedViT
    from cl_platform.scenarios import Task
    from cl_platform.strategies.teacher import Teacher

Query = Literal["none", "answers", "beside", "only"]
"""Whether a strategy reads the frozen trunk's features: not at all, beside the images when it answers alone, beside
the images in training as well, or instead of the images."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that one optimizer group trains during the current task; ``None`` means the run's own value."""

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float | None = None


def _no_replay(*_: Any, **__: Any) -> Batch:
    raise RuntimeError("nothing prepares replayed images outside a learner")


def _no_finetuning(plan: Finetuning) -> None:
    raise RuntimeError("nothing can be fine-tuned outside a learner")


def _no_stream(purpose: str) -> torch.Generator:
    raise RuntimeError("there is no step outside a learner")


def _no_features(batch: Batch) -> Tensor:
    raise RuntimeError("nothing computes features outside a composition")


def _no_draw() -> Batch | None:
    return None


def _itself(task_id: int) -> tuple[int, ...]:
    return (task_id,)


def _none(task_id: int) -> list[int]:
    return []


def _as_stored(replayed: Batch) -> Batch:
    return replayed


@dataclass
class Context:
    """The learner as strategies see it. Plain references: nothing in it is a submodule of a strategy.

    Attributes:
        backbone: the feature extractor.
        head: the shared growing head.
        cache: features of the frozen trunk, computed once per image.
        seed: the run's seed.
        num_tasks: tasks of the scenario, those that the stream leaves out included: what room is divided by, so that a
            learner that forgot a task is made like one that never saw it. Tasks added later get shares of that size.
        total_tasks: all tasks by now, those that were added included; 0: as many as ``num_tasks``.
        num_classes: classes of the whole stream.
        declared: number of class ids that the scenario has, then after each addition; empty: ``num_classes``.
        setting: ``class``, ``domain`` or ``task``.
        online: every task is passed over once.
        boundaries: the stream says where a task ends; else it is one task that declares all classes.
        length: tasks of the stream itself.
        ends: positions at which the scenario, and each addition to it, ends.
        autocast: opens the run's precision.
        prepare: replayed uint8 images, labels (b,), example ids (b,) and task ids (b,) to a batch: augmented anew as
            the current task's images are, with the query column where there is one. A generator for the augmentation
            may follow; else it is one of the running step.
        step_stream: a generator of its own for a draw in the running step, by purpose; a new one at every call.
        optimizer: the running task's optimizer, ``None`` outside training; for strategies that keep or clear moments.
        image_shape: (3, H, W) of the images as stored.
        batch_size: training images of a batch.
        teacher: the learner at the end of the task before; ``None`` where no strategy needs it.
        buffer: the replay buffer, set by its owner when it is attached.
        replay: a draw from it for a training outside the steps, likewise: see ``Replay.lend``.
        run_finetuning: trains as planned, outside Lightning's loop; the updates count among the run's.
        draw: one more draw from the buffer, set by its owner: ready for the learner, ``None`` where there is nothing.
        targets: a draw with the columns ``stored`` and ``known`` to the same draw with what its logits shall be like;
            what was stored, unless a strategy knows better.
        features: features (B, D) of a batch as the composition computes them.
        parts: the modules that answer: ``backbone``, ``head``, and ``features`` where a strategy computes these.
        query: how the composition reads the frozen trunk's features.
        sgd_rate: learning rate of a task's first update by SGD; 0 for rules that scale their own steps.
        planned_updates: optimizer updates that the run is planned to take on the stream's batches; 0: unknown.
        epochs: epochs of the current task.
        batches: batches of an epoch of the current task; 0 outside training.
        kept_blocks: leading blocks of a ViT that neither training nor a strategy changes in the current task.
        behind: tasks that could have shaped what was trained in a task, ascending, by its id; a dropped one stays.
        own_classes: classes of a task, by its id, that no other learnt task has, ascending.
    """

    backbone: Backbone
    head: Head
    cache: FeatureCache
    seed: int
    num_tasks: int
    num_classes: int
    setting: str
    online: bool = False
    boundaries: bool = True
    length: int = 0
    total_tasks: int = 0
    declared: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[..., Batch] = _no_replay
    step_stream: Callable[[str], torch.Generator] = _no_stream
    optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None
    image_shape: tuple[int, int, int] = (3, 32, 32)
    batch_size: int = 16
    teacher: Teacher | None = None
    buffer: Any = None
    replay: Callable[..., Batch | None] = _no_replay
    run_finetuning: Callable[[Finetuning], None] = _no_finetuning
    draw: Callable[[], Batch | None] = _no_draw
    targets: Callable[[Batch], Batch] = _as_stored
    features: Callable[[Batch], Tensor] = _no_features
    parts: dict[str, nn.Module] = field(default_factory=dict)
    query: Query = "none"
    sgd_rate: float = 0.0
    planned_updates: int = 0
    epochs: int = 1
    batches: int = 0
    kept_blocks: int = 0
    behind: Callable[[int], tuple[int, ...]] = _itself
    own_classes: Callable[[int], list[int]] = _none

    def __post_init__(self) -> None:
        self.total_tasks = self.total_tasks or self.num_tasks
        self.declared = self.declared or (self.num_classes,)

    def embed(self, batch: Batch) -> tuple[Tensor, int]:
        """Tokens (B, N, D) of a batch for a :class:`PromptedViT`, and the block that they enter.

        Where evaluation has kept the activations behind the blocks that nothing changes, those; else the embedding.
        """
        if "tokens" in batch.extra:
            return batch.extra["tokens"], self.kept_blocks
        return cast("PromptedViT", self.backbone).embed(batch.images), 0

    def plain_features(self, batch: Batch) -> Tensor:
        """Features (B, D) of the backbone without prompts."""
        if "tokens" not in batch.extra:
            return self.backbone(batch.images)
        vit = cast("PromptedViT", self.backbone)
        return vit.readout(vit.finish(vit.run(batch.extra["tokens"], start=self.kept_blocks)))

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of what answers that the current task trains, by dotted name; to be asked after its start."""
        named = ((f"{part}.{n}", p) for part, module in self.parts.items() for n, p in module.named_parameters())
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def evaluated(self, task: Task, rows: Tensor) -> Batch:
        """Some training images of ``task`` under the evaluation transform, with their query where one is read.

        Args:
            task: whose images.
            rows: (b,) int64 row numbers in ``task.train``.
        """
        chosen, device = task.train.select(rows), next(self.backbone.parameters()).device
        labels, ids = chosen.labels.to(device), chosen.example_ids.to(device)
        extra = {}
        if self.query != "none":
            extra["query"] = self.cache.features(task.task_id, "train", task.train)[rows.to(device)]
        if self.query == "only":
            images = torch.empty(len(rows), 0, device=device)
        else:
            images = self.cache.evaluate(chosen.images(slice(None)).to(device))
        owner = torch.full_like(labels, task.task_id)
        return Batch(images, labels, ids, owner, torch.zeros_like(labels, dtype=torch.bool), extra)

    def whole_network(self) -> ParameterGroup:
        """All parameters of backbone and head, for a strategy that trains everything."""
        return ParameterGroup([*self.backbone.parameters(), *self.head.parameters()])
