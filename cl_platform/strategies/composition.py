"""Several strategies acting as one, in the order in which they were written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cl_platform import registry
from cl_platform.batch import Batch
from cl_platform.config import typed
from cl_platform.errors import UserError
from cl_platform.strategies.base import ROLES, Component, Context, ParameterGroup, Query, Step, Strategy
from cl_platform.strategies.phases import Phase, one_per_task
from cl_platform.strategies.teacher import Teacher

if TYPE_CHECKING:
    from cl_platform.scenarios import ImageSet, Task


class Composition(nn.Module):
    """The strategies of a run. Losses add, hooks run first to last, an exclusive role has one owner.

    Raises:
        UserError: the list is empty, or two strategies own the same role.
    """

    def __init__(self, strategies: Sequence[Strategy]) -> None:
        super().__init__()
        if not strategies:
            raise UserError("strategy", "[]", "at least one strategy is needed", "Write strategy=finetune")
        self.members = nn.ModuleDict({strategy.name: strategy for strategy in strategies})
        self._owners = {role: _owner(strategies, role) for role in ROLES}
        self.teacher: Teacher | None = None

    @property
    def strategies(self) -> list[Strategy]:
        """The members in order."""
        return list(self.members.values())  # type: ignore[arg-type]

    @property
    def query(self) -> Query:
        """How the members together read the frozen trunk's features."""
        wishes = {s.query for s in self.strategies}
        if wishes == {"only"}:
            return "only"
        if not wishes - {"none", "answers"}:
            return "answers" if "answers" in wishes else "none"
        return "beside"

    @property
    def needs_gradient(self) -> bool:
        """False when every member learns in closed form."""
        return any(s.needs.gradient for s in self.strategies)

    def owner(self, role: str) -> Strategy | None:
        """The member that owns ``role``."""
        name = self._owners[role]
        return None if name is None else self.members[name]  # type: ignore[return-value]

    def attach(self, context: Context) -> None:
        """Hand the learner's parts to every member.

        Raises:
            UserError: bounds between tasks are hidden and a member needs them, or a member needs a buffer without one.
        """
        self.context = context
        if not context.boundaries:
            self._refuse_hidden()
        context.features, context.query = self.features, self.query
        context.parts = {"backbone": context.backbone, "head": context.head}
        owner = self.owner("features")
        if owner is not None:
            context.parts["features"] = owner
        if any(strategy.needs.teacher for strategy in self.strategies):
            context.teacher = self.teacher = Teacher(context, self.owner("features"))
        for strategy in self.strategies:
            strategy.attach(context)
        for strategy in self.strategies:
            if strategy.needs.buffer and self.owner("buffer") is None:
                raise UserError(
                    "strategy", f"[{','.join(self.members)}]", f"{strategy.name} needs a replay buffer",
                    f"Put a replay strategy before it, such as strategy=[er,{strategy.name}]",
                )  # fmt: skip
            if strategy.needs.alone and len(self.members) > 1:
                listed = f"[{','.join(self.members)}]"
                raise UserError("strategy", listed, f"{strategy.name} stands alone", f"Use strategy={strategy.name}")
        for strategy in self.strategies:
            strategy.check()

    def _refuse_hidden(self) -> None:
        for strategy in self.strategies:
            if strategy.needs.boundaries:
                able = [n for n in registry.strategies.names() if not registry.strategies.get(n).needs.boundaries]
                raise UserError(
                    "scenario.boundaries", "hidden", f"{strategy.name} has to be told where a task ends",
                    f"Use scenario.boundaries=shown, or one of {', '.join(able)}",
                )  # fmt: skip

    def candidates(self, task: Task, seen: Sequence[int]) -> Sequence[int]:
        """Classes of the base loss: the task's own, or all seen ones where replayed images may be in a batch."""
        return task.classes if self.owner("buffer") is None else seen

    @property
    def foresees(self) -> str:
        """What of the stream's future any member depends on: ``nothing``, its ``end``, or its whole ``length``."""
        found = {strategy.foresees for strategy in self.strategies}
        return next((word for word in ("length", "end") if word in found), "nothing")

    def arrange(self, tasks: Sequence[Task]) -> list[Phase]:
        """The training phases, one per task unless a member arranges them otherwise."""
        owner = self.owner("arrangement")
        return (owner.arrange(tasks) if owner else None) or one_per_task(tasks)

    @property
    def holds_temporarily(self) -> bool:
        """Whether every member can learn a task so that it can be dropped without a trace."""
        return all(strategy.holds_temporarily for strategy in self.strategies)

    def instruct(self, task_id: int, instruction: str) -> None:
        """How the task that begins next is to be learnt, ``R`` or ``T``."""
        for strategy in self.strategies:
            strategy.instruct(task_id, instruction)

    def promote(self, task_id: int) -> None:
        """Take a task that is held temporarily over for good."""
        for strategy in self.strategies:
            strategy.promote(task_id)

    def training_set(self, task: Task) -> ImageSet:
        """What an epoch of ``task`` passes over: its own images, and those that members remember."""
        images = task.train
        for strategy in self.strategies:
            images = strategy.training_set(task, images)
        return images

    def training_size(self, tasks: Sequence[Task]) -> int:
        """Images of an epoch of the last of ``tasks``, those before it learnt; known before any training."""
        return len(tasks[-1].train) + sum(strategy.remembered(tasks) for strategy in self.strategies)

    def begin_task(self, task: Task) -> None:
        """Every member's start-of-task work."""
        for strategy in self.strategies:
            strategy.begin_task(task)

    def trainable(self) -> list[ParameterGroup]:
        """All parameter groups; where nobody owns what is trained, the whole network is."""
        groups = [group for strategy in self.strategies for group in strategy.trainable()]
        if self.owner("trainable") is None:
            groups.insert(0, self.context.whole_network())
        seen: set[int] = set()
        for group in groups:
            for parameter in group.parameters:
                if id(parameter) in seen:
                    raise UserError("strategy", list(self.members), "two of them train the same parameter", "Leave one")
                seen.add(id(parameter))
        return groups

    def widen(self, batch: Batch) -> Batch:
        """The batch with every member's rows appended."""
        for strategy in self.strategies:
            batch = strategy.widen(batch)
        return batch

    def features(self, batch: Batch) -> Tensor:
        """Features (B, D) by the owner, else by the plain backbone."""
        owner = self.owner("features")
        return owner(batch) if owner else self.context.plain_features(batch)

    def first_block(self) -> int | None:
        """First block of a ViT that any member changes; ``None`` if none does."""
        found = [block for block in (strategy.first_block() for strategy in self.strategies) if block is not None]
        return min(found, default=None)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """All terms by ``<strategy>/<term>``; plain cross-entropy over the seen classes where nobody owns it."""
        terms: dict[str, Tensor] = {}
        if self.owner("classification") is None:
            terms["learner/ce"] = step.cross_entropy(step.seen_classes)
        for strategy in self.strategies:
            terms.update({f"{strategy.name}/{term}": value for term, value in strategy.losses(step).items()})
        return terms

    @property
    def stability(self) -> set[str]:
        """Names ``<strategy>/<term>`` of the terms that protect what was learnt before."""
        return {f"{strategy.name}/{term}" for strategy in self.strategies for term in strategy.stability}

    def after_backward(self, step: Step) -> None:
        """Gradient surgery."""
        for strategy in self.strategies:
            strategy.after_backward(step)

    def after_update(self, step: Step) -> None:
        """Work after an optimizer update."""
        for strategy in self.strategies:
            strategy.after_update(step)

    def after_batch(self, step: Step) -> None:
        """Work after each batch."""
        for strategy in self.strategies:
            strategy.after_batch(step)

    def further_updates(self, planned: Sequence[int]) -> list[int]:
        """Planned updates of all members outside Lightning's loop, for each phase."""
        return [sum(counts) for counts in zip(*(s.further_updates(planned) for s in self.strategies), strict=True)]

    def end_task(self, task: Task) -> None:
        """Every member's further training, then its end-of-task work, then the copy that teaches the next task."""
        for strategy in self.strategies:
            strategy.refine(task)
        for strategy in self.strategies:
            strategy.end_task(task)
        if self.teacher is not None:
            self.teacher.take(task.task_id)

    def predict(self, batch: Batch) -> Tensor:
        """Logits (B, S) over the seen classes, by the owner of the prediction, else head after features."""
        owner = self.owner("prediction")
        return owner.predict(batch) if owner else self.context.head(self.features(batch))

    def seen_classes(self) -> list[int]:
        """Class ids of the prediction's columns, ascending."""
        owner = self.owner("prediction")
        known = getattr(owner, "seen_classes", None)
        return known() if known is not None else self.context.head.classes

    def components(self) -> Iterator[Component]:
        """Owner records of all members, names prefixed by the strategy's."""
        if self.teacher is not None:
            yield from self.teacher.components()
        for strategy in self.strategies:
            for c in strategy.components():
                yield Component(f"{strategy.name}.{c.name}", c.tasks, c.kind, c.tensors)

    @property
    def leaks(self) -> frozenset[str]:
        """Channels of all members, and of the whole network where nobody owns what is trained."""
        found: frozenset[str] = frozenset().union(*(strategy.leaks for strategy in self.strategies))
        return found if self.owner("trainable") is not None or not self.needs_gradient else found | {"L-01"}

    def apart(self, task_id: int) -> bool:
        """Whether no member, and no training of the whole network, carries a task into what others leave."""
        shared = self.owner("trainable") is None and self.needs_gradient
        return not shared and all(strategy.apart(task_id) for strategy in self.strategies)

    def drop_task(self, task_id: int) -> None:
        """Remove what a task owns in every member; its head rows are still there."""
        for strategy in self.strategies:
            strategy.drop_task(task_id)
            strategy.let_go()

    def settle(self, task_id: int) -> bool:
        """Go on without the head rows of a dropped task: the teacher keeps none, and members may train anew.

        Returns:
            whether nothing of the task is left in backbone and head.
        """
        if self.teacher is not None:
            self.teacher.drop_task(task_id)
        answers = [strategy.relearn(task_id) for strategy in self.strategies]
        return any(answers)

    def remeasure(self) -> None:
        """Follow a change of the network outside training: what members measured with it, and the copy that teaches."""
        for strategy in self.strategies:
            strategy.remeasure()
        if self.teacher is not None and self.teacher.ready:
            self.teacher.take(self.teacher.copy.task_ids[-1])

    def artefacts(self) -> dict[str, str]:
        """Text files of all members by name."""
        return {name: text for strategy in self.strategies for name, text in strategy.artefacts().items()}

    def inspect(self) -> dict[str, Any]:
        """What members have to say about themselves, by name."""
        facts = {strategy.name: strategy.inspect() for strategy in self.strategies}
        return {name: fact for name, fact in facts.items() if fact}


