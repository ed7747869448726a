"""The audit log names the entry that was tampered with, survives a crash while writing, and tells nothing private."""

import getpass
import json
import socket

import pytest

from cl_platform.errors import UserError
from cl_platform.unlearning import audit
from cl_platform.unlearning.audit import AuditLog, Fault

TIME = "2025-01-02T03:04:05Z"
HASHES = [
    "500b0f6a69119db9f6c6fb0b49e89df043a3099a1826d2419beec626a979fb37",
    "85dd9c5a49644a7665d1844025cf9c6b14c8c1bc713a39c5c0461af26a359abc",
    "57e1808172c2a17193ca1534ded2da78c551c5c10bfd8b1b2590123c2f93af3b",
]


@pytest.fixture
def chain(tmp_path):
    log = AuditLog(tmp_path / "unlearning" / "audit.jsonl")
    log.append("request_opened", {"method": "drop", "task_id": 1}, "r1", TIME)
    log.append("component_deleted", {"bytes": 64, "name": "adapter.1"}, "r1", TIME)
    log.append("request_closed", {"level": "E-bit"}, "r1", TIME)
    return log


def lines(log):
    return log.path.read_bytes().splitlines(keepends=True)


def test_a_chain_has_its_known_hashes(chain):
    assert [entry["hash"] for entry in chain.entries()] == HASHES
    assert (chain.count, chain.head) == (3, HASHES[2])
    assert chain.entries()[0]["prev"] == "0" * 64
    assert chain.check() is None


def test_another_log_goes_on_with_the_chain(chain):
    again = AuditLog(chain.path)
    entry = again.append("request_refused", {"reason": "unknown task"}, "r2")
    assert (entry["seq"], entry["prev"]) == (3, HASHES[2])
    assert again.check() is None


@pytest.mark.parametrize("k", [0, 1, 2])
def test_any_changed_character_is_named_at_its_entry(chain, k):
    kept = lines(chain)
    for place in range(len(kept[k])):
        changed = bytearray(kept[k])
        changed[place] = changed[place] ^ 1
        chain.path.write_bytes(b"".join([*kept[:k], bytes(changed), *kept[k + 1 :]]))
        fault = AuditLog(chain.path).check()
        assert fault is not None, place
        assert fault.seq == k, (place, fault)


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("extra", [b" ", b"\r", b"\x00"])
def test_an_added_character_is_named_although_the_meaning_stays(chain, k, extra):
    kept = lines(chain)
    kept[k] = kept[k][:-1] + extra + b"\n"
    chain.path.write_bytes(b"".join(kept))
    assert chain.check().seq == k


def test_a_changed_number_is_a_wrong_hash(chain):
    chain.path.write_bytes(chain.path.read_bytes().replace(b'"bytes":64', b'"bytes":65'))
    fault = chain.check()
    assert (fault.seq, fault.why) == (1, "hash")


@pytest.mark.parametrize("k,why", [(0, "seq"), (1, "seq")])
def test_a_removed_entry_is_named(chain, k, why):
    kept = lines(chain)
    chain.path.write_bytes(b"".join(kept[:k] + kept[k + 1 :]))
    fault = chain.check()
    assert (fault.seq, fault.why) == (k, why)


def test_an_entry_that_was_written_anew_breaks_the_next_one(chain):
    kept = [json.loads(line) for line in lines(chain)]
    kept[1]["data"]["bytes"] = 65
    kept[1]["hash"] = audit.entry_hash(kept[1])
    text = b"".join(audit.canonical_json(entry) + b"\n" for entry in kept)
    chain.path.write_bytes(text)
    fault = chain.check()
    assert (fault.seq, fault.why) == (2, "prev")


def test_swapped_and_repeated_entries_are_named(chain):
    kept = lines(chain)
    chain.path.write_bytes(kept[0] + kept[2] + kept[1])
    assert chain.check().seq == 1
    chain.path.write_bytes(kept[0] + kept[0] + kept[1])
    assert chain.check().seq == 1


@pytest.mark.parametrize("line", [b"", b"{}", b"[1]", b"\xff", b'{"seq":0}', b"[" * 100_000])
def test_what_is_no_entry_is_unparsable(chain, line):
    kept = lines(chain)
    chain.path.write_bytes(kept[0] + line + b"\n" + kept[1])
    fault = chain.check()
    assert (fault.seq, fault.why) == (1, "unparsable")


