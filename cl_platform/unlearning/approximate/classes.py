"""Which classes stay, which an image is answered among, and which labels it may be given instead of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_platform.errors import UserError
from cl_platform.heads import columns_of, targets_among

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.unlearning.approximate.base import ApproximateRequest


class Classes:
    """The classes of a learner that is to forget a task.

    Args:
        learner: with its owner records.
        task_id: the task that goes.
        seen: class ids of the logits' columns, ascending.
        method: for messages.

    Attributes:
        seen: as given.
        own: classes of the task.
        remaining: seen classes that a kept task has, ascending; with ``scenario.setting=domain`` the task's among them.
        setting: of the scenario; under ``task`` an image is answered among the classes of its task alone.

    Raises:
        UserError: the task was never learnt, or no class remains.
    """

    def __init__(self, learner: ContinualLearner, task_id: int, seen: Sequence[int], method: str) -> None:
        owners, self.setting, self.seen, self._method = learner.owners, learner.setting, list(seen), method
        if task_id not in owners.learnt:
            known = ", ".join(map(str, owners.learnt)) or "none"
            raise UserError("task", task_id, "is no task that was learnt here", f"Learnt are: {known}")
        self.own = [c for c in self.seen if c in owners.classes(task_id)]
        self.groups = {t: [c for c in self.seen if c in owners.classes(t)] for t in owners.learnt}
        kept = {c for t, held in self.groups.items() if t != task_id for c in held}
        self.remaining = [c for c in self.seen if c in kept]
        if not self.remaining:
            raise UserError(
                "unlearning.method", f"approximate:{method}", "no class remains beside those of the task",
                "Use unlearning.method=rollback",
            )  # fmt: skip
        count = len(self.seen)
        self._together = torch.ones(count, count, dtype=torch.bool)
        allowed = torch.tensor([c in self.remaining for c in self.seen])
        if self.setting == "task":
            self._together, allowed = torch.eye(count, dtype=torch.bool), torch.ones(count, dtype=torch.bool)
            for held in self.groups.values():
                columns = torch.tensor(columns_of(held, self.seen), dtype=torch.int64)
                self._together[columns[:, None], columns[None]] = True
        self._others = self._together & allowed & ~torch.eye(count, dtype=torch.bool)

    def columns(self, labels: Tensor) -> Tensor:
        """Columns (B,) of class ids (B,)."""
        return targets_among(labels, self.seen)

    def others(self, labels: Tensor) -> Tensor:
        """Which columns (B, S) an image of the class ``labels`` may be given instead: remaining ones, never its own.

        Under ``scenario.setting=task`` these are the other classes of its task.

        Raises:
            UserError: there is none.
        """
        allowed = self._others.to(labels.device)[self.columns(labels)]
        if not bool(allowed.any(1).all()):
            raise UserError(
                "unlearning.method", f"approximate:{self._method}",
                "it gives images another label, and their task has no other class",
                "Use unlearning.method=approximate:grad_ascent, or rollback",
            )  # fmt: skip
        return allowed

    def competing(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, S), minus infinity for classes that an image of ``labels`` is never answered among."""
        if self.setting != "task":
            return logits
        return logits.masked_fill(~self._together.to(logits.device)[self.columns(labels)], float("-inf"))

    def among(self, task_id: int) -> list[int]:
        """Classes among which a kept task's images are answered once the task has gone."""
        return self.groups[task_id] if self.setting == "task" else self.remaining

    @property
    def going(self) -> list[bool]:
        """For each column, whether its class goes."""
        return [c not in self.remaining for c in self.seen]

    @property
    def chance(self) -> float:
        """Share of the task's images that a guess among the remaining classes would get right."""
        return 1 / len(self.own if self.setting == "task" else self.remaining)


def check_images(learner: ContinualLearner, request: ApproximateRequest) -> None:
    """A ValueError where images stand under a task that they are not of."""
    owners, going = learner.owners, request.task.task_id
    sets = [(going, request.forget), *request.retain.items(), *request.validation.items()]
    for number, (task_id, images) in enumerate(sets):
        if number and (task_id == going or task_id not in owners.learnt):
            raise ValueError(f"task {task_id} is no kept task, and images of it are to be retained")
        if task_id in owners.learnt and not set(images.labels.tolist()) <= set(owners.classes(task_id)):
            raise ValueError(f"some images given for task {task_id} are of no class of it")
