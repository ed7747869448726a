"""Purge of a run folder: what holds a task there, what becomes of each file, and doing it so that a crash does no harm.

Records of the task's images one by one, of its own classes, and images that were logged go. Counts of the whole task
stay and are listed as kept. Checkpoints from before the task stay: they are what a rollback starts from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cl_platform.errors import UserError
from cl_platform.files import sync
from cl_platform.scenarios.cache import remove
from cl_platform.unlearning import redaction
from cl_platform.unlearning.audit import AuditLog
from cl_platform.unlearning.certificate import FileEntry
from cl_platform.unlearning.journal import CHUNK, FileAction, Journal, file_digest
from cl_platform.unlearning.privacy import masked
from cl_platform.unlearning.redaction import Subject
from cl_platform.unlearning.scan import Hit, files_below, found_in, scan_for

NOT_LISTED = re.compile(
    r"\.lock|unlearning/(audit\.jsonl|certificate(_[0-9a-f]{32})?\.json|forgotten\.json|adopted\.json|(open|relearned|\.open\.[^/]*)/.*)"
)
"""The lock, and the proof itself."""
IN_PLACE = ("run.log",)
"""Files that the process which purges may hold open: they keep their place on the disk when they are rewritten."""
TASK_COUNTS = "counts of whole tasks, which the certificate and the report need"
UNKNOWN = "unknown to the platform; nothing of the deleted tensors was found in it"
LEFT_OVER = "left over from a write that a crash interrupted"
DRAWN = "drawn from records by class; a report draws it anew"
OLDER = "taken before the task was learnt; a rollback starts from it"
LATER = "taken while the task was known"

Content = bytes | None
"""New content of a file, or ``None`` where it can stay as it is."""


@dataclass(frozen=True)
class Rule:
    """What becomes of files of a name.

    Attributes:
        pattern: of the relative path.
        action: ``delete``, ``rewrite`` or ``keep``.
        reason: why.
        made: for a rewritten file, its new content; it is kept if nothing has to go.
    """

    pattern: str
    action: str
    reason: str
    made: Callable[[Path, Subject], Content] | None = None


def _text(change: Callable[[str, Subject], str]) -> Callable[[Path, Subject], Content]:
    def made(path: Path, subject: Subject) -> Content:
        before = path.read_bytes().decode("utf-8", errors="surrogateescape")
        after = change(before, subject)
        return None if after == before else after.encode("utf-8", errors="surrogateescape")

    return made


def _features(path: Path, subject: Subject) -> Content:
    before = path.read_bytes()
    after = redaction.features(before, subject)
    return None if after == before else after


RULES = (
    Rule(r"(.*/)?\.[^/]*\.tmp(/.*)?|checkpoints/\.task_\d+\.old/.*", "delete", LEFT_OVER),
    Rule(r"(accuracy_matrix|continual_eval)\.csv|instructions\.json|csv/hparams\.yaml", "keep", TASK_COUNTS),
    Rule(r"gradients\.csv", "keep", "norms over whole batches"),
    Rule(r"cost\.json", "keep", "times and sizes"),
    Rule(r"config\.yaml|tensorboard/hparams\.yaml", "keep", "the configuration"),
    Rule(r"environment\.json", "keep", "versions, and the number of images and classes of each task"),
    Rule(r"stream\.json", "rewrite", "names of the task's own classes go", _text(redaction.stream_facts)),
    Rule(r"confusion\.json", "rewrite", "counts of the task's own classes go", _text(redaction.confusion)),
    Rule(r"metrics\.json", "rewrite", "values of the task's own classes go", _text(redaction.metrics)),
    Rule(r"representation\.safetensors", "rewrite", "features of the task's images go", _features),
    Rule(r"run\.log", "rewrite", "lines that name the task's classes go", _text(redaction.log_lines)),
    Rule(r"csv/metrics\.csv", "rewrite", "columns of the task's own classes go", _text(redaction.columns)),
    Rule(
        r"tensorboard/(.*/)?events\.out\.tfevents\.[^/]*", "rewrite", "logged images and curves of classes go",
        redaction.events,
    ),
    Rule(r"report\.html|figures/[^/]*\.(png|svg)", "delete", DRAWN),
    Rule(r"[^/]*_sensitivity\.csv", "delete", "measured on the task's images as well"),
    Rule(r"comparison\.(html|csv)|runs\.csv", "keep", "means over whole runs"),
    Rule(r"(wandb|mlruns)/.*", "keep", "values of whole tasks that a logger keeps; its server is not covered"),
)  # fmt: skip
"""In order; the first whose pattern is the whole path counts."""
KEPT_AFTER_REWRITE = {
    "stream.json": "names no class that only the task has",
    "confusion.json": "holds no class that only the task has",
    "metrics.json": "holds no class that only the task has",
    "representation.safetensors": "holds no features of the task's images",
    "run.log": "names none of the task's classes",
    "csv/metrics.csv": TASK_COUNTS,
}


def plan_purge(
    journal: Journal,
    subject: Subject,
    needles: Mapping[str, bytes],
    rewrites: Mapping[str, str] | None = None,
    removals: Mapping[str, str] | None = None,
) -> list[FileAction]:
    """What becomes of every file of the run folder; new contents are staged, nothing is touched.

    Args:
        journal: of the open request.
        subject: the task.
        needles: first bytes of the deleted tensors, see :func:`cl_platform.unlearning.scan.needles`.
        rewrites: files that the caller has new content for -> where it lies, relative to the run folder; those that
            were put into the journal's ``staged`` are taken as well. Files that are not there yet are made.
        removals: further files to delete -> why.

    Raises:
        UserError: a file whose name is no text.
        OSError: the disk is full; nothing of the run was touched.
    """
    return _Planner(journal, subject, needles, rewrites or {}, removals or {}).actions()


class _Planner:
    """One pass over a run folder; each file is read once for its digest."""

    def __init__(
        self,
        journal: Journal,
        subject: Subject,
        needles: Mapping[str, bytes],
        rewrites: Mapping[str, str],
        removals: Mapping[str, str],
    ) -> None:
        self.journal, self.subject, self.needles, self.removals = journal, subject, needles, removals
        self.run = journal.run
        staged = f"{journal.folder.relative_to(self.run).as_posix()}/staged"
        self.given = {**{path: f"{staged}/{path}" for path in journal.staged()}, **rewrites}
        self._plain: dict[Path, str] = {}
        self._older: dict[Path, bool] = {}

    def actions(self) -> list[FileAction]:
        made = []
        aside = {staged.rpartition("/")[0] for staged in self.given.values()}
        for path in list(files_below(self.run)):
            relative = path.relative_to(self.run).as_posix()
            if NOT_LISTED.fullmatch(relative) or any(relative.startswith(f"{folder}/") for folder in aside):
                continue
            _refuse_odd_name(self.run, relative)
            if path.is_symlink():
                made.append(FileAction(relative, "keep", "a link; what it leads to is not covered", 0))
            elif not path.is_file():
                made.append(FileAction(relative, "keep", "no ordinary file", 0))
            else:
                made.append(self._measured(path, self._chosen(path, relative)))
        known = {action.path for action in made}
        for path_, staged in sorted(self.given.items()):
            if path_ not in known:
                made.append(self._rewritten(FileAction(path_, "rewrite", "new after forgetting", 0), staged))
        return made

    def _chosen(self, path: Path, relative: str) -> FileAction:
        """The action for a file, without its size and digest."""
        if relative in self.given:
            action = FileAction(relative, "rewrite", "holds the state after forgetting", 0)
            return self._rewritten(action, self.given[relative])
        if relative in self.removals:
            return FileAction(relative, "delete", self.removals[relative], 0)
        if re.match(r"checkpoints/task_\d+/", relative):
            older = self._is_older(self.run.joinpath(*Path(relative).parts[:2]))
            return FileAction(relative, "keep" if older else "delete", OLDER if older else LATER, 0)
        rule = next((rule for rule in RULES if re.fullmatch(rule.pattern, relative)), None)
        if rule is not None and rule.made is not None:
            return self._redacted(path, relative, rule.made, rule.reason)
        if rule is not None and rule.action == "delete":
            return FileAction(relative, "delete", rule.reason, 0)
        names = found_in(path, self.needles)
        if names:
            return FileAction(relative, "delete", f"holds the first bytes of {names[0]}", 0)
        return FileAction(relative, "keep", UNKNOWN if rule is None else rule.reason, 0)

    def _redacted(self, path: Path, relative: str, made: Callable[[Path, Subject], Content], reason: str) -> FileAction:
        try:
            content = made(path, self.subject)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            # what cannot be understood cannot be cleaned
            return FileAction(relative, "delete", f"cannot be understood ({type(error).__name__})", 0)
        if content is None:
            return FileAction(relative, "keep", KEPT_AFTER_REWRITE.get(relative, "holds nothing of that kind"), 0)
        return self._rewritten(FileAction(relative, "rewrite", reason, 0), self.journal.stage(relative, content))

    def _rewritten(self, action: FileAction, staged: str) -> FileAction:
        new = self.run / staged
        return replace(action, staged=staged, sha256_after=file_digest(new), bytes_after=new.stat().st_size)

    def _measured(self, path: Path, action: FileAction) -> FileAction:
        status = path.stat()
        if action.action == "keep":
            digest = after = self._digest(path)
        else:
            digest, after = file_digest(path, self.journal.salt), action.sha256_after  # type: ignore[assignment]
        linked = "; it has another name on this disk, which is not covered" if status.st_nlink > 1 else ""
        reason = action.reason + linked
        return replace(action, bytes=status.st_size, sha256_before=digest, sha256_after=after, reason=reason)

    def _digest(self, path: Path) -> str:
        if path not in self._plain:
            self._plain[path] = file_digest(path)
        return self._plain[path]

    def _is_older(self, folder: Path) -> bool:
        if folder not in self._older:
            self._older[folder] = is_older(folder, self.subject, self._digest)
        return self._older[folder]


def _refuse_odd_name(run: Path, relative: str) -> None:
    try:
        relative.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            "run", run, f"holds a file whose name is no text ({relative!r}), so no list could name it",
            "Rename or remove it",
        ) from error  # fmt: skip


def is_older(checkpoint: Path, subject: Subject, digest: Callable[[Path], str] = file_digest) -> bool:
    """Whether a checkpoint's folder is intact and was written by a model that had not met the task, or had lost it.

    What cannot be read, or whose weights are not those that its state tells of, is taken to hold the task.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        forgotten = {entry["task_id"] for entry in state.get("forgotten", [])}
        if subject.task_id in state["learnt"] and subject.task_id not in forgotten:
            return False
        return bool(digest(checkpoint / "model.safetensors") == state["model_sha256"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def carry_out(journal: Journal, log: AuditLog) -> list[FileEntry]:
    """Do what the plan on disk says, rewritten files first; done again after a crash, it goes on where it stopped.

    An entry of the audit log follows each act, once; nothing is said to be deleted before it is.

    Args:
        journal: with its plan.
        log: the run's.

    Returns:
        Entries for the certificate, in the order of paths.

    Raises:
        OSError: the disk is full or cannot be written; the request stays open.
        UserError: new content has disappeared, and the file does not hold it.
    """
    actions, _, outside = journal.plan()
    told = {
        (entry["event"], entry["data"].get("path"))
        for entry in log.entries()
        if entry["request_id"] == journal.request_id
    }

    def tell(event: str, path: str, size: int) -> None:
        if (event, path) not in told:
            log.append(event, {"path": path, "bytes": size}, journal.request_id)

    shown = {action.path: masked(action.path, log.names) for action in actions}
    for action in sorted(actions, key=lambda action: (action.action != "rewrite", action.path)):
        if action.action == "rewrite":
            _rewrite(journal.run, action)
            tell("file_rewritten", shown[action.path], action.bytes)
        elif action.action == "delete":
            _delete(journal.run, action)
            tell("file_deleted", shown[action.path], action.bytes)
    for path in outside:
        remove(path)
        tell("file_deleted", f"data cache, {path.parent.name}/{path.name}", 0)
    said = {"delete": "deleted", "rewrite": "rewritten", "keep": "kept"}
    return [
        FileEntry(shown[a.path], said[a.action], a.reason, a.bytes, a.sha256_before, a.sha256_after)
        for a in sorted(actions, key=lambda action: action.path)
    ]


def _rewrite(run: Path, action: FileAction) -> None:
    assert action.staged is not None
    source, target = run / action.staged, run / action.path
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        if action.path in IN_PLACE and target.exists():
            _overwrite(source, target)
            source.unlink()
        else:
            os.replace(source, target)
            sync(target.parent)
    elif not target.exists() or file_digest(target, length=action.bytes_after) != action.sha256_after:
        raise UserError(
            "run", run, f"the new content of {action.path} has disappeared from {source.parent}",
            "Restore the folder unlearning/open from a copy",
        )  # fmt: skip


def _overwrite(source: Path, target: Path) -> None:
    with open(source, "rb") as new, open(target, "r+b") as file:
        shutil.copyfileobj(new, file, CHUNK)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _delete(run: Path, action: FileAction) -> None:
    path = run / action.path
    path.unlink(missing_ok=True)
    folder = path.parent
    while folder != run and folder.is_dir() and not any(folder.iterdir()) and folder != run / "checkpoints":
        folder.rmdir()
        folder = folder.parent
    while not folder.is_dir():
        folder = folder.parent
    sync(folder)


def leftovers(run: Path, subject: Subject, needles: Mapping[str, bytes], without: Collection[str] = ()) -> list[Hit]:
    """Files of a run folder that still hold a deleted tensor.

    Intact checkpoints from before the task are passed over: what they hold cannot be the task's.

    Args:
        run: the run folder.
        subject: the task.
        needles: see :func:`cl_platform.unlearning.scan.needles`.
        without: paths that are passed over as well.
    """
    folders = (run / "checkpoints").glob("task_*")
    older = [f"checkpoints/{folder.name}" for folder in folders if is_older(folder, subject)]
    return scan_for(needles, run, [*older, *without])