def test_a_cut_tail_is_a_whole_chain_that_the_certificate_contradicts(chain):
    certificate = {"request_id": "r1", "audit": {"entries": 2, "head": HASHES[1]}}
    chain.path.write_bytes(b"".join(lines(chain)[:2]))
    assert chain.check() is None
    fault = audit.check_pinned(chain.entries(), certificate, "00")
    assert (fault.seq, fault.why) == (2, "tail")
    assert "3 entries" in fault.detail


def closed(log, sha="ab"):
    certificate = {"request_id": "r1", "audit": {"entries": log.count, "head": log.head}}
    log.append("request_closed", {"level": "E-bit", "certificate_sha256": sha}, "r1")
    return certificate


def test_a_certificate_and_the_log_bind_one_another(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("request_opened", {}, "r1")
    certificate = closed(log)
    assert audit.check_pinned(log.entries(), certificate, "ab") is None
    assert audit.check_pinned(log.entries(), certificate, "cd").why == "certificate"
    log.append("request_opened", {}, "r2")
    assert audit.check_pinned(log.entries(), certificate, "ab") is None


def test_a_log_that_was_written_anew_as_a_whole_contradicts_certificate_and_anchor(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("request_opened", {"task_id": 1}, "r1")
    certificate = closed(log)
    audit.anchor(tmp_path / "anchor" / "heads", log, "r1")
    assert audit.check_anchor(tmp_path / "anchor" / "heads", log) is None
    log.path.unlink()
    other = AuditLog(log.path)
    other.append("request_opened", {"task_id": 2}, "r1")
    closed(other)
    assert other.check() is None
    assert audit.check_pinned(other.entries(), certificate, "ab") == Fault(
        0, "head", "its hash is not the one in the certificate: the log was written anew"
    )
    assert audit.check_anchor(tmp_path / "anchor" / "heads", other).why == "head"


def test_nothing_is_added_to_a_broken_chain(chain):
    chain.path.write_bytes(chain.path.read_bytes().replace(b'"bytes":64', b'"bytes":65'))
    before = chain.path.read_bytes()
    with pytest.raises(UserError, match="changed, at entry 1") as refusal:
        AuditLog(chain.path).append("verified", {}, "r1")
    assert refusal.value.exit_code == 3
    assert chain.path.read_bytes() == before


def test_a_crash_while_writing_leaves_a_line_that_the_next_entry_replaces(chain):
    whole = chain.path.read_bytes()
    for length in range(1, 40, 7):
        chain.path.write_bytes(whole + b'{"data":{},"event":"verified","hash":"0'[:length])
        assert chain.check().seq == 3
        assert AuditLog(chain.path).append("verified", {}, "r1")["seq"] == 3
        assert AuditLog(chain.path).check() is None


def test_a_full_disk_leaves_the_log_as_it_was(chain, monkeypatch):
    before = chain.path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        chain.append("verified", {}, "r1")
    monkeypatch.undo()
    assert chain.path.read_bytes() == before
    chain.append("verified", {}, "r1")
    assert chain.check() is None


@pytest.mark.parametrize("data", [{"a": 0.5}, {"a": {"b": [1.0]}}])
def test_floats_are_refused(chain, data):
    with pytest.raises(TypeError):
        chain.append("verified", data, "r1")


@pytest.mark.parametrize(
    "value",
    ["/home/somebody/run", "read from /data/x", "~/run", "C:\\run", "file://x", "a/Grey Heron/b", "grey heron"],
)
def test_paths_and_class_names_are_refused(tmp_path, value):
    log = AuditLog(tmp_path / "audit.jsonl", names=["Grey Heron", "7"])
    with pytest.raises(ValueError, match="data.where holds"):
        log.append("verified", {"where": value}, "r1")
    assert not log.path.exists()


def test_names_of_the_account_and_the_machine_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "anna")
    monkeypatch.setattr(socket, "gethostname", lambda: "blue.example.org")
    log = AuditLog(tmp_path / "audit.jsonl")
    for value in ("anna", "anna@blue", "out/anna/run", "blue.example.org"):
        with pytest.raises(ValueError, match="account"):
            log.append("verified", {"where": value}, "r1")
    log.append("verified", {"what": "a blue sky", "7": 7, "path": "checkpoints/task_1/state.json", "n": "1/2"}, "r1")


def test_an_unknown_event_is_refused(chain):
    with pytest.raises(ValueError, match="none of"):
        chain.append("forgot", {}, "r1")
