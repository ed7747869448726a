"""Forgetting after the fact: a run folder is opened at its newest checkpoint, asked for a price, and told to forget."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform import registry
from cl_platform.errors import UserError
from cl_platform.run import Course, carry_on
from cl_platform.run_config import parse
from cl_platform.run_folder import RunFolder, checkpoints, read_config
from cl_platform.scenarios.bare import Bare
from cl_platform.site import Site
from cl_platform.trainer import quiet_libraries
from cl_platform.unlearning import engine, journal
from cl_platform.unlearning.certificate import FILE
from cl_platform.unlearning.certificate import read as read_certificate

if TYPE_CHECKING:
    from cl_platform.run_config import RunConfig
    from cl_platform.scenarios import Stream
    from cl_platform.unlearning.choice import Choice
    from cl_platform.unlearning.engine import Wish

log = logging.getLogger("cl_platform")


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
        self._course: Course | None = None

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
        run = self._course = self._built()
        run.recall(self._checkpoint)
        run.learner.to(run.trainer.strategy.root_device)
        return engine.plan(Site(run), wish)[0]

    def carry_out(self, wish: Wish | None = None) -> Mapping[str, Any]:
        """Forget, or finish what was left open; the newest certificate.

        Raises:
            UserError: as :meth:`plan`, or what was to be done failed.
        """
        run, self._course = self._course or self._built(), None
        carry_on(run.config, self._folder, self._until, wish, run)
        self._checkpoint = next(checkpoints(self._folder.path), None)
        return read_certificate(self._folder.path / "unlearning" / FILE)[0]

    @property
    def _until(self) -> int | None:
        """Tasks that the run has behind it, where it is not finished."""
        if (self._folder.path / "metrics.json").exists():
            return None
        return 0 if self._checkpoint is None else self._checkpoint.position + 1

    def _built(self) -> Course:
        """The run; without images where its data are gone, and its own facts are there."""
        path = self._folder.path
        try:
            return Course(self._config, path, self._checkpoint, self._until)
        except UserError as missing:
            from cl_platform.trained import stream_without_images

            stream = stream_without_images(path)
            if stream is None:
                raise
            made = Course(replace(self._config, bare=Bare(stream, missing)), path, self._checkpoint, self._until)
            log.warning("the data of the run cannot be had (%s); only what needs none can be done", missing.key)
            return made


@contextmanager
def paused(path: Path, given: Stream | None = None) -> Iterator[Paused]:
    """Open a run folder.

    Args:
        path: the folder.
        given: the stream of a run that was started from Python with one.

    Raises:
        UserError: no run folder, or one that another process writes to.
    """
    quiet_libraries()
    config = configuration_of(path, given)
    folder = RunFolder(path)
    try:
        yield Paused(config, folder)
    finally:
        folder.close()


def configuration_of(path: Path, given: Stream | None = None) -> RunConfig:
    """The configuration of a run folder, for going on with it: in silence, without requests of its own.

    Args:
        path: the folder.
        given: the stream of a run that was started from Python with one.

    Raises:
        UserError: there is no run, or one with a strategy that nothing here registers.
    """
    config = parse(read_config(path))
    unknown = next((name for name in config.strategy if name not in registry.strategies), None)
    if unknown is not None:  # a class that a script or a notebook gave, or a plug-in that was uninstalled
        raise UserError(
            "run", path, f"its strategy {unknown} is not known here",
            "Install its plug-in, name the file that registers it as plugins in the run's config.yaml, or open the run "
            "from a program that registers it",
        )  # fmt: skip
    return replace(
        config,
        run_dir=None,
        resume=str(path),
        logger={},
        unlearning=replace(config.unlearning, requests=()),
        given=given,
    )
