"""Forgetting after the fact: a run folder is opened at its newest checkpoint, asked for a price, and told to forget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cl_platform.errors import UserError
from cl_platform.run import Course, carry_on
from cl_platform.run_config import parse
from cl_platform.run_folder import RunFolder, checkpoints
from cl_platform.site import Site
from cl_platform.trainer import quiet_libraries
from cl_platform.unlearning import engine, journal
from cl_platform.unlearning.certificate import FILE
from cl_platform.unlearning.certificate import read as read_certificate

if TYPE_CHECKING:
    from cl_platform.run_config import RunConfig
    from cl_platform.unlearning.choice import Choice
    from cl_platform.unlearning.engine import Wish


class Paused:
    """A run folder between two tasks, locked.

    Args:
        config: of the run, for going on with it in silence.
        folder: the run's.

    Raises:
        UserError: no task of the run was finished.
    """

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._config, self._folder = config, folder
        self._checkpoint = next(checkpoints(folder.path), None)

    @property
    def unfinished(self) -> int | None:
        """The task of a request that a crash left open, or ``None``."""
        opened = journal.find(self._folder.path)
        return None if opened is None else opened.facts["task_id"]

    def plan(self, wish: Wish) -> Choice:
        """What would be done and what it would cost; nothing is changed.

        Raises:
            UserError: the task cannot be forgotten, or not so.
        """
        if self._checkpoint is None:
            raise UserError(
                "run", self._folder.path, "no task of it was finished, so there is nothing to forget",
                "Delete the folder, or let the run finish a task",
            )  # fmt: skip
        run = Course(self._config, self._folder.path, self._checkpoint, None)
        run.recall(self._checkpoint)
        run.learner.to(run.trainer.strategy.root_device)
        return engine.plan(Site(run), wish)[0]

    def carry_out(self, wish: Wish | None = None) -> Mapping[str, Any]:
        """Forget, or finish what was left open; the newest certificate.

        Raises:
            UserError: as :meth:`plan`, or what was to be done failed.
        """
        finished = (self._folder.path / "metrics.json").exists()
        position = -1 if self._checkpoint is None else self._checkpoint.position
        carry_on(self._config, self._folder, None if finished else position + 1, wish)
        return read_certificate(self._folder.path / "unlearning" / FILE)[0]


@contextmanager
def paused(path: Path) -> Iterator[Paused]:
    """Open a run folder.

    Raises:
        UserError: no run folder, or one that another process writes to.
    """
    quiet_libraries()
    config = configuration_of(path)
    folder = RunFolder(path)
    try:
        yield Paused(config, folder)
    finally:
        folder.close()


def configuration_of(path: Path) -> RunConfig:
    """The configuration of a run folder, for going on with it: in silence, without requests of its own.

    Raises:
        UserError: there is no run.
    """
    file = path / "config.yaml"
    if not file.is_file():
        hint = "Name the folder that a run printed as its run folder"
        raise UserError("run", path, "holds no config.yaml, so it is no run folder", hint)
    config = parse(yaml.safe_load(file.read_text()))
    return replace(
        config, run_dir=None, resume=str(path), logger={}, unlearning=replace(config.unlearning, requests=())
    )
