"""Backward feature projection (Gu et al., CVPR 2023): old features stay a linear function of new ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cl_platform.batch import Batch, constant
from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.heads import columns_of
from cl_platform.random_streams import seeded_globals
from cl_platform.registry import strategies
from cl_platform.strategies.base import Context, Needs, ParameterGroup, Pass, Step, Strategy
from cl_platform.strategies.feature_distillation import LOSSES, feature_distance

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

log = logging.getLogger("cl_platform")

PROJECTORS = ("identity", "linear", "mlp")
ROWS = ("reuse", "fresh", "current_only", "replay_old")


@dataclass(frozen=True)
class BFPConfig:
    """Keys of ``bfp``."""

    alpha: float = setting(1.0, doc="weight of the distance", min=0)
    loss: str = setting("mfro", doc="distance of projected and old features", choices=LOSSES)
    projector: str = setting("linear", doc="what maps new features to old ones", choices=PROJECTORS)
    rows: str = setting(
        "reuse", doc="rows compared: current and replayed ones, with a draw of its own, or one kind only", choices=ROWS
    )
    teacher_logits: bool = setting(False, doc="stored logits give way to those of the learner before the task")
    lr: float = setting(0.1, doc="learning rate of the projector, by SGD whatever the run's rule is", above=0)
    momentum: float = setting(0.9, doc="momentum of the projector", min=0, max=1)


def new_projector(kind: str, width: int) -> nn.Module:
    """A map of features (B, D) to (B, D): itself, a linear layer with bias, or two with a ReLU between them."""
    if kind == "identity":
        return nn.Identity()
    first = nn.Linear(width, width)
    return first if kind == "linear" else nn.Sequential(first, nn.ReLU(), nn.Linear(width, width))


def projected(projector: nn.Module, features: Tensor) -> Tensor:
    """Features (B, D) through the projector, in float32 at least also under autocast; an identity leaves every bit."""
    if isinstance(projector, nn.Identity):
        return features
    with torch.autocast(features.device.type, enabled=False):
        return projector(features.to(torch.promote_types(features.dtype, torch.float32)))


def masked_distance(new: Tensor, old: Tensor, wanted: Tensor, loss: str) -> Tensor:
    """:func:`feature_distance` over the rows at which ``wanted`` (B,) is true; 0 if there are none.

    Rows left out are put where the teacher has them, so that no number of rows has to be known on the host.
    """
    new = torch.where(wanted[:, None], new, old.to(new.dtype))
    return feature_distance(new, old, loss) * (len(wanted) / wanted.sum().clamp(min=1))


@strategies.register("bfp")
class BFP(Strategy):
    """Adds ``alpha * D(A h(x) + a, h_old(x))``, with ``h`` the features before the head and ``h_old`` the teacher's.

    The projector ``(A, a)`` is drawn anew for each task from the second on, trained with the features by SGD of its
    own, and gone when the task ends. The teacher is the learner at the end of the task before, in eval mode, on the
    same augmented view. The released code compares rows of a further draw (``rows=fresh``) and, with DER++, matches
    the teacher's logits in place of the stored ones (``teacher_logits``).
    """

    name = "bfp"
    Config = BFPConfig
    needs = Needs(buffer=True, teacher=True)
    leaks = frozenset({"L-01", "L-14"})
    stability = frozenset({"features"})
    _said = False

    def __init__(self, config: BFPConfig) -> None:
        super().__init__(config)
        self.needs = Needs(  # type: ignore[misc]
            buffer=config.rows != "current_only" or config.teacher_logits,
            teacher=config.alpha > 0 or config.teacher_logits,
        )
        self.projector: nn.Module | None = None
        self._rule: torch.optim.Optimizer | None = None
        self._old_classes: list[int] = []  # those that the teacher knows
        self._asked: list[Pass] = []  # what the teacher has answered in the running step

    def attach(self, context: Context) -> None:
        """Look for the buffer.

        Raises:
            UserError: there is none before this strategy, or its owner stores no logits that could give way.
        """
        super().attach(context)
        if self.needs.buffer and context.buffer is None:
            raise UserError(
                "strategy", self.name, "bfp needs a replay buffer, of a strategy that stands before it",
                "Write strategy=[er,bfp], or set strategy.bfp.rows=current_only",
            )  # fmt: skip
        if self.config.teacher_logits:
            if context.buffer.num_logits is None:
                raise UserError(
                    "strategy.bfp.teacher_logits", True, "the replay strategy before it stores no logits",
                    "Leave it out, or replay with der or derpp",
                )  # fmt: skip
            context.targets = self._by_teacher

    def begin_task(self, task: Task) -> None:
        """Draw a projector, once there is something to project to."""
        context = self.context
        self._asked, self._old_classes = [], []
        if context.teacher is None or not context.teacher.ready:
            return
        device = next(context.head.parameters()).device
        self._old_classes = context.teacher.classes
        self._old_ids = torch.tensor(self._old_classes, device=device)
        if not self.config.alpha:
            return
        with seeded_globals(context.seed, task.task_id, "projector"):
            self.projector = new_projector(self.config.projector, context.head.feature_dim).to(device)
        if self.config.projector != "identity":
            self._rule = torch.optim.SGD(self.projector.parameters(), self.config.lr, self.config.momentum)

    def trainable(self) -> Iterator[ParameterGroup]:
        """The projector, at a rate of zero: the run's rule scales and clears its gradient, its own one moves it."""
        if self._rule is not None and self.projector is not None:
            yield ParameterGroup(list(self.projector.parameters()), lr_scale=0.0, weight_decay=0.0)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The distance, from the second task on.

        Raises:
            UserError: the features are frozen, so that they cannot move.
        """
        if self.config.alpha and not step.features.requires_grad:
            raise UserError(
                "strategy", self.name, "the features are frozen in this run and cannot move",
                "Leave bfp out, or train the backbone",
            )  # fmt: skip
        if self.projector is None:
            return {}
        compared, wanted = self._compared(step)
        if not compared:
            return {}
        old = torch.cat([self._teach(chosen.batch).features for chosen in compared])
        new = projected(self.projector, torch.cat([chosen.features for chosen in compared]))
        loss = self.config.loss
        value = feature_distance(new, old, loss) if wanted is None else masked_distance(new, old, wanted, loss)
        self._asked = []
        return {"features": self.config.alpha * value}

    def _compared(self, step: Step) -> tuple[list[Pass], Tensor | None]:
        """The passes to compare, and which of their rows; ``None``: all."""
        first, *others = step.passes
        mixed = bool(step.host.is_replay.any())  # remembered images among those of the loader, known on the host
        rows = self.config.rows
        if rows in ("reuse", "replay_old") and not (mixed or others or len(first.batch) > step.current):
            self._say_nothing_is_replayed()
        if rows == "reuse":
            return step.passes, None
        if rows == "replay_old":
            chosen = [first.rows(0 if mixed else step.current, len(first.batch)), *others]
            chosen = [part for part in chosen if len(part.batch)]
            wanted = [part.batch.is_replay & torch.isin(part.batch.labels, self._old_ids) for part in chosen]
            return chosen, torch.cat(wanted) if wanted else None
        current = first.rows(0, step.current)
        if rows == "current_only":
            return [current], ~current.batch.is_replay if mixed else None
        drawn = self.context.draw()
        if drawn is None:
            return [current], None
        further = step.forward(drawn)
        step.passes.pop()  # it is for this term alone: what others compare does not depend on their place in the list
        return [current, further], None

    def _say_nothing_is_replayed(self) -> None:
        if not self._said and len(self.context.buffer):
            self._said = True
            log.warning(
                "bfp: the strategy before it replays nothing before the backward pass, so that strategy.bfp.rows=%s "
                "compares no replayed image. Set strategy.bfp.rows=fresh", self.config.rows,
            )  # fmt: skip

    def _teach(self, batch: Batch) -> Pass:
        """What the teacher makes of a batch; one that it has seen in this step is not asked again."""
        for answer in self._asked:
            if answer.batch.images is batch.images:
                return answer
        assert self.context.teacher is not None
        return self.context.teacher(batch)

    def _by_teacher(self, replayed: Batch) -> Batch:
        """The draw with the teacher's logits as targets, over the classes it knows; as stored in the first task."""
        if not self._old_classes:
            return replayed
        assert self.context.teacher is not None
        answer = self.context.teacher(replayed)
        self._asked = [*self._asked, answer] if self.config.alpha else []
        stored, known = torch.zeros_like(replayed.extra["stored"]), torch.zeros_like(replayed.extra["known"])
        columns = constant(columns_of(self._old_classes, self.context.head.classes), stored.device)
        stored.index_copy_(1, columns, answer.logits.to(stored.dtype))
        known.index_fill_(1, columns, True)
        return replayed.with_extra(stored=stored, known=known)

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
        """Move the projector by the gradient of the same backward pass, after the model.

        An update that is skipped because a number is not finite leaves it no gradient.
        """
        if self._rule is None or self.projector is None:
            return
        gradients = [p.grad for p in self.projector.parameters() if p.grad is not None]
        if not gradients:
            return
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        for gradient in gradients:
            gradient.copy_(torch.where(finite, gradient, 0.0))
        self._rule.step()

    def end_task(self, task: Task) -> None:
        """Let go of the projector."""
        self.projector, self._rule, self._asked = None, None, []
