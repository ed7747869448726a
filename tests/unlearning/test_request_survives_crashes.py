"""A crash or a full disk at any point of a request leaves the run whole or the request open, never half a truth."""

import contextlib
import errno
import json
import os
import pathlib
import shutil

import pytest
from purgeable import NAMES, SUBJECT, audit_of, opened, tree, write_run

from cl_platform.errors import UserError
from cl_platform.unlearning import certificate as certificates
from cl_platform.unlearning import journal as journals
from cl_platform.unlearning.audit import AuditLog, check_pinned
from cl_platform.unlearning.completion import finish
from cl_platform.unlearning.purge import plan_purge


class Crash(BaseException):
    """The process is gone: no handler of errors sees it."""


ACTS = (
    (os, "fsync"),
    (os, "replace"),
    (os, "rename"),
    (pathlib.Path, "unlink"),
    (pathlib.Path, "rmdir"),
    (os, "unlink"),
)


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    """Whether a write reached the disk cannot be tested here; when it was asked to is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


class Trap:
    """Counts acts on the disk and raises at one of them, before or after it is done."""

    def __init__(self, monkeypatch, at=None, before=True, error=Crash):
        self.count, self.at, self.before, self.error = 0, at, before, error
        for owner, name in ACTS:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, act):
        def wrapped(*args, **kwargs):
            here, self.count = self.count, self.count + 1
            if here == self.at and self.before:
                raise self.error()
            result = act(*args, **kwargs)
            if here == self.at and not self.before:
                raise self.error()
            return result

        return wrapped


def log_of(run):
    return AuditLog(run / "unlearning/audit.jsonl", NAMES)


def next_start(run):
    """What a start does with a run folder: it finishes what it finds."""
    journal = journals.find(run)
    if journal is not None:
        assert journal.ready
        finish(journal, log_of(run), NAMES)


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A run whose request is planned, and the same after an undisturbed purge."""
    root = tmp_path_factory.mktemp("planned")
    run = write_run(root / "planned")
    opened(run)
    shutil.copytree(run, root / "done")
    next_start(root / "done")
    return run, tree(root / "done"), events(root / "done")


def events(run):
    return sorted((e["event"], e["data"].get("path") or e["data"].get("name") or "") for e in audit_of(run))


def assert_done(run, planned):
    assert tree(run) == planned[1]
    assert events(run) == planned[2]
    assert journals.find(run) is None
    assert not (run / journals.FOLDER).exists()
    log = log_of(run)
    assert log.check() is None
    certificate, sha = certificates.read(run / "unlearning/certificate.json")
    assert certificate["state"] == "done"
    assert check_pinned(log.entries(), certificate, sha) is None


def number_of_acts(planned, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        run = shutil.copytree(planned[0], tmp_path / "counted")
        trap = Trap(patch)
        next_start(run)
    return trap.count


def test_a_crash_before_any_act_is_finished_by_the_next_start(planned, tmp_path):
    acts = number_of_acts(planned, tmp_path)
    assert acts > 60  # files, entries of the log, the certificate, the journal's end
    for at in range(acts):
        run = shutil.copytree(planned[0], tmp_path / f"at_{at}")
        with pytest.MonkeyPatch.context() as patch:
            Trap(patch, at, before=at % 10 != 9)  # after an act is before the next one, but for what lies between
            with pytest.raises(Crash):
                next_start(run)
        assert_nothing_said_too_early(run)
        next_start(run)
        assert_done(run, planned)
        shutil.rmtree(run)


def test_a_crash_in_the_start_that_finishes_is_finished_by_the_next(planned, tmp_path):
    acts = number_of_acts(planned, tmp_path)
    for first in range(0, acts, 13):
        run = shutil.copytree(planned[0], tmp_path / f"at_{first}")
        for at in (first, 5):
            with pytest.MonkeyPatch.context() as patch:
                Trap(patch, at)
                with contextlib.suppress(Crash):
                    next_start(run)
        next_start(run)
        assert_done(run, planned)


def assert_nothing_said_too_early(run):
    """Whatever the log says of a file is true of it, and no certificate says done before the request is closed."""
    entries = audit_of(run)
    for entry in entries:
        if entry["event"] == "file_deleted":
            assert not (run / entry["data"]["path"]).exists()
    plan = run / journals.FOLDER / "plan.json"
    if plan.exists():
        known = {action["path"]: action for action in json.loads(plan.read_text())["actions"]}
        for entry in entries:
            if entry["event"] == "file_rewritten":
                assert (run / entry["data"]["path"]).stat().st_size == known[entry["data"]["path"]]["bytes_after"]


def full():
    return OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", [0, 3, 10, 25, 40])
def test_a_full_disk_keeps_the_request_open_and_says_nothing_untrue(planned, tmp_path, at):
    run = shutil.copytree(planned[0], tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        Trap(patch, at, error=full)
        with pytest.raises(UserError, match="stays open") as refusal:
            next_start(run)
    assert "disk is full" in str(refusal.value)
    assert journals.find(run).ready
    assert_nothing_said_too_early(run)
    assert "request_closed" not in {entry["event"] for entry in audit_of(run)}
    next_start(run)
    assert_done(run, planned)


def test_a_failure_before_the_plan_is_on_disk_leaves_the_run_as_it_was(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        trap = Trap(patch)
        opened(write_run(tmp_path / "counted"))
    before = None
    for at in range(0, trap.count - 1, 4):
        run = write_run(tmp_path / f"at_{at}")
        before = before or tree(run)
        with pytest.MonkeyPatch.context() as patch:
            Trap(patch, at)
            with pytest.raises(Crash):
                opened(run)
        assert tree(run) == before
        found = journals.find(run)
        if found is not None and not found.ready:
            found.start_over()
            assert plan_purge(found, SUBJECT, {})
        shutil.rmtree(run)


def test_the_plan_is_on_disk_before_anything_is_deleted(planned, tmp_path, monkeypatch):
    run = shutil.copytree(planned[0], tmp_path / "run")
    seen = []
    unlink = pathlib.Path.unlink

    def watched(path, *args, **kwargs):
        if "unlearning" not in path.parts:
            seen.append((run / journals.FOLDER / "plan.json").exists())
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "unlink", watched)
    next_start(run)
    assert len(seen) >= 10
    assert all(seen)


def test_new_content_that_disappeared_is_an_error_and_not_a_silent_success(planned, tmp_path):
    run = shutil.copytree(planned[0], tmp_path / "run")
    shutil.rmtree(run / journals.FOLDER / "staged")
    with pytest.raises(UserError, match="has disappeared"):
        next_start(run)
    assert journals.find(run).ready


def test_a_certificate_that_could_not_be_written_stops_the_request_before_the_purge(tmp_path):
    run = write_run(tmp_path / "run")
    journal = journals.begin(run, {})
    with pytest.raises(ValueError, match="could not be written"):
        journal.commit([], {"schema": "x"})
    assert not journal.ready


def test_a_request_that_is_ready_cannot_be_started_over(planned, tmp_path):
    run = shutil.copytree(planned[0], tmp_path / "run")
    with pytest.raises(ValueError, match="only be finished"):
        journals.find(run).start_over()
