"""The certificate of a forgotten task: what was asked, what was done to every tensor and file, what stays unproven."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError
from cl_platform.files import write_atomically
from cl_platform.run_folder import to_json
from cl_platform.unlearning.audit import AuditLog, now_utc
from cl_platform.unlearning.canonical import Value, content, header, salted_pair, tensor_digest
from cl_platform.unlearning.certificate_fields import SCHEMA, problems
from cl_platform.unlearning.scan import LEAD

FILE = "certificate.json"
NEVER_COVERED = (
    ("process memory", "memory that a process gave back is not wiped, nor are pages that were swapped out"),
    (
        "free blocks of the disk",
        "deleted files are not overwritten; the medium may hold them for a while",
    ),
    ("copies outside the run folder", "exports, backups and models made from this one are not known to the platform"),
    ("remote loggers", "what was sent to a server stays there"),
)
"""What no request reaches, and why."""
DATA_CACHE = (
    "decoded data cache",
    "it lies outside the run and may serve other runs; --purge-data-cache deletes the run's data set from it",
)
"""Uncovered as well, unless its purge was asked for."""
NOT_MEASURED = (
    "accuracies of the kept tasks",
    "the data could not be had: no row of the results was measured anew, all are of the time before",
)
"""Where a task was forgotten without the data of the run."""


@dataclass(frozen=True)
class Run:
    """Which run it is about.

    Attributes:
        config_sha256: of the resolved configuration in canonical JSON.
        version: of the package.
        git_commit: of its checkout, if any.
        scenario: its name.
        strategy: names of the strategies, in order.
    """

    config_sha256: str
    version: str
    git_commit: str | None
    scenario: str
    strategy: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """What was to be forgotten.

    Attributes:
        task_id: the task.
        class_ids: its classes.
        n_train: its training images.
        n_buffer: its images in the replay buffer when the request came.
        trigger: ``in_stream``, ``sequence`` or ``command``.
    """

    task_id: int
    class_ids: tuple[int, ...]
    n_train: int
    n_buffer: int
    trigger: str


@dataclass(frozen=True)
class Method:
    """How it was forgotten.

    Attributes:
        requested: ``auto``, ``drop``, ``rollback`` or ``approximate:<name>``.
        used: the same without ``auto``.
        reason: why this one.
        params: its hyper-parameters, plain JSON.
    """

    requested: str
    used: str
    reason: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """What it cost, or would have been expected to.

    Attributes:
        seconds: without the purge of files.
        seconds_purge: for that.
        images: seen by relearning or by an approximate method.
        optimizer_steps: of the same.
        peak_bytes: of memory; 0 where it is not known.
    """

    seconds: float
    seconds_purge: float = 0.0
    images: int = 0
    optimizer_steps: int = 0
    peak_bytes: int = 0


@dataclass(frozen=True)
class FileEntry:
    """What became of a file of the run folder.

    Attributes:
        path: relative, without the host name in names of TensorBoard's files.
        action: ``deleted``, ``rewritten`` or ``kept``.
        reason: why.
        bytes: its size when the request came.
        sha256_before: salted unless the file was kept; ``None`` for a file that is new.
        sha256_after: of the content it has now; ``None`` for a deleted one.
    """

    path: str
    action: str
    reason: str
    bytes: int
    sha256_before: str | None
    sha256_after: str | None


@dataclass(frozen=True)
class Seen:
    """A tensor before the request: enough to say later what became of it.

    Attributes:
        dtype: as safetensors spells it.
        shape: of the tensor.
        size: of its content, in bytes.
        plain: its digest; it confirms a guess at the content, so it is written down only of what is kept.
        salted: its digest with the request's salt.
        lead: its first 64 bytes, or all of fewer, for the search in files.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    plain: str
    salted: str
    lead: bytes


def look_at(state: Mapping[str, Value], salt: bytes) -> dict[str, Seen]:
    """What a learnt state holds before anything is forgotten; each tensor is fetched once.

    Args:
        state: full name -> tensor.
        salt: the request's, from its journal.
    """
    seen = {}
    for name, value in state.items():
        dtype, shape = json.loads(header(name, value))[1:]
        body = content(value)
        plain, salted = salted_pair(name, value, body, salt)
        seen[name] = Seen(dtype, tuple(shape), len(body), plain, salted, bytes(body[:LEAD]))
    return seen


def component_entries(
    before: Mapping[str, Seen],
    after: Mapping[str, Value],
    owners: Mapping[str, tuple[str, Sequence[int]]],
    changed: str | Mapping[str, str] = "modified",
) -> list[dict[str, Any]]:
    """Entries of ``components``, one for each tensor of the two states.

    Args:
        before: what :func:`look_at` gave.
        after: the learnt state now.
        owners: full name -> (kind, ids of the tasks whose data could have shaped it).
        changed: what happened to tensors that are there and differ: ``recomputed``, ``retrained`` or ``modified``; for
            all of them, or by name with ``modified`` for the rest.
    """
    made = []
    for name in sorted({*before, *after}, key=str.encode):
        kind, tasks = owners.get(name, ("other", ()))
        old = before.get(name)
        if name in after:
            value = after[name]
            dtype, shape = json.loads(header(name, value))[1:]
            size, digest = len(content(value)), tensor_digest(name, value)
            how = changed if isinstance(changed, str) else changed.get(name, "modified")
            action = "kept" if old is not None and old.plain == digest else how
        else:
            dtype, shape, size, digest, action = before[name].dtype, list(before[name].shape), 0, None, "deleted"
        salted = old is not None and action != "kept"
        made.append(
            {
                "name": name,
                "kind": kind,
                "owners": sorted(tasks),
                "action": action,
                "dtype": dtype,
                "shape": shape,
                "bytes_before": 0 if old is None else old.size,
                "bytes_after": size,
                "sha256_before": None if old is None else old.salted if salted else old.plain,
                "sha256_after": digest,
                "salted": salted,
            }
        )
    return made


