"""One run: configuration -> stream, learner, trainer; the loop over tasks is here and only here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_platform import efficiency, environment
from cl_platform.building import build_learner, check_future, check_sizes, instructions_of, stream_of
from cl_platform.callbacks.interruption import Interrupted, Interruption
from cl_platform.callbacks.passage import Passage
from cl_platform.callbacks.private_unlearning import PrivateUnlearning
from cl_platform.callbacks.progress import StreamProgress
from cl_platform.callbacks.tensorboard import boards
from cl_platform.cost import Cost, duration
from cl_platform.energy import EnergyMeter, gpus_of
from cl_platform.errors import UserError
from cl_platform.estimate import estimate_seconds
from cl_platform.evaluation import count_correct
from cl_platform.learner import ContinualLearner
from cl_platform.loggers import build_loggers, check_loggers
from cl_platform.plan import Plan
from cl_platform.results import Results
from cl_platform.resume import locate
from cl_platform.run_config import RunConfig
from cl_platform.run_folder import Checkpoint, RunFolder, checkpoints, to_json, to_yaml
from cl_platform.scenarios import Stream, StreamLoader, facts
from cl_platform.site import Site
from cl_platform.strategies.phases import Phase
from cl_platform.trainer import build_trainer, explained_memory, quiet_libraries
from cl_platform.unlearning import forgotten
from cl_platform.unlearning.engine import Wish
from cl_platform.watchers import Watchers, irregular

log = logging.getLogger("cl_platform")


@dataclass
class RunResult:
    """What a finished run hands back.

    Attributes:
        path: the run folder.
        metrics: content of ``metrics.json``.
        cost: content of ``cost.json``.
        learner: after the last task.
        stream: the tasks.
    """

    path: Path
    metrics: dict[str, Any]
    cost: dict[str, Any]
    learner: ContinualLearner
    stream: Stream


def run(config: RunConfig) -> RunResult:
    """Train, evaluate, save: everything that ``train.py`` does, as a function.

    Raises:
        UserError: for input that cannot be run; nothing is left on disk then.
        Interrupted: Ctrl-C or SIGTERM, after the running step.
    """
    result = carry_on(config)
    assert result is not None
    return result


def carry_on(
    config: RunConfig, folder: RunFolder | None = None, until: int | None = None, wish: Wish | None = None,
    built: Course | None = None,
) -> RunResult | None:  # fmt: skip
    """A run to its end, or to a bound between two of its tasks.

    Args:
        config: the run's.
        folder: the run folder, where the caller has locked it already.
        until: tasks that are learnt, or passed, when it stops; ``None``: all.
        wish: what is forgotten before anything more is learnt.
        built: the run, where the caller has made it from the newest checkpoint already.

    Returns:
        ``None`` where the run stopped before its end.
    """
    quiet_libraries()
    check_loggers(config.logger)
    path, checkpoint = locate(config)
    locked, fresh = folder, not path.exists()
    try:
        while True:
            made = built or Course(config, path, checkpoint, until)
            try:
                locked = made.folder = locked or RunFolder(path, fresh)
            except FileExistsError:  # a run that started in the same second has it
                path, checkpoint = locate(config)
                continue
            result = made.execute(wish)
            if not made.unlearning.replaced:
                return result
            checkpoint, wish, built = next(checkpoints(path), None), None, None
            if until is not None:
                until = 0 if checkpoint is None else checkpoint.position + 1
    finally:
        if folder is None and locked is not None:
            locked.close()


class Course:
    """The parts of one run and the loop over its phases; made anew when its history is replaced."""

    folder: RunFolder

    def __init__(self, config: RunConfig, path: Path, checkpoint: Checkpoint | None, until: int | None) -> None:
        self.config, self.path, self.checkpoint = config, path, checkpoint
        self.cost = cost = Cost()
        self.record = forgotten.after(path, None if checkpoint is None else checkpoint.state)
        self.instructions = instructions_of(config, self.record)
        with cost.phase("data"):
            self.stream = stream = stream_of(config, self.record, self.instructions)
        check_future(config, stream)
        with cost.phase("setup"):
            self.learner = learner = build_learner(config, stream)
            self.plan = plan = Plan(config.trainer, config.seed, stream, learner.composition)
            check_sizes(config.trainer, plan.phases, learner)
            self.interruption = Interruption()
            self.trainer = build_trainer(config.trainer, [self.interruption])
        self.phases = plan.phases
        self.until = len(stream.tasks) if until is None else until
        self.results = Results(stream, trains_once=irregular(stream, plan.looks) == "joint_trains_once")
        self.trained_epochs = 0
        self.digest = learner.backbone.digest()
        self.loggers: list[Any] = []
        self.watchers = Watchers(config, stream, plan.looks, plan.steps, path, cost, self._publish)
        self._attend(learner)
        self.task_costs: list[dict[str, Any]] = []
        self.saved: tuple[int, Phase] | None = None  # what the newest checkpoint is of
        self.unlearning = PrivateUnlearning(Site(self), config.unlearning, self.instructions)

    def execute(self, wish: Wish | None = None) -> RunResult | None:
        """Learn what is ahead; ``None`` where the run stops before its end, or goes on from another history."""
        self.log_file = handler = self._opened_log()
        try:
            first = self._prepare(self.checkpoint)
            self.interruption.install()
            if self.config.trainer.progress:
                self.progress.start()
            try:
                self.unlearning.settle(wish)
                if not self.unlearning.replaced:  # only now: an open request exchanges files as it found them
                    self.folder.write(facts.FILE, to_json(facts.facts_of(self.stream, self.record.ids)))
                self._loop(first)
                if self.saved is not None and not self.unlearning.replaced:
                    self._write_results()
            finally:  # a bar left running would hide the cursor behind a refusal
                self.progress.stop()
            if self.unlearning.replaced:
                return None
            return self._finish() if self.until == len(self.stream.tasks) else None
        except Interrupted as stop:
            stop.folder = self.folder.path
            done = len(self.learner.learnt)
            log.warning("stopped after %d of %d tasks", done, len(self.phases))
            raise
        finally:
            self.interruption.remove()
            self.watchers.close()
            log.removeHandler(handler)
            handler.close()

    def _opened_log(self) -> logging.Handler:
        handler = logging.FileHandler(self.folder.path / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        return handler

    def _prepare(self, checkpoint: Checkpoint | None) -> int:
        """Trainer, bar, first files; the first phase to train."""
        config, learner = self.config, self.learner
        self.loggers = build_loggers(config.logger, self.folder.path)
        self.trainer.loggers = self.loggers
        self.boards = boards(
            self.loggers, self.folder.path, config.report.tensorboard_figures, self.watchers.reason is None
        )
        learner.trainer = self.trainer
        learner.to(self.trainer.strategy.root_device)
        self.cost.measure_energy(EnergyMeter(gpus_of(learner.device)))
        self.trainer.callbacks[:0] = self.watchers.callbacks()  # type: ignore[attr-defined]
        if checkpoint is None:
            self.folder.remove_checkpoints()
            self.watchers.open()
            for board in self.boards:
                board.open(config.raw)
            self.folder.write("config.yaml", to_yaml(config.raw))
        else:
            self.recall(checkpoint)
            self.watchers.reopen(checkpoint.position, checkpoint.state["evaluation"])
            done, phase = self.stream.tasks[checkpoint.position].task_id, checkpoint.state["phase"]
            log.info("resumed after task %d (%d of %d)", done, phase + 1, len(self.phases))
        made_with = environment.describe(config.seed, self.stream, learner.backbone, self.digest, learner.transforms.id)
        if config.bare is None:
            self.folder.write("environment.json", to_json(made_with))
        first = 0 if checkpoint is None else checkpoint.state["phase"] + 1
        plan = self.plan
        self.progress = StreamProgress(sum(plan.steps), len(plan.looks), done=plan.done(first))
        if config.trainer.progress:
            self.trainer.callbacks.append(self.progress)  # type: ignore[attr-defined]
        epochs = plan.epochs * plan.passes
        size, images = config.trainer.batch_size, plan.images_from(first)
        seconds = estimate_seconds(learner, self.phases[first:], self.stream, epochs, size, images)
        name = f"{config.strategy_name} on {self.stream.name}, {len(self.stream.tasks)} tasks"
        log.info("%s: about %s of training; run folder %s", name, duration(seconds), self.folder.path)
        return first

    def _publish(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(dict(values), step=step)

    def _loop(self, first: int) -> None:
        for number in range(first, len(self.phases)):
            phase = self.phases[number]
            if self.unlearning.replaced or phase.position >= self.until:
                return
            looks = self.plan.looks if self.plan.through else [phase]
            if phase.fresh:
                self._start_afresh()
            self._announce(looks[0])
            steps = self.learner.steps
            with self.cost.phase("boundary"):
                self.unlearning.begin_task(phase.task)
                self.learner.begin_task(phase.task, self.plan.epochs, self.trained_epochs)
            with self.cost.phase("report"):
                self.task_costs.append(efficiency.task_flops(self.learner))
            if number == first and self.learner.composition.needs_gradient:
                log.info("task %d %s", phase.task.task_id, efficiency.trained_share(self.learner))
            self.watchers.begin_task(self.learner, looks[0], self.learner.steps)
            if self.learner.composition.needs_gradient:
                self._fit(phase)
            self.interruption.check()
            with self.cost.phase("boundary"), explained_memory(self.config.trainer):
                self.learner.end_task(phase.task)
                self.unlearning.learnt(phase.task)
            self.cost.updates += self.learner.steps - steps
            for file, text in self.learner.composition.artefacts().items():
                self.folder.write(file, text)
            self.task_costs[-1] |= efficiency.task_sizes(self.learner)
            self._close(looks[-1])
            self.save(number, looks[-1])
            self.interruption.check()
            self.unlearning.end_task()

    def _announce(self, look: Phase) -> None:
        self.progress.begin_task(look.position, self._task_name(look), look.task.task_id)

    def _close(self, look: Phase) -> None:
        """Onlookers and the whole test sets after a task's last update."""
        self.watchers.end_task(self.learner, look, self.learner.steps)
        self.evaluate(look)

    def _pass(self, position: int) -> None:
        """From a task of the scenario to the next, inside a training that does not notice."""
        self._close(self.plan.looks[position])
        following = self.plan.looks[position + 1]
        self._announce(following)
        self.watchers.begin_task(self.learner, following, self.learner.steps)

    def _start_afresh(self) -> None:
        before = self.learner
        self.learner = build_learner(self.config, self.stream)
        self.learner.forwards_train, self.learner.images_forwarded = before.forwards_train, before.images_forwarded
        self.learner.further_updates = before.further_updates
        self._attend(self.learner)
        self.learner.trainer = self.trainer
        self.learner.to(self.trainer.strategy.root_device)

    def _attend(self, learner: ContinualLearner) -> None:
        """Tell a learner what only the run knows."""
        learner.context.planned_updates = sum(self.plan.updates)
        learner.timed = lambda: self.cost.phase("train")

    def _task_name(self, phase: Phase) -> str:
        names = [self.stream.class_names[c] for c in phase.task.classes]
        return f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"

    def _fit(self, phase: Phase) -> None:
        loader = self.plan.loader(phase, self.learner.composition.training_set(phase.task))
        if isinstance(loader, StreamLoader):
            self.trainer.callbacks.append(Passage(loader.ends(), self._pass))  # type: ignore[attr-defined]
        self.trained_epochs += self.plan.epochs
        self.trainer.fit_loop.max_epochs = self.trained_epochs
        with self.cost.phase("train"), explained_memory(self.config.trainer):
            self.trainer.fit(self.learner, train_dataloaders=loader)
        self.cost.images_trained += self.plan.images(phase)

    def evaluate(self, phase: Phase) -> None:
        """Fill the matrix's row after a phase from the whole test sets."""
        seen = self.stream.tasks if self.config.evaluation.future_tasks else self.stream.tasks[: phase.position + 1]
        with self.cost.phase("eval_boundary"):
            counts = count_correct(self.learner, self.results.kept(seen))
        self.results.add(phase.position, counts)
        self._write_results()
        values = {**self.results.curves(phase.position), **self.results.diagnostics.scalars()}
        self._publish(self.learner.steps, values)
        with self.cost.phase("report"):
            for board in self.boards:
                board.end_task(self.learner.steps)
        self.progress.end_task(self.results.line(phase.position))
        log.debug("%s", self.results.line(phase.position))

    def _write_results(self) -> None:
        self.folder.write("accuracy_matrix.csv", self.results.csv())
        self.folder.write("confusion.json", to_json(self.results.diagnostics.confusion()))

    @property
    def passed(self) -> int:
        """Tasks of the stream that the newest checkpoint has behind it."""
        return 0 if self.saved is None else self.saved[1].position + 1

    def save(self, number: int, phase: Phase) -> None:
        """Write the checkpoint after a phase."""
        self.saved = (number, phase)
        with self.cost.phase("checkpoint"):
            self.folder.save_checkpoint(phase.position, self.learner.learnt_state(), self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors, as plain JSON."""
        assert self.saved is not None
        return {
            "phase": self.saved[0],
            "trained_epochs": self.trained_epochs,
            "learnt": self.learner.learnt,
            "forgotten": self.record.to_json(),
            "unlearning": self.unlearning.state(),
            "results": self.results.to_json(),
            "loops": self.trainer.fit_loop.state_dict(),
            "cost": self.cost.state(),
            "task_costs": self.task_costs,
            "forwards_train": self.learner.forwards_train,
            "images_forwarded": self.learner.images_forwarded,
            "further_updates": self.learner.further_updates,
            "evaluation": self.watchers.state(),
            "backbone_sha256": self.digest,
            "backbone_frozen": self.learner.backbone.frozen,
        }

    def recall(self, checkpoint: Checkpoint) -> None:
        """Put back what a checkpoint holds, in memory."""
        state = checkpoint.state
        if state["backbone_sha256"] != self.digest:
            why = "the backbone's weights are not those the run started with"
            raise UserError("resume", self.path, why, "Use the same backbone")
        self.learner.restore(checkpoint.tensors, state["learnt"], state["backbone_frozen"])
        self.unlearning.load_state(state["unlearning"])
        self.learner.forwards_train = state["forwards_train"]
        self.learner.images_forwarded = state["images_forwarded"]
        self.learner.further_updates = state["further_updates"]
        self.results.load_json(state["results"])
        self.trained_epochs = state["trained_epochs"]
        self.cost.load_state(state["cost"])
        self.task_costs = list(state["task_costs"])
        self.trainer.fit_loop.load_state_dict(state["loops"])
        self.saved = (state["phase"], next(p for p in self.plan.looks if p.position == checkpoint.position))
        for task_id in self.record.in_place:
            self.watchers.forget(self.stream.task(task_id).position)

    def _report(self) -> None:
        """Draw what the folder holds; a failure there costs no result."""
        if not self.config.report.html:
            return
        from cl_platform.report.html import write_report

        try:
            write_report(self.folder.path)
        except Exception:
            log.warning("report.html could not be written", exc_info=True)

    def _finish(self) -> RunResult:
        with self.cost.phase("report"):
            continual = self.watchers.continual(self.learner, self.results.forgotten)
            metrics = self.results.metrics(self.learner.composition.inspect(), continual)
            self.folder.write("metrics.json", to_json(metrics))
            self.cost.forwards_train = self.learner.forwards_train
            self.cost.images_forwarded_train = self.learner.images_forwarded
            if self.watchers.evaluation is not None:
                self.cost.forwards_eval = self.watchers.evaluation.tally.forwards
            cost = self.cost.report(
                cache_evictions=self.learner.cache.evictions,
                **efficiency.summary(self.learner, self.task_costs, self.stream.tasks),
            )
            self.folder.write("cost.json", to_json(cost))
        for board in self.boards:
            board.finish(self.config.raw, metrics, cost)
        self._report()
        for logger in self.loggers:
            logger.finalize("success")
        return RunResult(self.folder.path, metrics, cost, self.learner, self.stream)
