"""What verification of a forgotten task needs from the layers above it: learners, trainings, requests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform.building import build_learner
from cl_platform.run_config import parse
from cl_platform.scenarios import build_stream
from cl_platform.trainer import build_trainer, quiet_libraries
from cl_platform.unlearning.verify import Workshop

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import Stream


def workshop() -> Workshop:
    """Learners and trainings as runs make them."""
    quiet_libraries()
    return Workshop(build=build, train=train, forget=forget)


def build(raw: Mapping[str, Any]) -> tuple[ContinualLearner, Stream]:
    """A learner that has learnt nothing, with the run's precision and on its device, and the stream.

    Args:
        raw: a resolved configuration.
    """
    config = parse(dict(raw))
    stream = build_stream(config.scenario, config.data, config.seed)
    learner = build_learner(config, stream)
    learner.trainer = build_trainer(config.trainer, [])
    learner.to(learner.trainer.strategy.root_device)
    return learner, stream


def train(raw: dict[str, Any], folder: Path) -> None:
    """Train a resolved configuration into a folder, from where it stopped if it was begun.

    Args:
        raw: a resolved configuration; its ``run_dir`` is the folder.
        folder: of the run.
    """
    from cl_platform.run import run

    run(parse({**raw, "run_dir": str(folder), "resume": "auto"}))


def forget(folder: Path, task_id: int, method: str) -> None:
    """Let a finished run forget a task.

    Args:
        folder: of the run.
        task_id: the task.
        method: ``drop``, ``rollback`` or ``approximate:<name>``.
    """
    from cl_platform.requests import paused
    from cl_platform.unlearning.engine import Wish

    with paused(folder) as run:
        run.carry_out(Wish(task_id, method))
