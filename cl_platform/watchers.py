"""What looks on while a run trains, wired from its configuration: continual evaluation, gradients, cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from cl_platform.callbacks.continual_evaluation import FILE, ContinualEvaluation, GridSettings
from cl_platform.callbacks.cost_watch import CostWatch
from cl_platform.callbacks.gradient_decomposition import GradientDecomposition
from cl_platform.metrics.continual_log import parse
from cl_platform.representation import Representation
from cl_platform.results import Continual

if TYPE_CHECKING:
    from cl_platform.cost import Cost
    from cl_platform.learner import ContinualLearner
    from cl_platform.run_config import RunConfig
    from cl_platform.scenarios import Stream
    from cl_platform.strategies.phases import Phase


def irregular(stream: Stream, phases: Sequence[Phase]) -> str | None:
    """Why curves over the tasks of a run mean nothing, if that is so: a reason of ``metrics.json``."""
    if len(phases) < len(stream.tasks):
        return "joint_trains_once"
    return "starts_afresh" if any(phase.fresh for phase in phases) else None


class Watchers:
    """The run's onlookers as one.

    Args:
        config: the run's.
        stream: the tasks.
        phases: what is trained on, in order.
        updates: planned optimizer updates of each phase.
        folder: the run's.
        cost: the run's stopwatch.
        publish: called with (step, values by name), for loggers.
    """

    def __init__(
        self,
        config: RunConfig,
        stream: Stream,
        phases: Sequence[Phase],
        updates: Sequence[int],
        folder: Path,
        cost: Cost,
        publish: Callable[[int, Mapping[str, float]], None],
    ) -> None:
        self.config, self.stream, self.folder = config, stream, folder
        self.reason = irregular(stream, phases)
        self.evaluation: ContinualEvaluation | None = None
        self.gradients: GradientDecomposition | None = None
        self._cost = CostWatch(cost)
        if config.evaluation.grid != "off":
            planned = {phase.position: count for phase, count in zip(phases, updates, strict=True)}
            settings = self._settings([planned.get(position, 0) for position in range(len(stream.tasks))])
            self.evaluation = ContinualEvaluation(
                stream, config.seed, settings, folder, publish, lambda: cost.phase("eval_continual")
            )
        self.representation = Representation(stream, config.seed, folder) if config.diagnostics.representation else None
        self._timed = lambda: cost.phase("eval_boundary")
        if config.diagnostics.gradients == "switch":
            self.gradients = GradientDecomposition(folder, config.diagnostics.gradient_updates, publish)

    def _settings(self, updates: Sequence[int]) -> GridSettings:
        config, trainer = self.config.evaluation, self.config.trainer
        return GridSettings(
            name=config.grid if self.reason is None else "boundaries",
            k=config.k,
            images_per_task=config.images_per_task,
            max_overhead=config.max_overhead,
            max_rate=config.max_rate,
            min_per_task=config.min_per_task,
            reserve=config.reserve,
            updates=tuple(updates),
            images_per_update=trainer.batch_size * trainer.accumulate_grad_batches,
            loss=config.loss,
        )

    def callbacks(self) -> list[L.Callback]:
        """In the order in which Lightning is to call them."""
        found: Sequence[L.Callback | None] = (self._cost, self.evaluation, self.gradients)
        return [watcher for watcher in found if watcher is not None]

    def open(self) -> None:
        """Start the files of a new run."""
        for watcher in (self.evaluation, self.gradients):
            if watcher is not None:
                watcher.open()

    def reopen(self, position: int, state: Mapping[str, Any]) -> None:
        """Go on behind the task at ``position`` of a checkpoint with what :meth:`state` gave for it."""
        if self.evaluation is not None:
            self.evaluation.reopen(position, state["evaluation"])
        if self.representation is not None:
            self.representation.reopen(state["representation"])
        if self.gradients is not None:
            self.gradients.reopen(position)

    def forget(self, position: int) -> None:
        """Look no more at the task of a position, which was forgotten on request."""
        for watcher in (self.evaluation, self.representation):
            if watcher is not None:
                watcher.forget(position)

    def close(self) -> None:
        """Release the files."""
        for watcher in (self.evaluation, self.gradients):
            if watcher is not None:
                watcher.close()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as plain JSON."""
        evaluation = None if self.evaluation is None else self.evaluation.state()
        return {"evaluation": evaluation, "representation": self.representation and self.representation.records}

    def begin_task(self, learner: ContinualLearner, phase: Phase, step: int) -> None:
        """After all work that the start of a task needs, before its first update."""
        if self.evaluation is not None:
            self.evaluation.begin_task(learner, phase, step)

    def end_task(self, learner: ContinualLearner, phase: Phase, step: int) -> None:
        """After all work that the end of a task needs."""
        if self.evaluation is not None:
            self.evaluation.end_task(learner, phase, step)
        if self.representation is not None:
            with self._timed():
                self.representation.end_task(learner, phase.position)

    def continual(self, learner: ContinualLearner, forgotten: Collection[int] = ()) -> Continual:
        """What continual evaluation left, read back from its file; no average is over ``forgotten`` task ids."""
        config, evaluation = self.config.evaluation, self.evaluation
        if evaluation is None:
            return Continual(facts={"grid": config.grid}, further=self._further)
        forwards = 3 * learner.forwards_train
        facts = {
            "grid": evaluation.settings.name,
            "images_per_task": evaluation.images,
            "overhead": float(evaluation.tally.forwards_at_updates / forwards) if forwards else None,
        }
        read = parse((self.folder / FILE).read_text(), task_ids=[task.task_id for task in self.stream.tasks])
        window, tolerance = config.gap_window, config.gap_tolerance
        return Continual(read, facts, window, tolerance, self.reason, self._further, forgotten)

    def _further(self, space: str) -> dict[str, dict[str, Any]]:
        return {} if self.representation is None else self.representation.entries(space)
