"""CLPU (Liu, Liu and Stone, CoLLAs 2022): what may have to be forgotten is learnt in a network of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.backbones import Backbone
from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.finetuning import STATISTICS, Finetuning
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.memory.build import BufferConfig, build_buffer
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.base import Component, Needs, ParameterGroup, Pass, Step, Strategy
from cl_platform.strategies.routing import centroids_of
from cl_platform.strategies.side_networks import PerTask, SideNetworks, component_of

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

PROMOTE_LR = 0.01


@dataclass(frozen=True)
class CLPUConfig:
    """Keys of ``clpu``."""

    per_task: int = setting(200, doc="remembered images of each task", min=1)
    alpha: float = setting(0.5, doc="weight of the matched logits", min=0)
    beta: float = setting(1.0, doc="weight of the remembered labels", min=0)
    memory_batch: int = setting(32, doc="replayed images of an update, shared among the permanent tasks", min=1)
    instruction: str = setting("R", doc="how a task is learnt of which no sequence speaks", choices=("R", "T"))
    side_init: str = setting("main", doc="where a side network starts: as the run began, or as the main network is",
                             choices=("scratch", "main"))  # fmt: skip
    promote_steps: int | None = setting(None, doc="updates that take a task over; null: as it was learnt in", min=0)
    promote_lr: float | None = setting(None, doc="their rate; null: the run's own by SGD, else 0.01", above=0)
    promote_weight_decay: float = setting(5e-4, doc="their decay", min=0)
    router: str = setting("auto", doc="centroids of a task; auto: kmeans for domains, else class_mean",
                          choices=("auto", "kmeans", "class_mean"))  # fmt: skip
    clusters: int = setting(5, doc="K, centroids of a task under kmeans", min=1)
    metric: str = setting("l2", doc="distance to centroids", choices=("l2", "l1"))


@strategies.register("clpu")
class CLPU(SideNetworks):
    """Permanent tasks share the main network under replay; every temporary one has a side network of its own.

    Each task has a partition of remembered images, with the logits of its own classes as they were when an image came.
    All losses run over the classes of the image's task. To make a temporary task permanent its side network goes, and
    the main network learns the task from its partition alone. To forget one, side network, partition and head go;
    nothing else has seen its images. The trunk is never trained: it is where networks start, and where it is
    pretrained it chooses among them.

    The strategy behind it in the list says which terms protect what was learnt: ``derpp``, as published and where none
    stands there, both; ``der`` logits, ``er`` labels. The released code keeps side networks where ``eval`` does not
    reach them, writes refused images into the last slot, draws from global generators, and promotes for as many
    updates as the permanent task before took.
    """

    name = "clpu"
    Config = CLPUConfig
    needs = Needs(alone=True)
    stability = frozenset({"logits", "labels"})
    leaks = frozenset({"L-01", "L-02", "L-11"})  # of permanent tasks alone
    holds_temporarily = True
    encloses = True
    config: CLPUConfig

    def __init__(self, config: CLPUConfig) -> None:
        super().__init__(config)
        if config.side_init == "scratch":
            self.leaks = self.leaks - {"L-02"}  # type: ignore[misc]
        self.records = Slots(buffers=("before", "updates"))  # what was permanent when the task came, and its updates
        self.partitions = PerTask()
        self._terms_wanted: frozenset[str] = frozenset({"logits", "labels"})
        self._told: dict[int, str] = {}
        self._current, self._replayed = -1, list[int]()
        self._pieces: list[int] | None = None
        self._arrived: Tensor | None = None

    def enclose(self, inner: Sequence[Strategy]) -> None:
        """Take the terms of the strategy behind it.

        Raises:
            UserError: more than one, one without such terms, or keys of it that have no say here.
        """
        listed = f"[{','.join([self.name, *(strategy.name for strategy in inner)])}]"
        able = [n for n in strategies.names() if strategies.get(n).rehearses]
        if any(not strategy.rehearses for strategy in inner) or len(inner) > 1:
            reason = f"behind {self.name} stands one of {', '.join(able)}, and nothing else"
            raise UserError("strategy", listed, reason, f"Use strategy=[{self.name},derpp]")
        for strategy in inner:
            key, value = next(_changed(strategy.config, type(strategy).Config()), ("", None))
            if key:
                todo = f"Leave it out; keys of strategy.{self.name} hold here"
                raise UserError(f"strategy.{strategy.name}.{key}", value, f"has no say inside {self.name}", todo)
            self._terms_wanted = strategy.rehearses

    # -- instructions -----------------------------------------------------------------------------------------------

    def instruct(self, task_id: int, instruction: str) -> None:
        """Note how the task that begins next is to be learnt."""
        self._told[task_id] = instruction

    def begin_task(self, task: Task) -> None:
        """Give the task its head, its partition, its centroids, and a side network if it is temporary."""
        self._current = task_id = task.task_id
        before = self.permanent.tolist()
        if task_id not in self.heads:
            temporary = self._told.pop(task_id, self.config.instruction) == "T"
            self._add(task, before, temporary)
        self._replayed = [] if task_id in self.sides else [t for t in before if t != task_id and self._remembers(t)]
        for network in (self.main, *self.sides.tasks.values()):
            cast(Backbone, network).freeze()
        active = self._network(task_id)
        active.unfreeze()
        active.train()

    def _add(self, task: Task, before: list[int], temporary: bool) -> None:
        task_id, context = task.task_id, self.context
        device = self.permanent.device
        self.heads.add(task_id, **self._first_head(task_id, task.classes))
        self.partitions.tasks[str(task_id)] = self._partition(task_id).to(device)
        if self.routes:
            self.router.add(task_id, centroids=centroids_of(task, context, self.config))
        seen = [] if temporary and self.config.side_init == "scratch" else before
        updates = context.epochs * -(-len(task.train) // context.batch_size)
        record = {"before": torch.tensor(seen, dtype=torch.int64), "updates": torch.tensor(updates)}
        self.records.add(task_id, **{name: tensor.to(device) for name, tensor in record.items()})
        if temporary:
            start = self.main if self.config.side_init == "main" else context.backbone
            self.sides.tasks[str(task_id)] = self._copy_of(start)
        else:
            self._keep(task_id)

    def _partition(self, task_id: int) -> ReplayBuffer:
        config = BufferConfig(policy="reservoir", size=self.config.per_task)
        return build_buffer(config, self.context.seed, self.context.image_shape, task_id=task_id)

    def _held(self, task_id: int) -> ReplayBuffer:
        return cast(ReplayBuffer, self.partitions.tasks[str(task_id)])

    def _remembers(self, task_id: int) -> bool:
        return task_id in self.partitions and len(self._held(task_id)) > 0

    def _keep(self, task_id: int) -> None:
        self.permanent = torch.cat([self.permanent, self.permanent.new_tensor([task_id])])

    def promote(self, task_id: int) -> None:
        """Let the side network go, and train the main one on the task's partition, beside those of permanent tasks.

        Raises:
            UserError: the task is not held temporarily, or a loss was not finite.
        """
        if task_id not in self.sides:
            super().promote(task_id)
        before = [t for t in self.permanent.tolist() if self._remembers(t)]
        updates = int(self.records.get(task_id, "updates"))
        self.sides.drop(task_id)
        self.heads.add(task_id, **self._first_head(task_id, self.heads.get(task_id, "classes").tolist()))
        self._keep(task_id)
        self._current = -1
        self.main.unfreeze()
        try:
            self.context.run_finetuning(self._promotion(task_id, before, updates))
        finally:
            self._pieces = None
            self.main.freeze()

    def _promotion(self, task_id: int, before: list[int], updates: int) -> Finetuning:
        """The training that takes a task over; each task's rows pass through the network by themselves."""
        config, drawn = self.config, list[tuple[Batch, Tensor]]()
        share = 1 / max(1, len(before))
        counts = {task_id: config.memory_batch, **dict.fromkeys(before, self._share_of_batch(len(before)))}

        def batch(step: int) -> Batch:
            drawn.clear()
            for t, count in counts.items():
                select, augment = plan.stream(f"sample/{t}", step), plan.stream(f"augment/{t}", step)
                drawn.append(self._remembered(t, count, select, augment))
            self._pieces = [len(rows) for rows, _ in drawn]
            joined = drawn[0][0]
            for rows, _ in drawn[1:]:
                joined = joined.joined(rows)
            return joined

        def loss(passed: Pass) -> Tensor:
            assert self._pieces is not None
            found = []
            for t, (rows, stored), features in zip(counts, drawn, passed.features.split(self._pieces), strict=True):
                weight = 1.0 if t == task_id else share
                found += [weight * term for term in self._terms(t, features, rows.labels, stored).values()]
            return torch.stack(found).sum()

        steps = updates if config.promote_steps is None else config.promote_steps
        rate = config.promote_lr or self.context.sgd_rate or PROMOTE_LR
        plan = Finetuning(
            purpose="promote",
            seed=self.context.seed,
            task_id=task_id,
            number=0,
            steps=steps if self._weights() and self._remembers(task_id) else 0,
            parameters=self._main_parameters(),
            statistics=[b for n, b in self.main.named_buffers() if n.rpartition(".")[2] in STATISTICS],
            batch=batch,
            loss=loss,
            rate=lambda step: rate,
            momentum=0.0,
            weight_decay=config.promote_weight_decay,
            key=f"strategy.{self.name}.promote_lr",
        )
        return plan

    # -- training ---------------------------------------------------------------------------------------------------

    def _main_parameters(self) -> list[nn.Parameter]:
        kept = [t for t in self.heads.task_ids if t not in self.sides]
        return [*self.main.parameters(), *(p for t in kept for p in self.heads.parameters_of(t).values())]

    def trainable(self) -> Iterator[ParameterGroup]:
        """The side network and the head of a temporary task; the main network and all its heads for a permanent one."""
        if self._current in self.sides:
            own = self.heads.parameters_of(self._current).values()
            yield ParameterGroup([*self._network(self._current).parameters(), *own])
        else:
            yield ParameterGroup(self._main_parameters())

    def forward(self, batch: Batch) -> Tensor:
        """Features (B, D) of the network in training, else of the main network."""
        network = self._network(self._current) if self.training else self.main
        if self._pieces is None:
            return network(batch.images)
        return torch.cat([network(part) for part in batch.images.split(self._pieces)])

    def _cross_entropy(self, task_id: int, logits: Tensor, labels: Tensor) -> Tensor:
        targets = (labels[:, None] == self.heads.get(task_id, "classes")).int().argmax(1)
        return F.cross_entropy(logits.float(), targets)

    def _weights(self) -> dict[str, float]:
        """Weights of the terms that there are."""
        weights = {"logits": self.config.alpha, "labels": self.config.beta}
        return {name: weight for name, weight in weights.items() if weight > 0 and name in self._terms_wanted}

    def _terms(self, task_id: int, features: Tensor, labels: Tensor, stored: Tensor) -> dict[str, Tensor]:
        """Weighted terms on remembered rows of one task; both on the same rows."""
        logits = self._logits(task_id, features)
        terms: dict[str, Tensor] = {}
        for name, weight in self._weights().items():
            if name == "logits":
                terms[name] = weight * F.mse_loss(logits.float(), stored)
            else:
                terms[name] = weight * self._cross_entropy(task_id, logits, labels)
        return terms

    def _share_of_batch(self, tasks: int) -> int:
        return max(1, self.config.memory_batch // max(1, tasks))

    def _remembered(
        self, task_id: int, count: int, select: torch.Generator, augment: torch.Generator | None = None
    ) -> tuple[Batch, Tensor]:
        """Rows of a task's partition, augmented anew, and their stored logits (b, C)."""
        rows = self._held(task_id).sample(count, select)
        assert rows is not None
        assert rows.logits is not None
        ready = self.context.prepare(rows.images, rows.labels, rows.example_ids, rows.task_ids, augment)
        return ready, rows.logits

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy over the task's own classes; beside a permanent one, the mean of the older ones' terms."""
        own = self._logits(self._current, step.features)
        self._arrived = own.detach().float()
        terms = {"ce": self._cross_entropy(self._current, own, step.batch.labels)}
        found: dict[str, list[Tensor]] = {name: [] for name in self._weights()}
        for t in self._replayed if found else ():
            select = self.context.step_stream(f"buffer.sample/{t}")
            rows, stored = self._remembered(t, self._share_of_batch(len(self._replayed)), select)
            passed = step.forward(rows)  # by themselves: batch norm sees one task at a time, as in the released code
            for name, value in self._terms(t, passed.features, rows.labels, stored).items():
                found[name].append(value)
        terms.update({name: torch.stack(values).mean() for name, values in found.items() if values})
        return terms

    def after_batch(self, step: Step) -> None:
        """Offer the batch to the task's partition, in every epoch, with the logits from before the update."""
        assert self._arrived is not None
        raw, host = step.batch.extra["raw"], step.host
        # the step inside the task: that of the run would tell how many updates other tasks took
        self._held(self._current).insert(
            raw, host.labels, host.task_ids, host.example_ids, step.step_in_task, self._arrived
        )
        self._arrived = None

    def end_task(self, task: Task) -> None:
        """Nothing is in training any more."""
        self._current, self._replayed = -1, []

    # -- what is held -----------------------------------------------------------------------------------------------

    def components(self) -> Iterator[Component]:
        """The main network and its heads belong to all permanent tasks, anything else to a task and what it saw."""
        held = tuple(sorted(self.permanent.tolist()))
        yield Component("main", held, "network", dict(self.main.state_dict()))
        yield Component("permanent", held, "bookkeeping", {"permanent": self.permanent})
        for t in self.heads.task_ids:
            saw = tuple(sorted({t, *self.records.get(t, "before").tolist()}))
            yield component_of("heads", self.heads, t, held if t in held else saw, "head")
            yield component_of("records", self.records, t, saw, "bookkeeping")
            yield component_of("partitions", self.partitions, t, saw, "buffer")
            if t in self.router:
                yield component_of("router", self.router, t, (t,), "router")
            if t in self.sides:
                yield component_of("sides", self.sides, t, saw, "network")

    def apart(self, task_id: int) -> bool:
        """Whether only a side network has seen the task."""
        return task_id not in self.permanent.tolist()

    def drop_task(self, task_id: int) -> None:
        """Remove a task's side network, partition, head and centroids.

        What the main network learnt from a permanent task stays in it, and the task stays listed as one that shaped it:
        that is forgotten by rollback only.
        """
        super().drop_task(task_id)
        self.sides.drop(task_id)
        self.partitions.drop(task_id)
        self._told.pop(task_id, None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}permanent" in state_dict:
            self.permanent = torch.zeros_like(state_dict[f"{prefix}permanent"], device=self.permanent.device)
        for name, room in (("sides", self.sides), ("partitions", self.partitions)):
            start = f"{prefix}{name}.tasks."
            found = {int(key[len(start) :].split(".", 1)[0]) for key in state_dict if key.startswith(start)}
            for task_id in set(room.task_ids) - found:
                room.drop(task_id)
            for task_id in sorted(found - set(room.task_ids)):
                own = self._copy_of(self.context.backbone) if name == "sides" else self._partition(task_id)
                room.tasks[str(task_id)] = own.to(self.permanent.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def inspect(self) -> dict[str, Any]:
        """Which tasks are held how, how much of each is remembered, and what chooses among the networks."""
        sizes = {str(t): len(self._held(t)) for t in self.partitions.task_ids}
        router = self.config.router if self.routes else "uniform: uncalibrated, the trunk is not pretrained"
        return {
            "permanent": self.permanent.tolist(),
            "temporary": self.sides.task_ids,
            "remembered": sizes,
            "router": router,
        }


def _changed(config: Any, default: Any) -> Iterator[tuple[str, Any]]:
    """Keys, with dots, whose values are not their defaults."""
    for entry in dataclasses.fields(config):
        value, usual = getattr(config, entry.name), getattr(default, entry.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{entry.name}.{key}", inner) for key, inner in _changed(value, usual))
        elif value != usual:
            yield entry.name, value
