"""What replay strategies share: a buffer, draws from it, and the moment at which examples are offered to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import UserError, keys_below
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.memory.build import BufferConfig, build_buffer
from cl_platform.memory.columns import Replay as Rows
from cl_platform.strategies.base import Component, Context, Step, Strategy
from cl_platform.strategies.exemplars import offer_task

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

INSERTS = ("first_epoch", "every_epoch")
RECORDS = ("arrival", "brought", "shaped")
"""Class ids in the order of the columns of stored logits, the tasks that brought them, and all tasks trained so far, a
dropped one included: what they left in logits and in choices by features stays."""


@dataclass(frozen=True)
class ReplayConfig:
    """Keys that every replay strategy has."""

    batch_size: int | None = setting(None, doc="replayed images of a draw; null: as many as trainer.batch_size", min=0)
    insert: str = setting("first_epoch", doc="offer an example once, or in every epoch", choices=INSERTS)
    sampler: str = setting("uniform", doc="how rows are drawn", choices=("uniform", "task_weighted", "class_balanced"))
    exclude_current: bool = setting(False, doc="never draw examples of the task being trained")
    buffer: BufferConfig = setting(factory=BufferConfig, doc="the replay buffer")


class Replay(Strategy):
    """A strategy that remembers examples.

    The order inside a step: draw, forward, loss, backward, update, offer the current batch. So a batch is never
    replayed in its own step, and what is stored beside an example is what the forward pass before the update gave.
    """

    owns = frozenset({"buffer"})
    stores_logits: ClassVar[bool] = False
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._step = 0
        self.arrival: Tensor
        self.brought: Tensor
        self.shaped: Tensor
        for name in RECORDS:
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in RECORDS:
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, torch.zeros_like(state_dict[f"{prefix}{name}"], device=self.arrival.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def attach(self, context: Context) -> None:
        """Make room for the buffer.

        Raises:
            UserError: a buffer that cannot hold an example of every class, or one that would never be drawn from.
        """
        super().attach(context)
        if self.config.exclude_current and not context.boundaries:
            key = f"strategy.{self.name}.exclude_current"
            raise UserError(key, True, "hidden bounds make all images the current task's", f"Set {key}=false")
        columns = context.num_classes if self.stores_logits else None
        with keys_below(f"strategy.{self.name}", "buffer"):
            self.buffer: ReplayBuffer = build_buffer(
                self.config.buffer, context.seed, context.image_shape, columns, context.num_tasks,
                total_tasks=context.total_tasks,
            )  # fmt: skip
        context.buffer, context.draw, context.replay = self.buffer, self.draw, self.lend
        if self.buffer.policy.when == "task_end" and not context.boundaries:
            raise UserError(
                f"strategy.{self.name}.buffer.policy", self.config.buffer.policy,
                "chooses when a task has ended, and hidden bounds let none end before the stream does", "Use reservoir",
            )  # fmt: skip
        if self.stores_logits and self.buffer.policy.when == "task_end":
            raise UserError(
                f"strategy.{self.name}.buffer.policy", self.config.buffer.policy,
                "chooses when a task has ended, and logits are stored while it trains", "Use reservoir",
            )  # fmt: skip
        self._check_room()
        composed = {"L-10"} if self.buffer.policy.shared else set()
        self.leaks = (self.leaks - {"L-10"}) | composed  # type: ignore[misc]

    def _check_room(self) -> None:
        """Refuse a buffer without room for all groups that its policy will divide it among."""
        context, own = self.context, self.config.buffer
        again = context.setting == "domain" and self.buffer.policy.needs_features  # a class counts once a task
        groups = context.num_classes * (context.total_tasks if again else 1)
        key, given = ("size", self.buffer.capacity) if own.bytes is None else ("bytes", own.bytes)
        if self.buffer.capacity < groups:
            raise UserError(
                f"strategy.{self.name}.buffer.{key}", given,
                f"the stream has {groups} classes, and a buffer must hold an example of each", "Raise it",
            )  # fmt: skip
        if own.bytes is not None and self.stores_logits and len(context.declared) > 1:
            raise UserError(
                f"strategy.{self.name}.buffer.bytes", own.bytes,
                "bounds the bytes of an example, and its logits get columns for the added classes", "Use buffer.size",
            )  # fmt: skip
        if own.fixed_classes is not None and own.fixed_classes < context.num_classes:
            raise UserError(
                f"strategy.{self.name}.buffer.fixed_classes", own.fixed_classes,
                f"the stream has {context.num_classes} classes", f"Set it to {context.num_classes}, or to null",
            )  # fmt: skip

    def begin_task(self, task: Task) -> None:
        """Note which task is being trained, and which classes have a column from here on."""
        self._task_id = task.task_id
        known = set(self.arrival.tolist())
        new = [c for c in self.context.head.classes if c not in known]
        self._note("arrival", new)
        self._note("brought", [task.task_id] * len(new))
        self._note("shaped", [task.task_id] if task.task_id not in self.shaped.tolist() else [])

    def _note(self, name: str, numbers: list[int]) -> None:
        before: Tensor = getattr(self, name)
        setattr(self, name, torch.cat((before, torch.tensor(numbers, dtype=torch.int64, device=before.device))))

    def draw(self, count: int | None = None) -> Batch | None:
        """Replayed images, augmented anew, with the column ``stored`` (b, S) where logits are kept.

        Logits stand in the ascending order of all classes seen by now, and ``known`` (b, S) says which of them were.

        Args:
            count: rows; ``batch_size`` by default.

        Returns:
            ``None`` while there is nothing to draw from: no term then, and no forward pass.
        """
        rows = self.drawn(count)
        return None if rows is None else self.ready(rows)

    def lend(
        self, count: int, sampler: str, exclude_current: bool, select: torch.Generator, augment: torch.Generator
    ) -> Batch | None:
        """As :meth:`draw`, for a training outside the steps: how rows are drawn, and from which generators."""
        exclude = self._task_id if exclude_current else None
        rows = self.buffer.sample(count, select, exclude, sampler)
        return None if rows is None else self.ready(rows, augment)

    def drawn(self, count: int | None = None) -> Rows | None:
        """The rows of one draw as the buffer holds them; arguments and ``None`` as for :meth:`draw`."""
        wanted = self.config.batch_size if count is None else count
        wanted = self.context.batch_size if wanted is None else wanted
        if wanted == 0 or len(self.buffer) == 0:
            return None
        exclude = self._task_id if self.config.exclude_current else None
        return self.buffer.sample(wanted, self.context.step_stream("buffer.sample"), exclude, self.config.sampler)

    def ready(self, rows: Rows, augment: torch.Generator | None = None) -> Batch:
        """Rows of the buffer as a batch for the network, with the columns of :meth:`draw`."""
        batch = self.context.prepare(rows.images, rows.labels, rows.example_ids, rows.task_ids, augment)
        if rows.logits is None or rows.num_columns is None:
            return batch
        order = self.arrival.argsort()  # ascending class id -> column in the order of arrival
        known = torch.arange(len(order), device=order.device) < rows.num_columns.to(order.device)[:, None]
        stored = rows.logits[:, : len(order)].to(order.device)
        return batch.with_extra(stored=stored[:, order], known=known[:, order])

    def after_batch(self, step: Step) -> None:
        """Offer the current batch, unless the policy chooses among a finished task's images."""
        self._step = step.global_step
        if self.buffer.policy.when == "task_end":
            return
        raw, host, rows = step.batch.extra["raw"][: step.current], step.host, None
        logits = step.logits[: step.current].detach().float() if self.stores_logits else None
        if self.config.insert == "first_epoch":
            rows = self._new_rows(step)
            if not len(rows):
                return
        if rows is not None and len(rows) < step.current:
            host, index = host.select(rows), rows.to(raw.device, non_blocking=True)
            raw, logits = raw.index_select(0, index), None if logits is None else logits.index_select(0, index)
        if logits is not None:
            arrived = torch.searchsorted(self.arrival.sort().values, self.arrival)  # column of each class, ascending
            logits = logits[:, arrived]  # (B, S) in the order of arrival
        with keys_below(f"strategy.{self.name}", "buffer"):
            self.buffer.insert(raw, host.labels, host.task_ids, host.example_ids, step.global_step, logits)

    @staticmethod
    def _new_rows(step: Step) -> Tensor:
        """Rows of the current batch whose images come for the first time; a hidden stream passes within an epoch."""
        again = step.host.extra.get("pass", torch.full((step.current,), step.epoch))
        return (again == 0).nonzero()[:, 0]

    def end_task(self, task: Task) -> None:
        """Offer the whole task to a policy that waits for its end."""
        if self.buffer.policy.when == "task_end":
            with keys_below(f"strategy.{self.name}", "buffer"):
                offer_task(self.buffer, task, self.context, self._step)

    def components(self) -> Iterator[Component]:
        """The buffer belongs to every task that offered examples to it. Where other tasks' offers or the learner had a
        say in what is stored, by its logits or features, it belongs to every task so far, a dropped one included."""
        yield from super().components()
        owners = self.buffer.offered() | self.buffer.owners()
        if self._mixed:
            owners |= set(self.shaped.tolist())
        yield Component("buffer", tuple(sorted(owners)), "buffer", dict(self.buffer.state_dict()))
        for name, tasks in (("arrival", self.brought), ("brought", self.brought), ("shaped", self.shaped)):
            owned = tuple(sorted(set(tasks.tolist())))
            yield Component(name, owned, "bookkeeping", {name: getattr(self, name)})

    @property
    def _mixed(self) -> bool:
        policy = self.buffer.policy
        return self.stores_logits or policy.needs_features or policy.shared

    def drop_task(self, task_id: int) -> None:
        """Remove the task's rows, and the columns of its classes from the logits of the others."""
        super().drop_task(task_id)
        self.buffer.drop_task(task_id)
        kept = (self.brought != task_id).nonzero()[:, 0]
        self.buffer.keep_columns(kept.cpu().numpy())
        self.arrival, self.brought = self.arrival[kept], self.brought[kept]
        if not self._mixed:
            self.shaped = self.shaped[self.shaped != task_id]

    def inspect(self) -> dict[str, Any]:
        """How full the buffer is, and with what."""
        return {"buffer": {"filled": len(self.buffer), "unique": self.buffer.unique, "bytes": self.buffer.bytes}}
