"""The contract of a strategy: what it declares, when it is called, what it may touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from torch import Tensor, nn

from cl_platform.backbones.feature_cache import FeatureCache
from cl_platform.batch import Batch
from cl_platform.heads import Head
from cl_platform.slots import Slots

if TYPE_CHECKING:
    from cl_platform.backbones import Backbone, PromptedViT
    from cl_platform.scenarios import Task
    from cl_platform.strategies.phases import Phase

ROLES = ("features", "classification", "prediction", "gradient", "arrangement")
"""What only one strategy of a composition may own: the forward pass, the base loss, the answer, gradient surgery,
and the order in which the stream's data are trained on."""

Query = Literal["none", "beside", "only"]
"""Whether a strategy reads the frozen trunk's features: not at all, beside the images, or instead of them."""


@dataclass(frozen=True)
class Needs:
    """What must be there for a strategy to work; checked once, when the learner is built.

    Attributes:
        prompts: a ViT whose attention takes prefixes and prompt tokens.
        boundaries: the stream must say where a task ends.
        gradient: false for learners in closed form, which skip gradient training.
    """

    prompts: bool = False
    boundaries: bool = True
    gradient: bool = True


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

    def whole_network(self) -> ParameterGroup:
        """All parameters of backbone and head, for a strategy that trains everything."""
        return ParameterGroup([*self.backbone.parameters(), *self.head.parameters()])


@dataclass
class Step:
    """What one training step computed, shared by all strategies.

    Attributes:
        batch: the widened batch, images transformed.
        features: (B, D).
        logits: (B, S) over ``seen_classes``.
        seen_classes: class ids of the columns, ascending.
        task: the task being trained.
        epoch: epoch inside the task, from 0.
        step_in_task: update inside the task, from 0.
    """

    batch: Batch
    features: Tensor
    logits: Tensor
    seen_classes: list[int]
    task: Task
    epoch: int
    step_in_task: int


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
    ``stability`` names the loss terms that protect what was learnt before (replay, distillation, a penalty).

    Args:
        config: an instance of the class's ``Config``.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type]
    needs: ClassVar[Needs] = Needs()
    owns: ClassVar[frozenset[str]] = frozenset()
    query: ClassVar[Query] = "none"
    stability: ClassVar[frozenset[str]] = frozenset()

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
        """Change gradients before the optimizer uses them."""

    def after_update(self, step: Step) -> None:
        """After an optimizer update: insert into buffers, update importances; no host-device synchronisation."""

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
