"""The contract of a strategy: what it declares, when it is called, what it may touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from cl_platform.backbones.feature_cache import FeatureCache
from cl_platform.batch import Batch
from cl_platform.heads import Head, cross_entropy
from cl_platform.slots import Slots

if TYPE_CHECKING:
    from cl_platform.backbones import Backbone, PromptedViT
    from cl_platform.scenarios import Task
    from cl_platform.strategies.phases import Phase
    from cl_platform.strategies.teacher import Teacher

ROLES = ("features", "classification", "trainable", "prediction", "gradient", "buffer", "arrangement")
"""What only one strategy of a composition may own: the forward pass, the base loss, which base parameters are trained,
the answer, gradient surgery, the replay buffer, and the order in which the stream's data are trained on."""

Query = Literal["none", "answers", "beside", "only"]
"""Whether a strategy reads the frozen trunk's features: not at all, beside the images when it answers alone, beside
the images in training as well, or instead of the images."""


@dataclass(frozen=True)
class Needs:
    """What must be there for a strategy to work; checked once, when the learner is built.

    Attributes:
        prompts: a ViT whose attention takes prefixes and prompt tokens.
        boundaries: the stream must say where a task ends.
        gradient: false for learners in closed form, which skip gradient training.
        buffer: another strategy of the composition must own a replay buffer.
        teacher: the learner as it was at the end of the task before is kept.
    """

    prompts: bool = False
    boundaries: bool = True
    gradient: bool = True
    buffer: bool = False
    teacher: bool = False


def _no_replay(images: Tensor, labels: Tensor, example_ids: Tensor, task_ids: Tensor) -> Batch:
    raise RuntimeError("nothing prepares replayed images outside a learner")


def _no_stream(purpose: str) -> torch.Generator:
    raise RuntimeError("there is no step outside a learner")


def _no_features(batch: Batch) -> Tensor:
    raise RuntimeError("nothing computes features outside a composition")


@dataclass
class Context:
    """The learner as strategies see it. Plain references: nothing in it is a submodule of a strategy.

    Attributes:
        backbone: the feature extractor.
        head: the shared growing head.
        cache: features of the frozen trunk, computed once per image.
        seed: the run's seed.
        num_tasks: planned length of the stream.
        num_classes: classes of the whole scenario.
        setting: ``class``, ``domain`` or ``task``.
        autocast: opens the run's precision.
        prepare: replayed uint8 images, labels (b,), example ids (b,) and task ids (b,) to a batch: augmented anew as
            the current task's images are, with the query column where there is one.
        step_stream: a generator of its own for a draw in the running step, by purpose; a new one at every call.
        image_shape: (3, H, W) of the images as stored.
        batch_size: training images of a batch.
        teacher: the learner at the end of the task before; ``None`` where no strategy needs it.
        buffer: the replay buffer, set by its owner when it is attached.
        features: features (B, D) of a batch as the composition computes them.
        parts: the modules that answer: ``backbone``, ``head``, and ``features`` where a strategy computes these.
        query: how the composition reads the frozen trunk's features.
        sgd_rate: learning rate of a task's first update by SGD; 0 for rules that scale their own steps.
        planned_updates: optimizer updates that the whole run is planned to take.
        kept_blocks: leading blocks of a ViT that neither training nor a strategy changes in the current task.
    """

    backbone: Backbone
    head: Head
    cache: FeatureCache
    seed: int
    num_tasks: int
    num_classes: int
    setting: str
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Callable[[Tensor, Tensor, Tensor, Tensor], Batch] = _no_replay
    step_stream: Callable[[str], torch.Generator] = _no_stream
    image_shape: tuple[int, int, int] = (3, 32, 32)
    batch_size: int = 16
    teacher: Teacher | None = None
    buffer: Any = None
    features: Callable[[Batch], Tensor] = _no_features
    parts: dict[str, nn.Module] = field(default_factory=dict)
    query: Query = "none"
    sgd_rate: float = 0.0
    planned_updates: int = 0
    kept_blocks: int = 0

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


@dataclass(frozen=True)
class Pass:
    """One forward pass of the learner.

    Attributes:
        batch: what went in.
        features: (B, D).
        logits: (B, S) over the seen classes, ascending.
    """

    batch: Batch
    features: Tensor
    logits: Tensor

    def rows(self, start: int, stop: int) -> Pass:
        """The rows from ``start`` to ``stop - 1``, itself where these are all."""
        if start == 0 and stop == len(self.batch):
            return self
        wanted = torch.arange(start, stop, device=self.features.device)
        return Pass(self.batch.select(wanted), self.features[start:stop], self.logits[start:stop])


