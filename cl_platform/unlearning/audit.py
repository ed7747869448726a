"""The audit log: one line per act of forgetting, each bound to the one before by its hash."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError
from cl_platform.files import sync
from cl_platform.unlearning.canonical import canonical_json
from cl_platform.unlearning.privacy import findings

log = logging.getLogger("cl_platform")

DOMAIN = b"cl_platform/audit/1\n"
FIRST = "0" * 64
"""``prev`` of the first entry."""
KEYS = frozenset({"data", "event", "hash", "prev", "request_id", "seq", "time_utc"})
EVENTS = frozenset(
    {
        "request_opened",
        "lineage_checked",
        "component_deleted",
        "component_recomputed",
        "file_deleted",
        "file_rewritten",
        "stage_relearned",
        "verified",
        "request_refused",
        "resumed_after_crash",
        "request_closed",
    }
)


def now_utc() -> str:
    """The time as ``YYYY-MM-DDTHH:MM:SSZ``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Fault:
    """The first entry at which a chain is broken.

    Attributes:
        seq: the number that the entry should have, from 0.
        why: ``unparsable``, ``seq``, ``prev`` or ``hash``; ``tail`` where a certificate knows of more than there is.
        detail: the same for people.
    """

    seq: int
    why: str
    detail: str

    def __str__(self) -> str:
        return f"entry {self.seq}: {self.detail}"


def entry_hash(entry: Mapping[str, Any]) -> str:
    """SHA-256 of an entry, in hexadecimal; its own key ``hash`` does not count."""
    body = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(DOMAIN + canonical_json(body)).hexdigest()


