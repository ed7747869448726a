"""What all approximate methods share: the request, its life up to the checks, and the report."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from cl_platform.config import setting, typed
from cl_platform.errors import UserError
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate.work import Work

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import ImageSet, Task

log = logging.getLogger("cl_platform")


@dataclass(frozen=True)
class ApproximateRequest:
    """Which task is to go, and which images a method may read for it.

    Attributes:
        task: the task; of it only id and classes are read.
        forget: training images of it, or what a buffer holds of them.
        retain: training images of kept tasks by task id, from disk or a buffer; empty where none can be had.
        seed: the run's seed.
        device: where the work is done.
        keep_rows: the caller leaves the task's head rows in place afterwards; no method removes them itself.
        validation: held-out images of kept tasks by task id, for the checks; ``retain`` where there are none.
        surrogate: images outside the stream that the user named, for methods that ask for some.
        min_retain_ratio: the copy replaces the model only if at least this share of the accuracy on kept tasks is left.
    """

    task: Task
    forget: ImageSet
    retain: Mapping[int, ImageSet]
    seed: int
    device: torch.device | str = "cpu"
    keep_rows: bool = False
    validation: Mapping[int, ImageSet] = field(default_factory=dict)
    surrogate: ImageSet | None = None
    min_retain_ratio: float = 0.5


@dataclass(frozen=True)
class ApproximateReport:
    """What a method did.

    Attributes:
        method: its name.
        steps: optimizer updates.
        images: images that went forward, those of measurements included.
        seconds: wall clock of the whole request.
        params: numbers that could change.
        checks: what was checked before the model was replaced.
        facts: what the method has to say about itself, as plain JSON.
        level: what may be claimed.
    """

    method: str
    steps: int
    images: int
    seconds: float
    params: int
    checks: dict[str, Any]
    facts: dict[str, Any]
    level: str = "approximate"


@dataclass(frozen=True)
class TrainingConfig:
    """Keys of methods that train."""

    lr: float = setting(0.01, doc="learning rate", above=0)
    epochs: int = setting(10, doc="passes over the images to forget or to retain, whichever leads", min=1)
    batch_size: int = setting(256, doc="images of a batch", min=1)
    optimizer: str = setting("sgd", doc="rule", choices=("sgd", "adam", "adamw"))
    momentum: float = setting(0.9, doc="momentum of sgd", min=0, max=1)
    weight_decay: float = setting(5e-4, doc="decay of all that is trained", min=0)


class ApproximateMethod(ABC):
    """A way to change a learner so that it answers for a task as if that had not been learnt.

    A method works on a copy; what it trained replaces the learner's own tensors only when its checks have passed.
    Subclasses say what they do in :meth:`unlearn`. ``needs_retain`` is true for those that cannot work without images
    of kept tasks.

    Args:
        config: an instance of the class's ``Config``.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type]
    needs_retain: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def unlearn(self, work: Work) -> dict[str, Any]:
        """Change the copy; facts about what was done, as plain JSON."""

    def apply(self, learner: ContinualLearner, request: ApproximateRequest) -> ApproximateReport:
        """Carry out a request.

        Raises:
            UserError: images are missing or nothing of the learner is trained by gradients (exit code 2); a check
                failed (exit code 3). The learner is as it was then.
        """
        self._refuse_missing(request)
        started = time.perf_counter()
        eager = torch.compiler.set_stance("force_eager") if learner.backbone.compiled else nullcontext()
        with eager, torch.enable_grad():
            work = Work(learner, request, self.name)
            before, known = work.retained_accuracy(), work.forget_accuracy()
            facts = self.unlearn(work)
            checks = {**self._checks(work, request, before), **self._effect(work, known)}
        work.replace(learner)
        return ApproximateReport(
            method=self.name,
            steps=work.counted.steps,
            images=work.counted.images,
            seconds=time.perf_counter() - started,
            params=sum(p.numel() for p in work.parameters.values()),
            checks=checks,
            facts={
                "forget_images": len(request.forget),
                "retain_images": sum(len(images) for images in request.retain.values()),
                "moves_features": work.moves_features,
                "not_reached": work.unreached,
                **facts,
            },
        )

    def _effect(self, work: Work, before: float) -> dict[str, float]:
        """Accuracy on the images to forget before and after; a method that did not lower it says so."""
        after = work.forget_accuracy()
        if after >= before > 0:
            log.warning(
                "%s did not lower the accuracy on the images to forget: %.1f %% before, %.1f %% after; "
                "strengthen unlearning.%s, or use unlearning.method=rollback",
                self.name, 100 * before, 100 * after, self.name,
            )  # fmt: skip
        return {"forget_accuracy_before": before, "forget_accuracy_after": after}

    def _refuse_missing(self, request: ApproximateRequest) -> None:
        if not len(request.forget):
            raise UserError(
                "unlearning.method", f"approximate:{self.name}",
                f"no image of task {request.task.task_id} can be had to forget it by",
                "Give the data set back, or use unlearning.method=drop or rollback",
            )  # fmt: skip
        if self.needs_retain and not any(len(images) for images in request.retain.values()):
            able = [n for n in unlearning_methods.names() if not unlearning_methods.get(n).needs_retain]
            raise UserError(
                "unlearning.method", f"approximate:{self.name}", "it needs images of kept tasks, and none can be had",
                f"Use approximate: with one of {', '.join(able)}, or unlearning.method=rollback",
            )  # fmt: skip

    def _checks(self, work: Work, request: ApproximateRequest, before: float | None) -> dict[str, Any]:
        if not work.finite():
            raise UserError(
                "unlearning.method", f"approximate:{self.name}",
                "a number of the model stopped being finite; the model stays as it was",
                f"Weaken unlearning.{self.name}", exit_code=3,
            )  # fmt: skip
        after = work.retained_accuracy()
        if before is not None and after is not None and after < request.min_retain_ratio * before:
            raise UserError(
                "unlearning.min_retain_ratio", request.min_retain_ratio,
                f"{self.name} leaves {100 * after:.1f} % right on images of kept tasks, of {100 * before:.1f} % before;"
                " the model stays as it was",
                f"Weaken unlearning.{self.name}, or use unlearning.method=rollback", exit_code=3,
            )  # fmt: skip
        return {
            "finite": True,
            "retain_accuracy_before": before,
            "retain_accuracy_after": after,
            "retain_images": work.checked_images,
            "retain_split": work.checked_split,
            "min_retain_ratio": request.min_retain_ratio,
        }


def build_method(name: str, values: Mapping[str, Any] | None = None) -> ApproximateMethod:
    """The method ``name`` with the keys under ``unlearning.<name>``.

    Raises:
        UserError: an unknown name or key, or a value out of range.
    """
    cls = unlearning_methods.get(name)
    method: ApproximateMethod = cls(typed(cls.Config, values, f"unlearning.{name}"))
    return method
