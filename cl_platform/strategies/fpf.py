"""FPF (Zhao et al., ICML 2023): after training, the modules that forget most are fine-tuned on the buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.strategies.base import Component, Context, Needs, Step, Strategy
from cl_platform.strategies.prone import Prone, ProneConfig

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

WHEN = ("end", "each_task", "every_k_steps")


@dataclass(frozen=True)
class FPFConfig(ProneConfig):
    """Keys of ``fpf``."""

    when: str = setting("end", doc="after the last task, after each, or every so many updates", choices=WHEN)
    every: int = setting(
        1000, doc="when=every_k_steps: updates between two fine-tunings", min=1, only_with=("when", ("every_k_steps",))
    )


@strategies.register("fpf")
class FPF(Strategy):
    """Beside a strategy with a buffer: a few modules are trained on the buffer alone, for a short time.

    A fine-tuning comes before any strategy takes anchors, statistics or a copy of the learner at the end of a task. Its
    updates count among the run's. How far modules move within tasks and from task to task is measured meanwhile, and
    saved as ``fpf_sensitivity.csv``.
    """

    name = "fpf"
    Config = FPFConfig
    needs = Needs(buffer=True, boundaries=False)
    leaks = frozenset({"L-01", "L-15"})

    def __init__(self, config: FPFConfig) -> None:
        super().__init__(config)
        self.prone = Prone(self.name, config)
        if config.modules != "auto":
            self.leaks = self.leaks - {"L-15"}  # type: ignore[misc]

    def attach(self, context: Context) -> None:
        """Take the learner's parts."""
        super().attach(context)
        self.prone.attach(context)

    def check(self) -> None:
        """Refuse modules that are not there."""
        self.prone.check()

    @property
    def foresees(self) -> str:
        """The end, where it fine-tunes there alone."""
        return "end" if self.config.when == "end" else "nothing"

    def further_updates(self, planned: Sequence[int]) -> list[int]:
        """Those of the fine-tunings in each phase."""
        if self.config.when == "every_k_steps":
            ends = [sum(planned[: i + 1]) // self.config.every for i in range(len(planned))]
            return [self.config.steps * (end - start) for start, end in zip([0, *ends], ends, strict=False)]
        always = self.config.when == "each_task"
        return [self.config.steps * (always or i == len(planned) - 1 or self._at_end(i)) for i in range(len(planned))]

    def _at_end(self, position: int) -> bool:
        return position == self.context.length - 1 or position in self.context.ends

    def begin_task(self, task: Task) -> None:
        """Get ready to measure."""
        self.prone.begin_task(task)

    def widen(self, batch: Batch) -> Batch:
        """Adds nothing; the first batch of a task starts the measurement."""
        self.prone.before_batch()
        return batch

    def after_backward(self, step: Step) -> None:
        """Look at the gradients."""
        self.prone.after_backward()

    def after_update(self, step: Step) -> None:
        """Count."""
        self.prone.after_update()
        self._due = self.config.when == "every_k_steps" and self.prone.updates % self.config.every == 0

    def after_batch(self, step: Step) -> None:
        """Measure; with ``every_k_steps`` fine-tune behind the batch that completes the k-th update."""
        self.prone.after_batch(step)
        if self._due:
            self._due = False
            self.prone.finetune()

    _due = False

    def refine(self, task: Task) -> None:
        """Fine-tune after the last batch of a task, or of the last one."""
        self.prone.end_training(task)
        if self.config.when == "each_task" or (self.config.when == "end" and self._at_end(task.position)):
            self.prone.finetune()

    def components(self) -> Iterator[Component]:
        """What was measured."""
        yield self.prone.components("prone")

    def further_parameters(self) -> Iterator[nn.Parameter]:
        """The whole head may be chosen, whatever the task trains."""
        yield from self.context.head.parameters()

    def drop_task(self, task_id: int) -> None:
        """Remove the task's numbers."""
        self.prone.drop_task(task_id)

    def artefacts(self) -> dict[str, str]:
        """The table of sensitivities."""
        return {f"{self.name}_sensitivity.csv": self.prone.table()}

    def inspect(self) -> dict[str, Any]:
        """How often it was fine-tuned."""
        return self.prone.facts()
