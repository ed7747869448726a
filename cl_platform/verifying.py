"""What verification of a forgotten task needs from the layers above it: learners, trainings, requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform.building import build_learner, instructions_of, stream_of
from cl_platform.environment import git_commit
from cl_platform.run_config import parse
from cl_platform.trainer import build_trainer, quiet_libraries
from cl_platform.unlearning.forgotten import Record
from cl_platform.unlearning.verify import Workshop

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import Stream


def workshop(given: Stream | None = None) -> Workshop:
    """Learners and trainings as runs make them.

    Args:
        given: the stream of a run that was started from Python with one.
    """
    quiet_libraries()
    return Workshop(
        build=partial(build, given=given),
        train=partial(train, given=given),
        forget=partial(forget, given=given),
        code=str(git_commit()),
    )


def build(raw: Mapping[str, Any], given: Stream | None = None) -> tuple[ContinualLearner, Stream]:
    """A learner that has learnt nothing, with the run's precision and on its device, and the stream.

    Args:
        raw: a resolved configuration.
        given: as for :func:`workshop`.
    """
    config = replace(parse(dict(raw)), given=given)
    record = Record()  # what the run forgot is among the keys of the configuration
    stream = stream_of(config, record, instructions_of(config, record))
    learner = build_learner(config, stream)
    learner.trainer = build_trainer(config.trainer, [])
    learner.to(learner.trainer.strategy.root_device)
    return learner, stream


def train(raw: dict[str, Any], folder: Path, given: Stream | None = None) -> None:
    """Train a resolved configuration into a folder, from where it stopped if it was begun.

    Args:
        raw: a resolved configuration; its ``run_dir`` is the folder.
        folder: of the run.
        given: as for :func:`workshop`.
    """
    from cl_platform.run import run

    run(replace(parse({**raw, "run_dir": str(folder), "resume": "auto"}), given=given))


def forget(folder: Path, task_id: int, method: str, given: Stream | None = None) -> None:
    """Let a finished run forget a task.

    Args:
        folder: of the run.
        task_id: the task.
        method: ``drop``, ``rollback`` or ``approximate:<name>``.
        given: as for :func:`workshop`.
    """
    from cl_platform.requests import paused
    from cl_platform.unlearning.engine import Wish

    with paused(folder, given) as run:
        run.carry_out(Wish(task_id, method))