class AuditLog:
    """A chain of entries in a file that only grows; the lock of the run folder keeps it to one writer.

    Args:
        path: ``unlearning/audit.jsonl`` of a run; made with its folder by the first entry.
        names: names that no entry may hold, such as those of the run's classes.
    """

    def __init__(self, path: Path, names: Collection[str] = ()) -> None:
        self.path = path
        self.names = tuple(names)
        self._tail: tuple[int, str] | None = None  # entries and last hash, once the whole chain was checked

    def entries(self) -> list[dict[str, Any]]:
        """All entries up to the first that is broken, or that a crash left half written."""
        return self._walk()[0]

    def check(self) -> Fault | None:
        """The first broken entry; ``None`` for a whole chain, also for one that has not begun.

        A chain cannot show that its end was cut off, nor that all of it was written anew: a certificate and an anchor
        can.
        """
        return self._walk()[1]

    @property
    def count(self) -> int:
        """Number of entries."""
        return self._whole()[0]

    @property
    def head(self) -> str:
        """Hash of the last entry."""
        return self._whole()[1]

    def append(
        self, event: str, data: Mapping[str, Any], request_id: str, time_utc: str | None = None
    ) -> dict[str, Any]:
        """Add an entry; it is on the disk when this returns, and not in the file if it fails.

        Args:
            event: one of ``EVENTS``.
            data: plain JSON without floats.
            request_id: of the request that this belongs to.
            time_utc: when it happened; now, if not said.

        Raises:
            ValueError: an unknown event, or data that name a path, an account, a machine or a class.
            TypeError: data that have no canonical spelling.
            UserError: the chain is broken.
            OSError: the disk is full or cannot be written.
        """
        return self.append_all([(event, data)], request_id, time_utc)[0]

    def append_all(
        self, records: Iterable[tuple[str, Mapping[str, Any]]], request_id: str, time_utc: str | None = None
    ) -> list[dict[str, Any]]:
        """Add an entry for each (event, data), all of them in one write; see :meth:`append`."""
        made: list[dict[str, Any]] = []
        records = list(records)
        for event, data in records:
            if event not in EVENTS:
                raise ValueError(f"event {event!r} is none of {', '.join(sorted(EVENTS))}")
            found = next(findings(data, self.names, "data"), None)
            if found is not None:
                raise ValueError(f"{event}: {found}")
        count, head = self._whole()
        for event, data in records:
            entry: dict[str, Any] = {
                "data": dict(data),
                "event": event,
                "prev": head,
                "request_id": request_id,
                "seq": count,
                "time_utc": time_utc or now_utc(),
            }
            entry["hash"] = head = entry_hash(entry)
            count += 1
            made.append(entry)
        if made:
            self._write(b"".join(canonical_json(entry) + b"\n" for entry in made))
            self._tail = (count, head)
        return made

    def _write(self, line: bytes) -> None:
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                written = file.write(line)
                if written != len(line):
                    raise OSError(28, "No space left on device", str(self.path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        if new:
            sync(self.path.parent)

    def _whole(self) -> tuple[int, str]:
        """Entries and last hash of a chain that can be added to; a half-written last line is cut off."""
        if self._tail is None:
            self._cut_torn_line()
            entries, fault = self._walk()
            if fault is not None:
                raise broken(self.path, fault)
            self._tail = (len(entries), entries[-1]["hash"] if entries else FIRST)
        return self._tail

    def _cut_torn_line(self) -> None:
        content = self._content()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        log.warning("%s: a last entry that was only half written is cut off", self.path.name)
        with open(self.path, "r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())

    def _content(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    def _walk(self) -> tuple[list[dict[str, Any]], Fault | None]:
        *lines, rest = self._content().split(b"\n")
        entries: list[dict[str, Any]] = []
        head = FIRST
        for seq, line in enumerate(lines):
            made = _read(line, seq, head)
            if isinstance(made, Fault):
                return entries, made
            entries.append(made)
            head = made["hash"]
        if rest:
            return entries, Fault(len(lines), "unparsable", "it does not end in a line feed, so it is half written")
        return entries, None


def _read(line: bytes, seq: int, prev: str) -> dict[str, Any] | Fault:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict) or set(entry) != KEYS:
            return Fault(seq, "unparsable", f"it does not have exactly the keys {', '.join(sorted(KEYS))}")
        if canonical_json(entry) != line:
            return Fault(seq, "unparsable", "it is not spelt as it was written")
    except (ValueError, TypeError, RecursionError) as error:
        return Fault(seq, "unparsable", f"it is no canonical JSON ({type(error).__name__})")
    if type(entry["seq"]) is not int or entry["seq"] != seq:
        return Fault(seq, "seq", f"its number is {entry['seq']}: entries are missing, added or out of order")
    if entry["prev"] != prev:
        return Fault(seq, "prev", "it does not follow from the entry before")
    if entry["hash"] != entry_hash(entry):
        return Fault(seq, "hash", "its content is not what was written")
    return entry


def broken(path: Path, fault: Fault) -> UserError:
    """The refusal to work with a broken chain; exit code 3."""
    return UserError(
        "run",
        path.parent.parent,
        f"the audit log {path.parent.name}/{path.name} was changed, at {fault}",
        "Restore the file from a copy; nothing was forgotten or deleted now",
        exit_code=3,
    )


def check_pinned(
    entries: list[dict[str, Any]], certificate: Mapping[str, Any], certificate_sha256: str
) -> Fault | None:
    """Whether the log holds what a certificate says about it: finds a cut tail and a certificate that was changed.

    Args:
        entries: of a whole chain.
        certificate: as read from its file.
        certificate_sha256: of that file's bytes.
    """
    pinned, head = certificate["audit"]["entries"], certificate["audit"]["head"]
    if len(entries) <= pinned:
        detail = f"the certificate knows of {pinned + 1} entries, the log ends after {len(entries)}"
        return Fault(len(entries), "tail", detail)
    if (entries[pinned - 1]["hash"] if pinned else FIRST) != head:
        return Fault(max(pinned - 1, 0), "head", "its hash is not the one in the certificate: the log was written anew")
    closing = entries[pinned]
    told = closing["data"].get("certificate_sha256")
    if closing["request_id"] != certificate["request_id"] or told is None:
        return Fault(pinned, "certificate", "it does not close the certificate's request")
    if told != certificate_sha256:
        return Fault(pinned, "certificate", "it closes another certificate: the file was changed")
    return None


def anchor(file: Path, log: AuditLog, request_id: str) -> None:
    """Append ``request_id entries head`` to a file outside the run, against a log that is rewritten as a whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab", buffering=0) as opened:
        opened.write(f"{request_id} {log.count} {log.head}\n".encode())
        os.fsync(opened.fileno())


def check_anchor(file: Path, log: AuditLog) -> Fault | None:
    """The first line of an anchor file that a log contradicts; lines about other logs cannot be told apart.

    Only lines of requests that the log knows, or that nothing else could belong to, are looked at: an anchor file may
    serve many runs.
    """
    entries = log.entries()
    known = {entry["request_id"] for entry in entries}
    for line in file.read_text().splitlines():
        fields = line.split(" ")
        if len(fields) != 3 or not fields[1].isdigit() or fields[0] not in known:
            continue
        count, head = int(fields[1]), fields[2]
        if len(entries) < count:
            return Fault(len(entries), "tail", f"the anchor knows of {count} entries, the log ends here")
        if count and entries[count - 1]["hash"] != head:
            return Fault(count - 1, "head", "its hash is not the one in the anchor: the log was written anew")
    return None
