"""How a run passes over its stream: epochs, loaders, planned updates, and which task evaluation follows when."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from cl_platform.scenarios import StreamLoader, TaskLoader, as_told
from cl_platform.strategies.phases import Phase, one_per_task
from cl_platform.trainer import batches_of

if TYPE_CHECKING:
    from cl_platform.run_config import TrainerConfig
    from cl_platform.scenarios import ImageSet, Stream
    from cl_platform.strategies.composition import Composition


class Plan:
    """What is known before the first update.

    Args:
        config: keys below ``trainer``.
        seed: the run's seed.
        stream: the scenario's tasks.
        composition: the strategies.

    Attributes:
        phases: what the strategies are trained on, in order.
        through: one training, which is told of no task, runs through the scenario's tasks one by one.
        epochs: of each phase; 0 for closed forms.
        passes: how often a task's images come inside the one epoch of a stream with hidden bounds.
        looks: what evaluation follows: the phases, or the scenario's tasks where a training runs ``through`` them.
        updates: optimizer updates on the stream's batches during each of ``looks``.
        steps: those, and the updates outside Lightning's loop: what the axis of steps grows by.
    """

    def __init__(self, config: TrainerConfig, seed: int, stream: Stream, composition: Composition) -> None:
        self._config, self._seed, self._tasks = config, seed, stream.tasks
        trained = composition.needs_gradient
        told = as_told(stream).tasks
        self.phases = composition.arrange(told)
        self.through = stream.hidden and trained and self.phases[0].task is told[0]
        if stream.hidden:  # whatever is trained on, all tasks are behind it then
            self.phases = [replace(phase, position=len(stream.tasks) - 1) for phase in self.phases]
        times = 1 if stream.online else config.max_epochs
        self.passes = times if self.through else 1
        self.epochs = (1 if self.through else times) if trained else 0
        learnt = [phase.task for phase in self.phases]
        self._sizes = {
            phase.position: composition.training_size(learnt[: k + 1]) for k, phase in enumerate(self.phases)
        }
        self.looks = one_per_task(stream.tasks) if self.through else self.phases
        self.updates = self._updates()
        further = composition.further_updates([sum(self.updates)] if self.through else self.updates)
        further = [0] * (len(self.updates) - len(further)) + further
        self.steps = [count + more for count, more in zip(self.updates, further, strict=True)]

    def loader(self, phase: Phase, images: ImageSet | None = None) -> TaskLoader:
        """Batches of a phase.

        Args:
            phase: one of the plan's.
            images: what an epoch passes over, such as the composition's ``training_set``; the task's own by default.
        """
        config, task = self._config, phase.task
        if not self.through:
            images = task.train if images is None else images
            return TaskLoader(images, task.task_id, config.batch_size, self._seed, drop_last=config.drop_last)
        return StreamLoader(self._tasks, task, config.batch_size, self._seed, self.passes, config.drop_last)

    def images(self, phase: Phase) -> int:
        """Training images of a phase, as often as they come."""
        return self._sizes[phase.position] * self.epochs * self.passes

    def images_from(self, first: int) -> int:
        """Training images of one epoch of each phase from number ``first`` on."""
        return sum(self._sizes[phase.position] for phase in self.phases[first:])

    def done(self, phases: int) -> int:
        """Steps of the first ``phases`` phases."""
        return sum(self.steps) if self.through and phases else sum(self.steps[:phases])

    def _updates(self) -> list[int]:
        each = self._config.accumulate_grad_batches
        if not self.through:
            batches = [batches_of(self._sizes[phase.position], self._config) for phase in self.phases]
            return [self.epochs * -(-count // each) for count in batches]
        loader = self.loader(self.phases[0])
        *ends, last = loader.ends() if isinstance(loader, StreamLoader) and len(loader) else [0]
        counts = [0, *(end // each for end in ends), -(-last // each)]
        return [after - before for before, after in pairwise(counts)]
