"""A run as the unlearning engine sees it: what is known of it, and what only a run can do."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform.building import build_learner, instructions_of, stream_of
from cl_platform.environment import git_commit, package_version
from cl_platform.evaluation import count_correct
from cl_platform.plan import Plan
from cl_platform.run_folder import checkpoint_positions, checkpoints, to_json
from cl_platform.scenarios.cache import kept_at
from cl_platform.unlearning.certificate import Run as RunFacts
from cl_platform.unlearning.engine import Contents
from cl_platform.unlearning.forgotten import Forgotten, Record

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.metrics import Cell
    from cl_platform.run import Course
    from cl_platform.scenarios import Stream
    from cl_platform.unlearning.config import UnlearningConfig
    from cl_platform.unlearning.rollback import Way

log = logging.getLogger("cl_platform")


class Site:
    """Stands between a run and the engine.

    Args:
        run: at a bound between tasks whenever the engine asks.
    """

    def __init__(self, run: Course) -> None:
        self._run = run

    @property
    def path(self) -> Path:
        """The run folder."""
        return self._run.path

    @property
    def config(self) -> UnlearningConfig:
        """Keys of ``unlearning``."""
        return self._run.config.unlearning

    @property
    def stream(self) -> Stream:
        """The run's stream by now."""
        return self._run.stream

    @property
    def learner(self) -> ContinualLearner:
        """The live learner."""
        return self._run.learner

    @property
    def record(self) -> Record:
        """What was forgotten by now."""
        return self._run.record

    @property
    def passed(self) -> int:
        """Tasks of the stream that were learnt, or learnt and forgotten in place."""
        return self._run.passed

    @property
    def lineage(self) -> str:
        """Whether writes were held against the owner records: ``verified``, ``declared`` or ``violated``."""
        return self._run.unlearning.lineage

    def data_cache(self) -> list[Path] | None:
        """Where the cache outside the run holds the decoded images of its data set; ``None`` where nobody can tell."""
        if self._run.config.bare is not None:
            return None
        sets = [part for task in self.stream.tasks for part in (task.train, task.validation, task.test)]
        return sorted({path for part in sets for path in kept_at(part.source)})

    def facts(self) -> RunFacts:
        """Which run it is."""
        config = self._run.config
        text = json.dumps(config.raw, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
        return RunFacts(
            config_sha256=hashlib.sha256(text.encode()).hexdigest(),
            version=package_version(),
            git_commit=git_commit(),
            scenario=self.stream.name,
            strategy=tuple(config.strategy),
        )

    def twin(self) -> ContinualLearner:
        """Another learner in the same state."""
        state = {name: tensor.clone() for name, tensor in self.learner.learnt_state().items()}
        made = build_learner(self._run.config, self.stream).to(self.learner.device)
        made.restore(state, self.learner.learnt, self.learner.backbone.frozen)
        return made

    def restored(self, folder: Path) -> ContinualLearner:
        """The learner of the newest checkpoint of a folder; one that learnt nothing where there is none."""
        made = build_learner(self._run.config, self.stream).to(self.learner.device)
        checkpoint = next(checkpoints(folder), None)
        if checkpoint is not None:
            made.restore(checkpoint.tensors, checkpoint.state["learnt"], checkpoint.state["backbone_frozen"])
        return made

    def price(self, way: Way) -> tuple[int, int]:
        """Training images and optimizer updates of a rollback's stages.

        Raises:
            UserError: data of a task are missing.
        """
        run = self._run
        self._refuse_bare()
        ids = [task.task_id for task in self.stream.tasks]
        gone = [task_id for task_id in (*run.record.ids, *ids) if task_id not in way.order]
        record = Record(tuple(Forgotten(task_id, "", "", None, False) for task_id in gone))
        config = run.config
        stream = stream_of(config, record, instructions_of(config, record))
        plan = Plan(config.trainer, config.seed, stream, self.learner.composition)
        pairs = zip(plan.phases, plan.steps, strict=True)
        stages = [(phase, steps) for phase, steps in pairs if way.base < phase.position < way.until]
        return sum(plan.images(phase) for phase, _ in stages), sum(steps for _, steps in stages)

    def _refuse_bare(self) -> None:
        if self._run.config.bare is not None:
            raise self._run.config.bare.missing

    def spent(self) -> Mapping[str, Any]:
        """What the run has cost so far."""
        return self._run.cost.state()

    def take_note(self, record: Record, task_id: int) -> None:
        """The learner has forgotten a task: it leaves all results, in memory."""
        self._run.record = record
        self._run.results.forget(task_id)
        self._run.watchers.forget(self.stream.task(task_id).position)

    def contents(self) -> Contents:
        """What the run would write now."""
        run = self._run
        confusion = to_json(run.results.diagnostics.confusion())
        files = {"accuracy_matrix.csv": run.results.csv(), "confusion.json": confusion}
        return Contents(run.passed - 1, self.learner.learnt_state(), run.state(), files)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """No file of the run is open inside the block, so that each can be exchanged."""
        run = self._run
        state = run.watchers.state()
        run.watchers.close()
        log.removeHandler(run.log_file)
        run.log_file.close()
        for logger in run.loggers:
            logger.finalize("success")
        try:
            yield
        finally:
            log.addHandler(run.log_file)  # opens its file again with the next line
            if run.passed:
                run.watchers.reopen(run.passed - 1, state)

    def relearn(self, staging: Path, until: int) -> None:
        """Learn the stream of a folder up to a number of tasks, from its newest checkpoint.

        Raises:
            UserError: data of a task are missing.
        """
        from cl_platform.run import carry_on

        if max(checkpoint_positions(staging), default=-1) + 1 < until:
            self._refuse_bare()

        self._run.progress.stop()  # the relearning shows a bar of its own
        config = self._run.config
        quiet = replace(config.unlearning, requests=())
        carry_on(replace(config, run_dir=str(staging), resume="auto", unlearning=quiet), until=until)

    def answers(self, anew: bool) -> dict[str, dict[int, Cell]]:
        """Right answers by prediction space: task id -> (right, images) of the test sets of all tasks that are held.

        Args:
            anew: the learner has changed since the newest task's row was evaluated.
        """
        run = self._run
        if not anew:
            return run.results.newest()
        held = run.results.kept(self.stream.tasks[: self.passed])
        with run.cost.phase("eval_boundary"):
            counts = count_correct(self.learner, held)
        ids = [task.task_id for task in held]
        return {
            space: dict(zip(ids, zip(right, counts.total, strict=True), strict=True))
            for space, right in counts.correct.items()
        }

    def write(self, name: str, text: str) -> None:
        """Write a file of the run folder."""
        self._run.folder.write(name, text)

    def look_again(self) -> None:
        """Evaluate the newest task's row anew, and save."""
        assert self._run.saved is not None
        self._run.results.take_back()
        self._run.evaluate(self._run.saved[1])
        self._run.save(*self._run.saved)
