"""k-FPF (Zhao et al., ICML 2023): plain training, and k short fine-tunings of the modules that forget most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.memory.samplers import SAMPLERS
from cl_platform.registry import strategies
from cl_platform.strategies.base import Component, Context, Needs, Step
from cl_platform.strategies.prone import Prone, ProneConfig
from cl_platform.strategies.replay import Replay, ReplayConfig

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class KFPFConfig(ProneConfig, ReplayConfig):
    """Keys of ``k_fpf``."""

    k: int | None = setting(None, doc="fine-tunings of the run; null: as many as tasks", min=1)
    every: int | None = setting(None, doc="updates between two fine-tunings, in place of k", min=1)
    steps: int = setting(100, doc="updates of a fine-tuning", min=0)
    batch_size: int | None = setting(None, doc="replayed images of an update; null: trainer.batch_size", min=1)
    sampler: str = setting("class_balanced", doc="how rows are drawn", choices=SAMPLERS)


def triggers(updates: int, k: int) -> list[int]:
    """Updates after which to fine-tune: ``ceil(j * updates / k)`` for j = 1..k."""
    return [-(-j * updates // k) for j in range(1, k + 1)]


@strategies.register("k_fpf")
class KFPF(Replay):
    """The buffer is filled while all parameters are trained on current batches alone, and read in fine-tunings only.

    These come after update ``ceil(j T / k)`` of the ``T`` planned ones, whatever task is being trained; after every
    ``every`` updates if that is given; and where the length of the run is not known, after each task.
    """

    name = "k_fpf"
    Config = KFPFConfig
    needs = Needs(boundaries=False)
    leaks = frozenset({"L-01", "L-10", "L-15"})

    def __init__(self, config: KFPFConfig) -> None:
        super().__init__(config)
        self.stores_logits = config.kd > 0  # type: ignore[misc]
        self.prone = Prone(self.name, config)
        if config.modules != "auto":
            self.leaks = self.leaks - {"L-15"}  # type: ignore[misc]
        self._due = False

    def attach(self, context: Context) -> None:
        """Make room for the buffer."""
        super().attach(context)
        self.prone.attach(context)

    def check(self) -> None:
        """Refuse modules that are not there."""
        self.prone.check()

    @property
    def foresees(self) -> str:
        """The length, which it divides unless told after how many updates it fine-tunes."""
        return "length" if self.config.every is None else "nothing"

    def further_updates(self, planned: Sequence[int]) -> list[int]:
        """Those of the fine-tunings in each phase."""
        ends = [sum(planned[: i + 1]) for i in range(len(planned))]
        places = self._places(ends[-1])
        return [
            self.config.steps * sum(start < place <= end for place in places)
            for start, end in zip([0, *ends], ends, strict=False)
        ]

    def _places(self, updates: int) -> list[int]:
        if self.config.every is not None:
            return list(range(self.config.every, updates + 1, self.config.every))
        return triggers(updates, self.config.k or self.context.num_tasks) if updates else []

    def begin_task(self, task: Task) -> None:
        """Get ready to measure."""
        super().begin_task(task)
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
        self._due = True

    def after_batch(self, step: Step) -> None:
        """Offer the batch; fine-tune behind it where it completed one of the chosen updates."""
        super().after_batch(step)
        self.prone.after_batch(step)
        if not self._due:
            return
        self._due, done, planned = False, self.prone.updates, self.context.planned_updates
        places = self._places(done if self.config.every is not None else planned)
        for _ in range(places.count(done)):
            self.prone.finetune(self.config.exclude_current)

    def refine(self, task: Task) -> None:
        """Fine-tune after the task where nothing says how long the run will be."""
        self.prone.end_training(task)
        if self.config.every is None and not self.context.planned_updates and self.prone.updates:
            self.prone.finetune(self.config.exclude_current)

    def components(self) -> Iterator[Component]:
        """The buffer, and what was measured."""
        yield from super().components()
        yield self.prone.components("prone")

    def further_parameters(self) -> Iterator[nn.Parameter]:
        """The whole head may be chosen, whatever the task trains."""
        yield from self.context.head.parameters()

    def drop_task(self, task_id: int) -> None:
        """Remove the task's rows and numbers."""
        super().drop_task(task_id)
        self.prone.drop_task(task_id)

    def artefacts(self) -> dict[str, str]:
        """The table of sensitivities."""
        return {f"{self.name}_sensitivity.csv": self.prone.table()}

    def inspect(self) -> dict[str, Any]:
        """How full the buffer is, and how often it was fine-tuned."""
        return {**super().inspect(), **self.prone.facts()}
