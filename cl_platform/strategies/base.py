"""The contract of a strategy: what it declares, when it is called, what it may touch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cl_platform import registry
from cl_platform.batch import Batch
from cl_platform.errors import UserError
from cl_platform.heads import cross_entropy
from cl_platform.slots import Slots
from cl_platform.strategies.context import Context, ParameterGroup, Query

if TYPE_CHECKING:
    from cl_platform.scenarios import ImageSet, Task
    from cl_platform.strategies.phases import Phase

ROLES = ("features", "classification", "trainable", "prediction", "gradient", "buffer", "arrangement")
"""What only one strategy of a composition may own: the forward pass, the base loss, which base parameters are trained,
the answer, gradient surgery, the replay buffer, and the order in which the stream's data are trained on."""


@dataclass(frozen=True)
class Needs:
    """What must be there for a strategy to work; checked once, when the learner is built.

    Attributes:
        prompts: a ViT whose attention takes prefixes and prompt tokens.
        boundaries: the stream must say where a task ends.
        gradient: false for learners that take no step on the stream's batches, such as those in closed form.
        buffer: another strategy of the composition must own a replay buffer.
        teacher: the learner as it was at the end of the task before is kept.
        alone: no other strategy may stand beside it.
    """

    prompts: bool = False
    boundaries: bool = True
    gradient: bool = True
    buffer: bool = False
    teacher: bool = False
    alone: bool = False


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


LEAKS = {
    "L-01": "gradient steps on shared weights",
    "L-02": "first values of later parts",
    "L-03": "later parts trained in the presence of the task's",
    "L-04": "the loss",
    "L-05": "the head",
    "L-06": "the optimizer",
    "L-07": "normalisation statistics",
    "L-08": "random streams",
    "L-09": "what a buffer holds",
    "L-10": "which rows a buffer holds",
    "L-11": "logits or features of other tasks' images",
    "L-12": "running statistics",
    "L-13": "routing",
    "L-14": "copies of the learner",
    "L-15": "choices made by the data",
    "L-16": "counters",
    "L-17": "shapes",
    "L-18": "evaluation",
    "L-19": "files",
    "L-20": "process memory",
    "L-21": "what was made from the run elsewhere",
    "L-22": "verification",
    "L-23": "hashes",
    "L-24": "gaps",
}
"""Channels through which a task can reach what other tasks leave."""


@dataclass(frozen=True)
class Component:
    """A piece of learnt state and the tasks whose data could have shaped it.

    Attributes:
        name: its key, or the prefix of its keys, in the strategy's ``state_dict``.
        tasks: task ids, ascending; a dropped task stays listed where something was learnt from it.
        kind: such as ``prompt``, ``head`` or ``statistics``.
        tensors: the tensors by the rest of their keys behind ``name``; one alone may repeat the last part of it.
    """

    name: str
    tasks: tuple[int, ...]
    kind: str
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class NoKeys:
    """The ``Config`` of a strategy that has nothing to set."""


