"""The end of a request: its plan is carried out, the certificate is sealed, the journal and its salt are destroyed."""

from __future__ import annotations

import errno
import time
from collections.abc import Collection
from pathlib import Path

from cl_platform.errors import UserError
from cl_platform.unlearning import certificate as certificates
from cl_platform.unlearning.audit import AuditLog, anchor
from cl_platform.unlearning.journal import Journal
from cl_platform.unlearning.purge import carry_out

COMPONENT_EVENTS = {"deleted": "component_deleted", "recomputed": "component_recomputed"}


def finish(journal: Journal, log: AuditLog, names: Collection[str] = (), anchor_file: Path | None = None) -> Path:
    """Finish a request whose plan is on disk; done again after a crash at any point, it ends in the same.

    Args:
        journal: with its plan.
        log: the run's.
        names: names that must not stand in the certificate, such as those of classes.
        anchor_file: file outside the run to which the head of the log is appended.

    Returns:
        Path of the certificate.

    Raises:
        UserError: the disk is full or cannot be written; the request stays open.
    """
    unlearning = log.path.parent
    try:
        _finish(journal, log, names, anchor_file)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else f"a file cannot be changed ({error.strerror or error})"
        todo = "Free some space" if full else "Check the rights of its files"
        raise UserError(
            "run", journal.run, f"{why}, so the request to forget stays open",
            f"{todo} and start again: the request is finished then", exit_code=1,
        ) from error  # fmt: skip
    return unlearning / certificates.FILE


def _finish(journal: Journal, log: AuditLog, names: Collection[str], anchor_file: Path | None) -> None:
    _, draft, _ = journal.plan()
    mine = [entry for entry in log.entries() if entry["request_id"] == journal.request_id]
    if not any(entry["event"] == "request_closed" for entry in mine):
        if not any(entry["event"] == "request_opened" for entry in mine):
            opened = {"method": draft["method"]["used"], "task_id": draft["target"]["task_id"]}
            log.append("request_opened", opened, journal.request_id)
        start = time.perf_counter()
        files = carry_out(journal, log)
        told = {(entry["event"], entry["data"].get("name")) for entry in mine}
        entries = []
        for component in draft["components"]:
            event = COMPONENT_EVENTS.get(component["action"])
            if event is not None and (event, component["name"]) not in told:
                entries.append((event, {"name": component["name"], "bytes": component["bytes_before"]}))
        log.append_all(entries, journal.request_id)
        made = certificates.closed(draft, files)
        made["cost"] = {**made["cost"], "seconds_purge": time.perf_counter() - start}
        certificates.seal(made, log.path.parent, log, "request_closed", names)
    if anchor_file is not None:
        anchor(anchor_file, log, journal.request_id)
    journal.destroy()