@dataclass
class Step:
    """What one training step computed, shared by all strategies.

    Attributes:
        host: labels, example ids and task ids of the current task's rows, on the host as the loader gave them.
        passes: the forward passes with gradient so far; the first is that of the widened batch.
        forward: makes another one, of a batch that :attr:`Context.prepare` gave, and appends it.
        seen_classes: class ids of the columns of all logits, ascending.
        candidates: classes of the base loss: the task's own, or all seen ones once replayed images may be among them.
        task: the task being trained.
        epoch: epoch inside the task, from 0.
        step_in_task: update inside the task, from 0.
        global_step: updates of the whole run so far.
    """

    host: Batch
    passes: list[Pass]
    forward: Callable[[Batch], Pass]
    seen_classes: list[int]
    candidates: Sequence[int]
    task: Task
    epoch: int
    step_in_task: int
    global_step: int

    @property
    def current(self) -> int:
        """Rows of the current task in the widened batch; they stand first."""
        return len(self.host)

    def cross_entropy(self, over: Sequence[int] | None = None) -> Tensor:
        """Cross-entropy of the widened batch over some of the seen classes: its mean, or as the column ``weight`` says.

        Args:
            over: candidates of the softmax; ``candidates`` by default.
        """
        weights = self.batch.extra.get("weight")
        over = self.candidates if over is None else over
        return cross_entropy(self.logits, self.batch.labels, self.seen_classes, over, weights)

    @property
    def batch(self) -> Batch:
        """The widened batch, images transformed."""
        return self.passes[0].batch

    @property
    def features(self) -> Tensor:
        """Features (B, D) of the widened batch."""
        return self.passes[0].features

    @property
    def logits(self) -> Tensor:
        """Logits (B, S) of the widened batch over ``seen_classes``."""
        return self.passes[0].logits


@dataclass(frozen=True)
class Component:
    """A piece of learnt state and the tasks whose data could have shaped it.

    Attributes:
        name: its key, or the prefix of its keys, in the strategy's ``state_dict``.
        tasks: task ids, ascending.
        kind: such as ``prompt``, ``head`` or ``statistics``.
        tensors: the tensors by name.
    """

    name: str
    tasks: tuple[int, ...]
    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that one optimizer group trains during the current task; ``None`` means the run's own value."""

    parameters: list[nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float | None = None


class Strategy(nn.Module):
    """A way to learn a stream. Subclasses override what they need and nothing else.

    All that is learnt lives in ``state_dict()``; per-task tensors stand in :class:`~cl_platform.slots.Slots`.
    ``stability`` names the loss terms that protect what was learnt before (replay, distillation, a penalty). ``draws``
    is false for a closed form on a frozen trunk in which the run's seed changes nothing.

    Args:
        config: an instance of the class's ``Config``.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type]
    needs: ClassVar[Needs] = Needs()
    owns: ClassVar[frozenset[str]] = frozenset()
    query: ClassVar[Query] = "none"
    stability: ClassVar[frozenset[str]] = frozenset()
    draws: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.context: Context = None  # type: ignore[assignment]  # set by attach, before anything else is called

    def attach(self, context: Context) -> None:
        """Take the learner's parts, once, before the first task; parameters may be created here."""
        self.context = context

    def arrange(self, tasks: Sequence[Task]) -> list[Phase] | None:
        """The training phases of the stream (owner of ``arrangement``); ``None`` keeps one phase per task."""
        return None

    def begin_task(self, task: Task) -> None:
        """Grow slots and take snapshots before the first batch of ``task``; draws come from keyed streams only."""

    def trainable(self) -> Iterator[ParameterGroup]:
        """Parameters to train in the current task. Whatever no strategy yields is frozen."""
        return iter(())

    def widen(self, batch: Batch) -> Batch:
        """Append rows, such as replayed ones, to the batch; rows that came in stay as they are."""
        return batch

    def forward(self, batch: Batch) -> Tensor:
        """Features (B, D) of a batch, in training and in evaluation (owner of ``features``); no task id at test."""
        return self.context.plain_features(batch)

    def first_block(self) -> int | None:
        """First block of a ViT whose work the strategy changes, by prompts, prefixes or adapters; ``None``: no block.

        Blocks before it, where their weights are frozen, are run once for each evaluation image. Only a strategy whose
        ``forward`` starts from :meth:`Context.embed` may return more than 0.
        """
        return 0 if "features" in self.owns else None

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Scalars by name; the learner sums them. No backward in here."""
        return {}

    def after_backward(self, step: Step) -> None:
        """Change gradients before the optimizer uses them: after un-scaling and accumulation, before clipping."""

    def after_update(self, step: Step) -> None:
        """After an optimizer update: update importances; no host-device synchronisation."""

    def after_batch(self, step: Step) -> None:
        """After each batch, behind the update where the batch completed one: insert into the buffer."""

    def end_task(self, task: Task) -> None:
        """Consolidate after the last batch of ``task``; test data stay untouched."""

    def predict(self, batch: Batch) -> Tensor:
        """Logits (B, S) over the seen classes, ascending (owner of ``prediction``); independent of batch mates."""
        raise NotImplementedError

    def components(self) -> Iterator[Component]:
        """Owner records of all learnt state; by default each slot belongs to its task alone."""
        for prefix, module in self.named_modules():
            if isinstance(module, Slots):
                for task_id in module.task_ids:
                    tensors = dict(module.tasks[str(task_id)].state_dict())
                    yield Component(f"{prefix}.tasks.{task_id}", (task_id,), prefix, tensors)

    def drop_task(self, task_id: int) -> None:
        """Remove everything the task owns here."""
        for module in list(self.modules()):
            if isinstance(module, Slots):
                module.drop(task_id)

    def inspect(self) -> dict[str, Any]:
        """JSON-able facts for ``metrics.json``, such as which classifier rule answered."""
        return {}