class Strategy(nn.Module):
    """A way to learn a stream. Subclasses override what they need and nothing else.

    All that is learnt lives in ``state_dict()``; per-task tensors stand in :class:`~cl_platform.slots.Slots`.
    ``stability`` names the loss terms that protect what was learnt before (replay, distillation, a penalty). ``draws``
    is false for a closed form on a frozen trunk in which the run's seed changes nothing.

    A stream may come with instructions (``R``: learn for good, ``T``: learn until further notice, ``F``: forget). Its
    stages call, from outside a training, ``instruct(task_id, "R" or "T")`` right before :meth:`begin_task` of a task
    that is learnt; :meth:`promote` where ``R`` names a task that is held temporarily; :meth:`drop_task` for ``F``.
    ``holds_temporarily`` says that ``T`` can be obeyed: :meth:`drop_task` of such a task leaves the bytes of a learner
    that never saw it. Where nothing instructs, a task is learnt as the configuration says, else for good.

    ``leaks`` names the channels of ``LEAKS`` through which kept parts still hold a task that is not the newest once
    :meth:`drop_task` has removed all that it owned; empty where every task is learnt apart from the others. What a
    configuration changes about it is set on the instance.

    A strategy that ``encloses`` others takes those after it in the list as its inner learner: they are handed to
    :meth:`enclose` and are no members of the composition. ``rehearses`` names what a strategy learns again from
    remembered rows, ``labels`` or ``logits``, for a strategy that has the rows and asks which terms are wanted.
    ``waits`` says what a step reads from the device, where it cannot do without; empty where the host never waits.

    Args:
        config: an instance of the class's ``Config``.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type] = NoKeys
    needs: ClassVar[Needs] = Needs()
    owns: ClassVar[frozenset[str]] = frozenset()
    query: ClassVar[Query] = "none"
    stability: ClassVar[frozenset[str]] = frozenset()
    draws: ClassVar[bool] = True
    leaks: ClassVar[frozenset[str]] = frozenset()
    holds_temporarily: ClassVar[bool] = False
    encloses: ClassVar[bool] = False
    rehearses: ClassVar[frozenset[str]] = frozenset()
    waits: ClassVar[str] = ""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.context: Context = None  # type: ignore[assignment]  # set by attach, before anything else is called

    def attach(self, context: Context) -> None:
        """Take the learner's parts, once, before the first task; parameters may be created here."""
        self.context = context

    def check(self) -> None:
        """Refuse what cannot work, once every member of the composition is attached."""

    def enclose(self, inner: Sequence[Strategy]) -> None:
        """Take the strategies that stand after it, before anything is attached; of a class that ``encloses``."""
        raise NotImplementedError

    def instruct(self, task_id: int, instruction: str) -> None:
        """Hear how the task that begins next is to be learnt, ``R`` or ``T``; see the class.

        Raises:
            UserError: ``T``, and the strategy has nothing that it could take back later.
        """
        if instruction != "R":
            able = [n for n in registry.strategies.names() if registry.strategies.get(n).holds_temporarily]
            raise UserError(
                "unlearning.sequence", f"{instruction}{task_id}", f"{self.name} cannot hold a task temporarily",
                f"Write R{task_id}, or use {' or '.join(able)}",
            )  # fmt: skip

    def promote(self, task_id: int) -> None:
        """Take a task that is held temporarily over for good, from what is remembered of it; its images are not read.

        Raises:
            UserError: the task is not held temporarily.
        """
        raise UserError(
            "unlearning.sequence", f"R{task_id}", f"{self.name} does not hold task {task_id} temporarily",
            f"Learn it with T{task_id} first",
        )  # fmt: skip

    @property
    def foresees(self) -> str:
        """What of the stream's future the learning depends on: ``nothing``, its ``end``, or its whole ``length``.

        A run that is relearnt without a task has another end and another length than the one before.
        """
        return "nothing"

    def further_updates(self, planned: Sequence[int]) -> list[int]:
        """Planned updates outside Lightning's loop during each phase.

        Args:
            planned: updates on the stream's batches during each.
        """
        return [0] * len(planned)

    def arrange(self, tasks: Sequence[Task]) -> list[Phase] | None:
        """The training phases of the stream (owner of ``arrangement``); ``None`` keeps one phase per task."""
        return None

    def training_set(self, task: Task, images: ImageSet) -> ImageSet:
        """What an epoch of ``task`` passes over, asked for after its start: ``images`` first, then remembered ones.

        The column ``task_ids`` of the answer says which task each image belongs to, if not all are of ``task``.
        """
        return images

    def remembered(self, tasks: Sequence[Task]) -> int:
        """How many images :meth:`training_set` will add to the last of ``tasks`` once the others are learnt."""
        return 0

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

    def refine(self, task: Task) -> None:
        """Train on after the last batch of ``task``, before any strategy consolidates what was learnt."""

    def end_task(self, task: Task) -> None:
        """Consolidate after the last batch of ``task``; test data stay untouched."""

    def predict(self, batch: Batch) -> Tensor:
        """Logits (B, S) over the seen classes, ascending (owner of ``prediction``); independent of batch mates."""
        raise NotImplementedError

    # -- lineage: who shaped what, and how a task is taken out -------------------------------------------------------

    def components(self) -> Iterator[Component]:
        """Owner records of all learnt state; by default a slot belongs to its task and to all that stood behind it."""
        for prefix, module in self.named_modules():
            if isinstance(module, Slots):
                for task_id in module.task_ids:
                    tensors = dict(module.tasks[str(task_id)].state_dict())
                    tasks = self.context.behind(task_id) if self.context is not None else (task_id,)
                    yield Component(f"{prefix}.tasks.{task_id}", tasks, prefix, tensors)

    def apart(self, task_id: int) -> bool:
        """Whether what was learnt from a task is read by no other task's training; by default where nothing leaks."""
        return not self.leaks

    def further_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that updates outside Lightning's loop may change, beside those of :meth:`trainable`."""
        return iter(())

    def drop_task(self, task_id: int) -> None:
        """Remove everything the task owns here. What others learnt from it stays, and so do their owner records."""
        for module in list(self.modules()):
            if isinstance(module, Slots):
                module.drop(task_id)

    def let_go(self) -> None:
        """Keep no reference to parameters of the last task outside the state; they are looked up when a task begins."""

    def relearn(self, task_id: int) -> bool:
        """Train anew what a dropped task had shaped, once all that it owned is gone, from what is remembered of others.

        Returns:
            whether nothing of the task is left in the parameters that were trained.
        """
        return False

    def remeasure(self) -> None:
        """Measure anew what was measured with the network, such as means of features: it was changed since."""

    def inspect(self) -> dict[str, Any]:
        """JSON-able facts for ``metrics.json``, such as which classifier rule answered."""
        return {}

    def artefacts(self) -> dict[str, str]:
        """Text files by name that the run writes into its folder at the end of each task."""
        return {}
