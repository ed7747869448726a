"""What a run leaves on disk: atomic writes, a lock, checkpoints, and finding what to resume."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from cl_platform.errors import UserError
from cl_platform.files import sync, write_atomically

log = logging.getLogger("cl_platform")


def to_json(value: Any) -> str:
    """Readable JSON with a fixed layout; NaN and infinity are refused."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def to_yaml(value: Any) -> str:
    """Readable YAML, keys in their order."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def read_config(run: Path) -> dict[str, Any]:
    """The resolved configuration that stands in a run folder.

    Raises:
        UserError: no run folder, or a damaged file.
    """
    import yaml

    try:
        content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = "it has no readable config.yaml" if run.is_dir() else "there is no such folder"
        hint = "Name the folder that a run printed as its run folder"
        raise UserError("run", run, f"is no run folder: {why}", hint) from error
    if not isinstance(content, dict):
        raise UserError("run", run, "its config.yaml cannot be understood", "Restore the file")
    return content


@dataclass(frozen=True)
class Checkpoint:
    """State after a finished task.

    Attributes:
        position: place of that task in the stream.
        tensors: learnt state by key.
        state: everything else, as plain JSON.
    """

    position: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]


class RunFolder:
    """A run's folder, locked while the run writes to it; the kernel releases the lock when the process dies.

    Args:
        path: the folder.
        fresh: it was not there when it was chosen.

    Raises:
        FileExistsError: a fresh one is there by now: another run of the same second has it.
        UserError: it cannot be written, or another run is writing to it.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        try:
            if fresh:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")  # noqa: SIM115  # held open for the life of the run
        except FileExistsError:
            if fresh and path.is_dir():
                raise
            raise UserError("run_dir", path, "cannot be written (not a folder)", "Choose another folder") from None
        except OSError as error:
            raise UserError(
                "run_dir", path, f"cannot be written ({error.strerror})", "Choose another folder with run_dir=FOLDER"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "run_dir", path, "another run is writing to it", "Wait for it, or choose another"
            ) from error
        self._mend()

    def _mend(self) -> None:
        """Finish what a crash interrupted while a checkpoint was exchanged."""
        for old in (self.path / "checkpoints").glob(".task_*.old"):
            final = old.with_name(old.name[1:].removesuffix(".old"))
            if final.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, final)
        for torn in (self.path / "checkpoints").glob(".task_*.tmp"):
            shutil.rmtree(torn)

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()
        (self.path / ".lock").unlink(missing_ok=True)

    def write(self, name: str, content: str) -> None:
        """Write a text file of the run."""
        write_atomically(self.path / name, content)

    def save_checkpoint(self, position: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
        """Write ``checkpoints/task_<position>``: it appears complete or not at all."""
        from safetensors.torch import save

        final = self.path / "checkpoints" / f"task_{position}"
        temporary = final.with_name(f".task_{position}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        blob = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        write_atomically(temporary / "model.safetensors", blob)
        digest = hashlib.sha256(blob).hexdigest()
        write_atomically(temporary / "state.json", to_json({"position": position, "model_sha256": digest, **state}))
        old = final.with_name(f".task_{position}.old")
        if final.exists():
            os.rename(final, old)  # put back by the next start if a crash comes before the new one is there
        os.rename(temporary, final)
        sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
        return final

    def remove_checkpoints(self) -> None:
        """Delete all checkpoints, for a run that starts over in its folder."""
        shutil.rmtree(self.path / "checkpoints")
        (self.path / "checkpoints").mkdir()


def checkpoint_positions(run: Path) -> list[int]:
    """Positions of the checkpoints that a run has, ascending; whether they are intact is not looked at."""
    names = (folder.name.removeprefix("task_") for folder in (run / "checkpoints").glob("task_*"))
    return sorted(int(name) for name in names if name.isdigit())


def checkpoints(run: Path) -> Iterator[Checkpoint]:
    """Intact checkpoints of a run, newest first; a broken one is named in the log and passed over."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    for position in reversed(checkpoint_positions(run)):
        folder = run / "checkpoints" / f"task_{position}"
        try:
            state = json.loads((folder / "state.json").read_text())
            blob = (folder / "model.safetensors").read_bytes()
            if hashlib.sha256(blob).hexdigest() != state["model_sha256"]:
                raise ValueError("the digest of model.safetensors does not match")
            yield Checkpoint(position, load(blob), state)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged and passed over: %s", folder, error)


def new_run_path(root: Path, scenario: str, strategy: str) -> Path:
    """``root/<scenario>/<strategy>/<date>_<time>``, with a counter where that one is taken."""
    base = root / scenario / strategy / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}_{number}"), number + 1
    return path


def latest_run(root: Path, scenario: str, strategy: str) -> Path | None:
    """The newest run folder of a scenario and strategy that has no ``metrics.json`` yet."""
    folder = root / scenario / strategy
    if not folder.is_dir():
        return None
    open_runs = [p for p in folder.iterdir() if (p / "config.yaml").exists() and not (p / "metrics.json").exists()]
    return max(open_runs, key=lambda p: p.name, default=None)
