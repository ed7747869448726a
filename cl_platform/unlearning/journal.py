"""The open request on disk: what is planned, the contents that will replace others, and the salt, until it is over.

    unlearning/open/request.json    what was asked
    unlearning/open/salt            16 random bytes; nowhere else, and gone when the request is over
    unlearning/open/staged/         new contents of files of the run folder
    unlearning/open/plan.json       what becomes of every file, and the certificate but for its end

Until ``plan.json`` is there, nothing of the run has been touched and the request can be worked out again from the
start. From then on it can only be finished, by whoever finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform.errors import UserError
from cl_platform.files import sync, write_atomically
from cl_platform.run_folder import to_json
from cl_platform.unlearning.audit import now_utc
from cl_platform.unlearning.certificate_fields import problems

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "unlearning/open"
SALT_BYTES = 16
CHUNK = 1 << 22


@dataclass(frozen=True)
class FileAction:
    """What is to become of a file of the run folder.

    Attributes:
        path: relative to the run folder.
        action: ``delete``, ``rewrite`` or ``keep``.
        reason: why, as a sentence without its full stop.
        bytes: size before; 0 for a file that is new.
        sha256_before: of the content before, salted unless the file is kept; ``None`` for a file that is new.
        sha256_after: of the new content of a rewritten file, of the content of a kept one.
        staged: where the new content lies, relative to the run folder.
        bytes_after: size of the new content.
    """

    path: str
    action: str
    reason: str
    bytes: int
    sha256_before: str | None = None
    sha256_after: str | None = None
    staged: str | None = None
    bytes_after: int = 0


def file_digest(path: Path, salt: bytes = b"", length: int | None = None) -> str:
    """SHA-256 of salt and content, read in pieces; of the first ``length`` bytes, if given."""
    digest = hashlib.sha256(salt)
    left = length
    with open(path, "rb") as file:
        while block := file.read(CHUNK if left is None else min(CHUNK, left)):
            digest.update(block)
            left = None if left is None else left - len(block)
    return digest.hexdigest()


class Journal:
    """An open request; made by :func:`begin`, found again by :func:`find`.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / FOLDER
        request = json.loads((self.folder / "request.json").read_text())
        self.request_id: str = request["request_id"]
        self.created_utc: str = request["created_utc"]
        self.facts: dict[str, Any] = request["facts"]
        self.salt = (self.folder / "salt").read_bytes()

    @property
    def ready(self) -> bool:
        """Whether the plan is on disk: it must be carried out then, and not be made again."""
        return (self.folder / "plan.json").exists()

    def stage(self, path: str, content: bytes) -> str:
        """Keep the new content of a file; returns where, relative to the run folder.

        Raises:
            OSError: the disk is full; nothing of the run was touched.
        """
        target = self.folder / "staged" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)
        return f"{FOLDER}/staged/{path}"

    def stage_checkpoint(self, position: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
        """Keep the checkpoint that will replace ``checkpoints/task_<position>``, or be new there.

        Args:
            position: of the task in the stream.
            tensors: learnt state after forgetting.
            state: the rest of it, plain JSON.

        Returns:
            Paths of its two files in the run folder.
        """
        from safetensors.torch import save_file

        folder = f"checkpoints/task_{position}"
        target = self.folder / "staged" / folder
        target.mkdir(parents=True, exist_ok=True)
        model = target / "model.safetensors"
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, model)
        sync(model)
        digest = file_digest(model)
        content = to_json({**state, "position": position, "model_sha256": digest})
        write_atomically(target / "state.json", content)
        return [f"{folder}/model.safetensors", f"{folder}/state.json"]

    def staged(self) -> list[str]:
        """Files of the run folder for which new content is kept."""
        root = self.folder / "staged"
        return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    def start_over(self) -> None:
        """Forget what was staged before a crash, to work the request out again.

        Raises:
            ValueError: the plan is on disk already.
        """
        if self.ready:
            raise ValueError("a request whose plan is on disk can only be finished")
        shutil.rmtree(self.folder / "staged", ignore_errors=True)

    def commit(
        self,
        actions: Sequence[FileAction],
        certificate: Mapping[str, Any],
        outside: Sequence[Path] = (),
        names: Collection[str] = (),
    ) -> None:
        """Put the plan on disk: from here on the request is finished, whatever happens.

        Args:
            actions: what becomes of every file of the run folder.
            certificate: its draft.
            outside: paths of the cache of decoded images to be deleted as well.
            names: names that must not stand in the certificate, such as those of classes.

        Raises:
            ValueError: a certificate that could not be written at the end; nothing was touched.
            OSError: the disk is full; nothing was touched.
        """
        found = problems(certificate, names)
        if found:
            raise ValueError(f"the certificate could not be written: {'; '.join(found[:5])}")
        plan = {
            "actions": [asdict(action) for action in actions],
            "certificate": dict(certificate),
            "outside": [str(path.absolute()) for path in outside],
        }
        write_atomically(self.folder / "plan.json", to_json(plan))

    def plan(self) -> tuple[list[FileAction], dict[str, Any], list[Path]]:
        """What :meth:`commit` was given."""
        plan = json.loads((self.folder / "plan.json").read_text())
        actions = [FileAction(**action) for action in plan["actions"]]
        return actions, plan["certificate"], [Path(path) for path in plan["outside"]]

    def destroy(self) -> None:
        """The request is over: the salt first, then the rest. Done again, it goes on where it stopped."""
        _destroy(self.folder)


def begin(run: Path, facts: Mapping[str, Any]) -> Journal:
    """Open a request; it is on disk when this returns, and nothing else has happened.

    Args:
        run: the run folder, locked by the caller.
        facts: what was asked and how, plain JSON: enough to work it out again after a crash.

    Raises:
        UserError: another request is still open.
    """
    if find(run) is not None:
        raise UserError(
            "run", run, "a request to forget is still open in it", "Run the same command without --task to finish it"
        )
    parent = (run / FOLDER).parent
    parent.mkdir(exist_ok=True)
    made = parent / f".open.{uuid.uuid4().hex}.tmp"
    made.mkdir()
    request = {"request_id": uuid.uuid4().hex, "created_utc": now_utc(), "facts": dict(facts)}
    write_atomically(made / "request.json", to_json(request))
    write_atomically(made / "salt", secrets.token_bytes(SALT_BYTES))
    os.rename(made, run / FOLDER)
    sync(parent)
    return Journal(run)


def find(run: Path) -> Journal | None:
    """The open request of a run folder, if there is one; what an interrupted beginning or end left is removed."""
    folder = run / FOLDER
    for torn in folder.parent.glob(".open.*.tmp"):
        shutil.rmtree(torn, ignore_errors=True)
    if not folder.is_dir():
        return None
    salt = folder / "salt"
    if not salt.exists() or not any(salt.read_bytes()) or not (folder / "request.json").exists():
        _destroy(folder)  # the salt goes first, and only when the request is over
        return None
    return Journal(run)


def _destroy(folder: Path) -> None:
    salt = folder / "salt"
    if salt.exists():
        with open(salt, "r+b") as file:
            file.write(bytes(SALT_BYTES))
            file.flush()
            os.fsync(file.fileno())
        salt.unlink()
        sync(folder)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir():
        sync(folder.parent)