def _owner(strategies: Sequence[Strategy], role: str) -> str | None:
    owners = [strategy.name for strategy in strategies if role in strategy.owns]
    if len(owners) > 1:
        raise UserError(
            "strategy",
            f"[{','.join(s.name for s in strategies)}]",
            f"{' and '.join(owners)} both own the {role}",
            "Keep one of them",
        )
    return owners[0] if owners else None


def build_strategies(configs: dict[str, Any]) -> Composition:
    """The composition for ``cfg.strategy``: name -> its keys, in order.

    Raises:
        UserError: an unknown strategy or key, or a value out of range.
    """
    members = []
    for name, values in configs.items():
        cls = registry.strategies.get(name)
        own = {key: value for key, value in (values or {}).items() if key != "optimizer"}
        members.append(cls(typed(cls.Config, own, f"strategy.{name}")))
    return assembled(members)


def assembled(listed: list[Strategy]) -> Composition:
    """The composition of strategies that are made already, in order.

    Raises:
        UserError: they cannot stand side by side.
    """
    return Composition(_enclosed(listed))


def _enclosed(listed: list[Strategy]) -> list[Strategy]:
    """The members: all that are listed, without the inner learner of one that encloses those after it."""
    for role in ROLES:
        _owner(listed, role)  # an inner learner has no say in what the one around it owns
    outer = next((k for k, strategy in enumerate(listed) if strategy.encloses), None)
    if outer is None:
        return listed
    listed[outer].enclose(listed[outer + 1 :])
    return listed[: outer + 1]
