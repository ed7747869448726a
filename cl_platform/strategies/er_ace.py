"""ER with asymmetric cross-entropy (Caccia et al., ICLR 2022): new images do not push old classes away."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.heads import cross_entropy
from cl_platform.registry import strategies
from cl_platform.strategies.base import Context, Needs, Step
from cl_platform.strategies.replay import Replay, ReplayConfig


@dataclass(frozen=True)
class ERACEConfig(ReplayConfig):
    """Keys of ``er_ace``."""

    task_free: bool | None = setting(
        None, doc="replay and mask from the first batch on, not the second task; null: where the stream is online"
    )


@strategies.register("er_ace")
class ERACE(Replay):
    """``CE`` of the incoming images over the classes of their own batch, plus ``CE`` of replayed ones over all seen.

    The two terms have a forward pass each and equal weight. The released code masks by comparing class numbers and so
    counts on classes that arrive in ascending order; here the classes of the batch are what counts.
    """

    name = "er_ace"
    Config = ERACEConfig
    needs = Needs(boundaries=False)
    owns = frozenset({"buffer", "classification"})
    leaks = frozenset({"L-01", "L-05", "L-10"})
    stability = frozenset({"replay"})

    def attach(self, context: Context) -> None:
        """Take the learner's parts.

        Raises:
            UserError: ``task_free=false`` where the whole stream is one task.
        """
        super().attach(context)
        if self.config.task_free is False and not context.boundaries:
            key = f"strategy.{self.name}.task_free"
            raise UserError(key, False, "with hidden bounds the whole stream is the first task", f"Set {key}=true")

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Both terms; a plain cross-entropy in the first task unless ``task_free``."""
        task_free = self.context.online if self.config.task_free is None else self.config.task_free
        if not task_free and step.task.position == 0:
            return {"ce": step.cross_entropy(step.seen_classes)}
        present = sorted(set(step.host.labels.tolist()))
        terms = {"ce": step.cross_entropy(present)}
        replayed = self.draw()
        if replayed is not None:
            logits = step.forward(replayed).logits
            terms["replay"] = cross_entropy(logits, replayed.labels, step.seen_classes)
        return terms