def draft(
    *,
    request_id: str,
    created_utc: str,
    run: Run,
    target: Target,
    method: Method,
    level: str,
    lineage: str,
    leaks: Collection[str],
    fingerprint: Mapping[str, str | int | bool],
    components: Sequence[Mapping[str, Any]],
    cost: Cost,
    estimated: Cost | None = None,
    kept_counts: Mapping[str, Any] | None = None,
    not_covered: Sequence[tuple[str, str]] = (*NEVER_COVERED, DATA_CACHE),
    bookkeeping_excluded: Collection[str] = (),
) -> dict[str, Any]:
    """A certificate that is still open: without files, without the end of the audit log, nothing verified.

    Args:
        request_id: 32 hexadecimal digits.
        created_utc: when the request came.
        run: see :class:`Run`.
        target: see :class:`Target`.
        method: see :class:`Method`.
        level: ``E-bit``, ``E-law``, ``approximate`` or ``none``.
        lineage: on what the level stands: ``verified``, ``declared`` or ``violated``.
        leaks: ids of ways by which the task may remain.
        fingerprint: of the numerics.
        components: of :func:`component_entries`.
        cost: what it took.
        estimated: what was said before.
        kept_counts: counts of the task that are kept on purpose, by name.
        not_covered: pairs of what is not covered and why.
        bookkeeping_excluded: keys of the state that no comparison looks at.
    """
    return {
        "schema": SCHEMA,
        "request_id": request_id,
        "state": "open",
        "created_utc": created_utc,
        "closed_utc": None,
        "run": _plain(run),
        "target": _plain(target),
        "method": _plain(method),
        "level": level,
        "level_basis": {"lineage": lineage, "leaks": sorted(leaks)},
        "fingerprint": dict(fingerprint),
        "components": [dict(entry) for entry in components],
        "files": [],
        "not_covered": [{"what": what, "why": why} for what, why in not_covered],
        "kept_counts": {"n_train": target.n_train, "n_buffer": target.n_buffer, **(kept_counts or {})},
        "reference": None,
        "verification": None,
        "cost": {**_plain(cost), "estimated": None if estimated is None else _plain(estimated)},
        "bookkeeping_excluded": sorted(bookkeeping_excluded),
        "audit": {"entries": 0, "head": "0" * 64},
    }


def closed(certificate: Mapping[str, Any], files: Sequence[FileEntry], state: str = "done") -> dict[str, Any]:
    """The certificate of a request that is over.

    Args:
        certificate: of :func:`draft`.
        files: what became of every file of the run folder.
        state: ``done`` or ``refused``.
    """
    return {
        **certificate,
        "state": state,
        "closed_utc": now_utc(),
        "files": [asdict(entry) for entry in files],
    }


def seal(
    certificate: Mapping[str, Any],
    folder: Path,
    log: AuditLog,
    event: str = "request_closed",
    names: Collection[str] = (),
) -> Path:
    """Write a certificate that pins the audit log so far, then the entry of the log that pins the certificate.

    The same at the end of a request and when verification fills in what it found. Doing it again after a crash in
    between gives a certificate that pins the log as it is then.

    Args:
        certificate: complete but for ``audit``.
        folder: ``unlearning`` in the run folder.
        log: the run's.
        event: ``request_closed``, ``request_refused`` or ``verified``.
        names: names that must not stand in it, such as those of classes.

    Returns:
        Path of ``certificate.json``.

    Raises:
        ValueError: a field is missing, of another type, or says more than it may; nothing is written then.
    """
    made = {**certificate, "audit": {"entries": log.count, "head": log.head}}
    found = problems(made, names)
    if found:
        raise ValueError(f"the certificate cannot be written: {'; '.join(found[:5])}")
    content_bytes = to_json(made).encode()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"certificate_{made['request_id']}.json", content_bytes)
    write_atomically(folder / FILE, content_bytes)
    pinned = {"certificate_sha256": hashlib.sha256(content_bytes).hexdigest(), "level": made["level"]}
    log.append(event, pinned, made["request_id"])
    return folder / FILE


def read(path: Path) -> tuple[dict[str, Any], str]:
    """A certificate and the SHA-256 of its file.

    Raises:
        UserError: no such file, or one that is no certificate; names the first field that is wrong.
    """
    try:
        content_bytes = path.read_bytes()
        certificate = json.loads(content_bytes)
        found = problems(certificate)
    except OSError as error:
        raise UserError("run", path, f"cannot be read ({error.strerror})", "Name a run that forgot a task") from error
    except ValueError as error:
        raise UserError("run", path, f"is no JSON ({error})", "Restore the file from a copy", exit_code=3) from error
    if found:
        raise UserError("run", path, f"is no certificate: {found[0]}", "Restore the file from a copy", exit_code=3)
    return certificate, hashlib.sha256(content_bytes).hexdigest()


def _plain(record: Run | Target | Method | Cost) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(record).items()}
