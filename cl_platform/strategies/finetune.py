"""Plain training on each task in turn: the lower bound of continual learning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.strategies.base import Context, Needs, ParameterGroup, Step, Strategy


@dataclass(frozen=True)
class FinetuneConfig:
    """Keys of ``finetune``."""

    loss: str = setting("seen", doc="classes of the cross-entropy: all seen, or the task's", choices=("seen", "task"))
    trainable: list[str] | None = setting(None, doc="backbone parameters to train, as shell patterns; null: all")


@strategies.register("finetune")
class Finetune(Strategy):
    """All parameters, backbone and head, trained on each task without any protection.

    The cross-entropy runs over all classes seen so far (``loss=seen``), or over the task's own (``loss=task``), which
    forgets less because old head rows get no gradient.
    """

    name = "finetune"
    Config = FinetuneConfig
    needs = Needs(boundaries=False)
    owns = frozenset({"classification", "trainable"})
    leaks = frozenset({"L-01", "L-05", "L-07"})

    def attach(self, context: Context) -> None:
        """Find the parameters to train.

        Raises:
            UserError: a pattern matches no parameter.
        """
        super().attach(context)
        patterns = ["*"] if self.config.trainable is None else self.config.trainable
        self._names = set(context.backbone.matching(patterns, "strategy.finetune.trainable"))

    def trainable(self) -> Iterator[ParameterGroup]:
        """The chosen parameters of the backbone, and the head."""
        chosen = [p for name, p in self.context.backbone.model.named_parameters() if name in self._names]
        yield ParameterGroup([*chosen, *self.context.head.parameters()])

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy over the chosen classes."""
        return {"ce": step.cross_entropy(step.candidates if self.config.loss == "task" else step.seen_classes)}
