"""A linear classifier on features of the frozen trunk: what every prompt method has to beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.strategies.base import Needs, ParameterGroup, Step, Strategy
from cl_platform.strategies.joint import arrange_by
from cl_platform.strategies.phases import Phase

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class LinearProbeConfig:
    """Keys of ``linear_probe``."""

    mode: str = setting("sequential", doc="task by task, or once on all data", choices=("sequential", "joint"))
    loss: str = setting("seen", doc="classes of the cross-entropy: all seen, or the task's", choices=("seen", "task"))


@strategies.register("linear_probe")
class LinearProbe(Strategy):
    """One linear head trained on features that are computed once, under the evaluation transform.

    With ``loss=task`` the head rows of other tasks get no gradient and belong to their task alone.
    """

    name = "linear_probe"
    Config = LinearProbeConfig
    needs = Needs(boundaries=False)
    owns = frozenset({"features", "classification", "trainable", "arrangement"})
    query = "only"
    leaks = frozenset({"L-01", "L-04"})

    def __init__(self, config: LinearProbeConfig) -> None:
        super().__init__(config)
        self._trained: list[nn.Parameter] = []
        if config.loss == "task" and config.mode == "sequential":
            self.leaks = frozenset()  # type: ignore[misc]

    def arrange(self, tasks: Sequence[Task]) -> list[Phase] | None:
        """The union at once for ``mode=joint``."""
        return arrange_by("once", tasks) if self.config.mode == "joint" else None

    def begin_task(self, task: Task) -> None:
        """Remember which head blocks this task trains."""
        head = self.context.head
        self._trained = head.parameters_for(task.classes if self.config.loss == "task" else head.classes)

    def trainable(self) -> Iterator[ParameterGroup]:
        """Head blocks only."""
        yield ParameterGroup(self._trained)

    def let_go(self) -> None:
        """See :class:`Strategy`."""
        self._trained = []

    def forward(self, batch: Batch) -> Tensor:
        """The kept features (B, D)."""
        return batch.extra["query"]

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy over the chosen classes."""
        return {"ce": step.cross_entropy(step.candidates if self.config.loss == "task" else step.seen_classes)}
