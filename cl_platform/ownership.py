"""Which task shaped what a learner has learnt, and how a task is taken out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cl_platform.answering import Answering
from cl_platform.errors import UserError
from cl_platform.heads import Head
from cl_platform.owners import Owners, tasks_behind
from cl_platform.random_streams import RUN_LEVEL

if TYPE_CHECKING:
    from cl_platform.batch import Batch
    from cl_platform.scenarios import Task
    from cl_platform.strategies.base import ParameterGroup, Step


class Ownership(Answering):
    """The part of a learner that records who shaped what, and drops tasks. The names below are the learner's own."""

    head: Head
    owners: Owners
    learnt: list[int]
    task: Task | None
    groups: list[ParameterGroup]
    terms: dict[str, Tensor]
    _draws: dict[str, int]
    _host: tuple[Tensor, Batch] | None
    _last_step: Step | None
    _train_query: Tensor | None

    def note_begin(self, task: Task) -> list[int]:
        """Record that a task begins; the ids of all tasks that can shape what it trains."""
        parts = task.parts or (task,)
        behind = tasks_behind(self.owners, [part.task_id for part in parts], self.composition.apart)
        for part in parts:
            self.owners.begin(part.task_id, part.classes, behind)
        return behind

    def note_trained(self, behind: list[int]) -> None:
        """Record, of head and backbone, what the task that has begun is about to train."""
        free = {id(p) for group in self.groups for p in group.parameters}
        free |= {id(p) for strategy in self.composition.strategies for p in strategy.further_parameters()}
        blocks = self.head.blocks
        places = [t for t in blocks.task_ids if any(id(p) in free for p in blocks.parameters_of(t).values())]
        if any(id(p) in free for p in self.backbone.parameters()):
            places.append(RUN_LEVEL)
        self.owners.add_shapers(places, behind)

    def drop_task(self, task_id: int) -> None:
        """Remove what a task owns: parts and remembered rows of the strategies, head rows, kept features.

        To be called between tasks. Nothing of the task is referenced afterwards but by parts that other tasks shaped as
        well; these list it in their owner records.

        Args:
            task_id: a task that was learnt.

        Raises:
            UserError: it was never learnt here, or is dropped already.
        """
        owners, blocks = self.owners, self.head.blocks
        if task_id not in owners.learnt:
            known = ", ".join(map(str, owners.learnt)) or "none"
            raise UserError("task", task_id, "was never learnt here, or is forgotten already", f"Learnt are: {known}")
        self._let_go(task_id)
        gone = set(owners.classes_of_none_but(task_id))
        if task_id in blocks and not owners.shaped(task_id):
            gone.update(blocks.get(task_id, "classes").tolist())  # never trained: other tasks draw their own below
        self.composition.drop_task(task_id)
        self.head.drop(sorted(gone))
        owners.forget(task_id, block_stays=task_id in blocks)
        self.learnt = [t for t in self.learnt if t != task_id]
        for kept in self.learnt:
            if kept in owners.learnt:
                self.head.begin_task(kept, owners.classes(kept))
        if self.composition.settle(task_id):
            owners.discard(task_id)

    def _let_go(self, task_id: int) -> None:
        """Hold neither images nor parameters of the last task outside the state."""
        self.groups, self.terms, self._draws = [], {}, {}
        self._host = self._last_step = self._train_query = None
        mixed = self.composition.owner("arrangement") is not None  # images of several tasks may be kept under one id
        for entry in self.owners.learnt if mixed else [task_id]:
            self.cache.forget(entry)
        if self.task is not None and task_id in (self.task.task_id, *(part.task_id for part in self.task.parts)):
            self.task = None
        trainer: Any = self._trainer
        if trainer is not None:
            trainer.strategy.optimizers = []
            trainer.strategy.lr_scheduler_configs = []
