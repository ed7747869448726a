"""Training on all data together: the upper bound of continual learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.strategies.base import Component, Needs, ParameterGroup, Step, Strategy
from cl_platform.strategies.phases import Phase, all_at_once, growing_union

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

MODES = ("once", "scratch", "continue")


def arrange_by(mode: str, tasks: Sequence[Task]) -> list[Phase]:
    """Phases of a joint mode: ``once`` on everything, ``scratch`` or ``continue`` on the growing union."""
    return all_at_once(tasks) if mode == "once" else growing_union(tasks, fresh=mode == "scratch")


@dataclass(frozen=True)
class JointConfig:
    """Keys of ``joint``."""

    mode: str = setting("once", doc="one training on all; a new one per row; or a warm start per row", choices=MODES)


@strategies.register("joint")
class Joint(Strategy):
    """All parameters trained on the mixed data of all tasks (``once``) or of the tasks so far (other modes)."""

    name = "joint"
    Config = JointConfig
    needs = Needs(boundaries=False)
    owns = frozenset({"classification", "trainable", "arrangement"})
    leaks = frozenset({"L-01"})

    def arrange(self, tasks: Sequence[Task]) -> list[Phase]:
        """One phase on the union, or one per growing union."""
        return arrange_by(self.config.mode, tasks)

    def trainable(self) -> Iterator[ParameterGroup]:
        """Everything."""
        yield self.context.whole_network()

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy over all classes of the union."""
        return {"ce": step.cross_entropy(step.seen_classes)}

    def components(self) -> Iterator[Component]:
        """Joint training keeps nothing per task."""
        return iter(())
