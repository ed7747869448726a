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
    """A run's folder, locked while the run writes to it; the kernel releases the lock when the process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")  # noqa: SIM115  # held open for the life of the run
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
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        sync(final.parent)
        return final

    def remove_checkpoints(self) -> None:
        """Delete all checkpoints, for a run that starts over in its folder."""
        shutil.rmtree(self.path / "checkpoints")
        (self.path / "checkpoints").mkdir()


def checkpoints(run: Path) -> Iterator[Checkpoint]:
    """Intact checkpoints of a run, newest first; a broken one is named in the log and passed over."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    found = []
    for folder in (run / "checkpoints").glob("task_*"):
        suffix = folder.name.removeprefix("task_")
        if suffix.isdigit():
            found.append((int(suffix), folder))
    for position, folder in sorted(found, reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text())
            blob = (folder / "model.safetensors").read_bytes()
            if hashlib.sha256(blob).hexdigest() != state["model_sha256"]:
                raise ValueError("the digest of model.safetensors does not match")
            yield Checkpoint(position, load(blob), state)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            log.warning("checkpoint %s is damaged and passed over: %s", folder, error)


def new_run_path(root: Path, scenario: str, strategy: str) -> Path:
    """A new empty folder ``root/<scenario>/<strategy>/<date>_<time>``, with a counter where that one is taken.

    Raises:
        UserError: ``root`` cannot be written.
    """
    base = root / scenario / strategy / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    path, number = base, 2
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir()
                return path
            except FileExistsError:  # runs that start in the same second, maybe in other processes
                path, number = base.with_name(f"{base.name}_{number}"), number + 1
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise UserError("output_root", root, reason, "Choose another folder") from error


def latest_run(root: Path, scenario: str, strategy: str) -> Path | None:
    """The newest run folder of a scenario and strategy that has no ``metrics.json`` yet."""
    folder = root / scenario / strategy
    if not folder.is_dir():
        return None
    open_runs = [p for p in folder.iterdir() if (p / "config.yaml").exists() and not (p / "metrics.json").exists()]
    return max(open_runs, key=lambda p: p.name, default=None)
