"""Learning without forgetting (Li & Hoiem 2016): the learner before the task answers beside the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.config import setting
from cl_platform.heads import columns_of, picked
from cl_platform.registry import strategies
from cl_platform.strategies.base import Needs, Step, Strategy

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class LwFConfig:
    """Keys of ``lwf``."""

    alpha: float = setting(1.0, doc="weight of the distillation", min=0)
    temperature: float = setting(2.0, doc="T, divides both sides' logits before the softmax", above=0)
    scale_t2: bool = setting(False, doc="multiply the distillation by T^2")
    ce_on: str = setting(
        "seen", doc="classes of the cross-entropy: all seen, or the task's own", choices=("seen", "new")
    )
    warmup_epochs: int = setting(0, doc="first epochs of a later task that train its new head rows only", min=0)


def distillation(new: Tensor, old: Tensor, temperature: float, scale_t2: bool = False) -> Tensor:
    """``KL(softmax(old / T) || softmax(new / T))``, mean over the rows, in float32 at least.

    mammoth minimises the cross-entropy instead of the divergence: the same gradient, a value larger by the teacher's
    entropy.

    Args:
        new: logits (B, S_old) of the learner over the classes that the teacher knew.
        old: logits (B, S_old) of the teacher.
        temperature: T.
        scale_t2: multiply by T^2, which keeps the gradient's size when T changes.
    """
    learner, teacher = (
        (z.to(torch.promote_types(z.dtype, torch.float32)) / temperature).log_softmax(1) for z in (new, old)
    )
    divergence = F.kl_div(learner, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2 if scale_t2 else divergence


@strategies.register("lwf")
class LwF(Strategy):
    """Adds ``alpha * KL`` between the teacher's and the learner's answers to the current images, old classes only.

    The teacher is the learner at the end of the task before, in eval mode, on the same augmented view. Where the task
    is known at test time, every old task's head has a divergence of its own, and they add. Logits of new classes take
    no part. During ``warmup_epochs``, which count among the task's epochs, nothing but the task's new head rows is
    trained; the released code trains them for as many epochs beforehand, and asks its teacher only then.
    """

    name = "lwf"
    Config = LwFConfig
    leaks = frozenset({"L-01", "L-04", "L-14"})
    needs = Needs(teacher=True)
    stability = frozenset({"kd"})

    def __init__(self, config: LwFConfig) -> None:
        super().__init__(config)
        roles = {"classification": config.ce_on == "new", "gradient": config.warmup_epochs > 0}
        self.owns = frozenset(role for role, owned in roles.items() if owned)  # type: ignore[misc]
        self._old_heads: list[list[int]] = []
        self._new_rows: list[nn.Parameter] = []

    def begin_task(self, task: Task) -> None:
        """Look up which classes the teacher knows."""
        teacher, blocks = self.context.teacher, self.context.head.blocks
        assert teacher is not None
        known = set(teacher.classes) if teacher.ready else set()
        heads = [list(blocks.numbers(task_id, "classes")) for task_id in blocks.task_ids]
        heads = [head for head in heads if known.issuperset(head)]
        self._old_heads = heads if self.context.setting == "task" or not heads else [[c for h in heads for c in h]]
        grown = bool(known) and task.task_id in blocks
        self._new_rows = list(blocks.parameters_of(task.task_id).values()) if grown else []

    def let_go(self) -> None:
        """See :class:`Strategy`."""
        self._new_rows = []

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The distillation from the second task on, and the cross-entropy where it is this strategy's."""
        terms = {}
        if self.config.ce_on == "new":
            terms["ce"] = step.cross_entropy()
        if self._old_heads and self.config.alpha and not self._warming_up(step):
            terms["kd"] = self.config.alpha * self._kd(step)
        return terms

    def _kd(self, step: Step) -> Tensor:
        teacher, current = self.context.teacher, step.passes[0].rows(0, step.current)
        assert teacher is not None
        old = teacher(current.batch)
        known = sorted(c for head in self._old_heads for c in head)
        total = [
            distillation(
                picked(current.logits, columns_of(head, step.seen_classes)),
                picked(old.logits, columns_of(head, known)),
                self.config.temperature,
                self.config.scale_t2,
            )
            for head in self._old_heads
        ]
        return torch.stack(total).sum()

    def _warming_up(self, step: Step) -> bool:
        return bool(self._new_rows) and step.epoch < self.config.warmup_epochs

    def after_backward(self, step: Step) -> None:
        """During the warm-up, leave gradients to the new head rows alone; the optimizer skips all others."""
        if self._warming_up(step):
            kept = {id(parameter) for parameter in self._new_rows}
            for parameter in self.context.trained().values():
                if id(parameter) not in kept:
                    parameter.grad = None
