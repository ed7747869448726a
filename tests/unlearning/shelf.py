"""Finished runs of a few digits, trained once for a test file and copied for each test that changes them."""

import shutil
from pathlib import Path

from cl_platform.cli.compose import compose
from cl_platform.requests import paused
from cl_platform.run import RunResult, run
from cl_platform.run_config import parse
from cl_platform.run_folder import checkpoint_positions
from cl_platform.unlearning.engine import Wish

SMALL = (
    "scenario.train_per_class=6", "scenario.test_per_class=4", "trainer.max_epochs=1", "trainer.progress=false",
    "trainer.batch_size=6", "report.html=false", "report.tensorboard_figures=false", "logger=[csv]",
    "evaluation=every", "evaluation.images_per_task=4",
)  # fmt: skip


class Shelf:
    """Runs by their words.

    Args:
        folder: where the untouched ones stay.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, ...], Path] = {}

    def reference(self, *words: str) -> Path:
        """A run folder that nobody changes."""
        if words not in self._made:
            path = self._folder / str(len(self._made))
            learn(path, *words)
            self._made[words] = path
        return self._made[words]

    def copy(self, to: Path, *words: str) -> Path:
        """A copy of the run at ``to``."""
        shutil.copytree(self.reference(*words), to)
        return to


def learn(path: Path, *words: str) -> RunResult:
    """Train, or go on with ``resume=auto``."""
    return run(parse(compose([*SMALL, *words, f"run_dir={path}"])))


def forget(path: Path, task_id: int, method: str):
    """Forget after the fact; the certificate."""
    with paused(path) as folder:
        return folder.carry_out(Wish(task_id, method))


def newest(path: Path) -> Path:
    """Tensors of the newest checkpoint."""
    return path / "checkpoints" / f"task_{checkpoint_positions(path)[-1]}" / "model.safetensors"
