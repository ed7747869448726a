"""Every file of a run folder is listed with what becomes of it; what holds the task goes, what a report needs stays."""

import json
import os

import pytest
import torch
from purgeable import EVENTS, HOST, LEFT_OVER, NAMES, SUBJECT, audit_of, forgotten_state, opened, state_after, write_run
from purgeable import tree as tree_of
from safetensors.torch import load_file, save_file

from cl_platform.errors import UserError
from cl_platform.unlearning import certificate as certificates
from cl_platform.unlearning import journal as journals
from cl_platform.unlearning import redaction, scan
from cl_platform.unlearning.audit import check_pinned
from cl_platform.unlearning.completion import finish
from cl_platform.unlearning.journal import FOLDER
from cl_platform.unlearning.purge import leftovers, plan_purge


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def needles_of():
    return scan.needles(scan.leads(state_after(3)), forgotten_state())


def by_path(actions):
    return {action.path: action for action in actions}


def test_every_file_is_listed_and_none_is_touched_by_the_plan(run):
    before = tree_of(run)
    journal, _, actions = opened(run)
    assert tree_of(run) == before
    listed = by_path(actions)
    assert set(listed) == set(before)
    assert len(listed) == len(actions)
    done = {
        "delete": [
            LEFT_OVER, "checkpoints/task_1/model.safetensors", "checkpoints/task_1/state.json",
            "checkpoints/task_2/model.safetensors", "checkpoints/task_2/state.json", "figures/confusion.png",
            "figures/confusion.svg", "fpf_sensitivity.csv", "old/best.bin", "report.html",
        ],
        "rewrite": [
            "checkpoints/task_3/model.safetensors", "checkpoints/task_3/state.json", "confusion.json",
            "csv/metrics.csv", "metrics.json", "representation.safetensors", "run.log",
        ],
        "keep": [
            "accuracy_matrix.csv", "checkpoints/task_0/model.safetensors", "checkpoints/task_0/state.json",
            "config.yaml", "continual_eval.csv", "cost.json", "environment.json", "notes.txt",
        ],
    }  # fmt: skip
    assert {kind: sorted(p for p, a in listed.items() if a.action == kind) for kind in done} == {
        kind: sorted(paths) for kind, paths in done.items()
    }
    assert all(action.reason for action in actions)
    assert journal.plan()[0] == actions


def test_what_the_task_left_is_gone_afterwards_and_the_rest_is_as_before(run):
    before = tree_of(run)
    finish(*opened(run)[:2], NAMES)
    after = tree_of(run)
    assert leftovers(run, SUBJECT, needles_of()) == []
    for path in ("checkpoints/task_0/model.safetensors", "accuracy_matrix.csv", "notes.txt", "continual_eval.csv"):
        assert after[path] == before[path]
    assert not (run / "checkpoints/task_2").exists()
    assert not (run / "figures").exists()
    kept = load_file(run / "checkpoints/task_3/model.safetensors")
    assert set(kept) == set(forgotten_state())
    state = json.loads(after["checkpoints/task_3/state.json"])
    assert redaction.about_images(state, SUBJECT) == []
    assert redaction.about_images(json.loads(before["checkpoints/task_3/state.json"]), SUBJECT) != []
    text = b"".join(content for path, content in after.items() if not path.startswith("checkpoints/"))
    assert b"otter" not in text
    assert b"beaver" not in text


def test_records_keep_what_is_about_other_classes(run):
    finish(*opened(run)[:2], NAMES)
    last = json.loads((run / "confusion.json").read_text())["after"][3]
    assert last["classes"] == [0, 1, 4, 5, 6, 7]
    assert last["class_names"] == ["grebe", "heron", "lynx", "marten", "trout", "perch"]
    assert [row[:3] for row in last["counts"][:3]] == [[0, 1, 4], [10, 11, 14], [40, 41, 44]]
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["recall"]["per_class"]) == {"0", "1", "4", "5", "6", "7"}
    assert metrics["acc"]["per_task"] == [1, 1, 1, 1]
    assert set(load_file(run / "representation.safetensors")) == {"0", "2", "3"}
    assert (run / "csv/metrics.csv").read_text() == "step,recall/class_04,accuracy/task_01\n1,0.2,0.3\n"
    assert (run / "run.log").read_text().splitlines() == [
        "12:00 INFO started", redaction.REMOVED, "12:02 INFO after task 1: 75 %",
    ]  # fmt: skip


def test_shared_classes_keep_their_records(run):
    shared = redaction.Subject(1, 1, (2, 3), (3,), ("beaver",))
    text = redaction.confusion((run / "confusion.json").read_text(), shared)
    assert json.loads(text)["after"][1]["classes"] == [0, 1, 2]
    assert redaction.shared_classes({0: (0, 2), 1: (2, 3), 2: (3,)}, 1, forgotten=(2,)) == {2}


def test_a_checkpoint_that_was_left_is_named_by_the_search(run):
    keep = (run / "checkpoints/task_2/model.safetensors").read_bytes()
    finish(*opened(run)[:2], NAMES)
    for place in ("checkpoints/task_2/model.safetensors", "backup/copy.dat", "checkpoints/task_0/model.safetensors"):
        (run / place).parent.mkdir(exist_ok=True)
        (run / place).write_bytes(keep)
        hits = leftovers(run, SUBJECT, needles_of())
        assert {hit.path for hit in hits} == {place}
        assert {hit.name for hit in hits} == {"prompt.1", "head.1.weight"}
        (run / place).unlink()


def test_an_older_checkpoint_is_kept_only_if_its_state_and_weights_agree(run):
    newer = run / "checkpoints/task_2/model.safetensors"
    (run / "checkpoints/task_0/model.safetensors").write_bytes(newer.read_bytes())
    listed = by_path(opened(run)[2])
    assert listed["checkpoints/task_0/model.safetensors"].action == "delete"


def test_a_damaged_record_is_deleted_rather_than_kept(run):
    for path in ("confusion.json", "metrics.json", "representation.safetensors", "checkpoints/task_0/state.json"):
        (run / path).write_bytes(b"\x00otter")
    listed = by_path(opened(run)[2])
    assert [listed[p].action for p in ("confusion.json", "metrics.json", "representation.safetensors")] == [
        "delete"
    ] * 3
    assert listed["checkpoints/task_0/model.safetensors"].action == "delete"


def test_the_certificate_lists_every_file_with_digests_that_hold(run):
    before = tree_of(run)
    journal, log, _ = opened(run)
    salt = journal.salt
    path = finish(journal, log, NAMES)
    certificate, sha = certificates.read(path)
    assert certificate["state"] == "done"
    assert check_pinned(log.entries(), certificate, sha) is None
    listed = {entry["path"]: entry for entry in certificate["files"]}
    assert set(listed) == set(before)
    import hashlib

    for name, entry in listed.items():
        start = b"" if entry["action"] == "kept" else salt
        assert entry["sha256_before"] == hashlib.sha256(start + before[name]).hexdigest()
        assert entry["bytes"] == len(before[name])
        if entry["action"] == "deleted":
            assert not (run / name).exists()
        else:
            assert entry["sha256_after"] == hashlib.sha256((run / name).read_bytes()).hexdigest()


def test_the_audit_log_tells_every_act_once_in_the_order_of_the_plan(run):
    finish(*opened(run)[:2], NAMES)
    entries = audit_of(run)
    assert entries[0]["event"] == "request_opened"
    assert entries[-1]["event"] == "request_closed"
    acts = [(entry["event"], entry["data"].get("path", entry["data"].get("name"))) for entry in entries]
    assert len(set(acts)) == len(acts)
    names = {name for event, name in acts if event == "component_deleted"}
    assert names == {"prompt.1", "head.1.weight", "head.1.bias", "seen.1"}


def test_digests_of_what_was_deleted_are_salted_and_the_salt_is_gone(run):
    journal, log, _ = opened(run)
    salt = journal.salt
    certificate, _ = certificates.read(finish(journal, log, NAMES))
    gone = [entry for entry in certificate["components"] if entry["action"] == "deleted"]
    assert len(gone) == 4
    from cl_platform.unlearning.canonical import tensor_digest

    for entry in gone:
        tensor = state_after(3)[entry["name"]]
        assert entry["salted"]
        assert entry["sha256_before"] == tensor_digest(entry["name"], tensor, salt)
        assert entry["sha256_before"] != tensor_digest(entry["name"], tensor)
    for path in run.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert salt not in content
        assert salt.hex().encode() not in content
    assert not (run / FOLDER).exists()


def test_the_salt_is_overwritten_where_it_lies(run, tmp_path):
    journal, log, _ = opened(run)
    os.link(run / FOLDER / "salt", tmp_path / "same_place")
    assert (tmp_path / "same_place").read_bytes() == journal.salt
    finish(journal, log, NAMES)
    assert (tmp_path / "same_place").read_bytes() == bytes(16)


def test_no_plain_digest_of_a_deleted_part_is_ever_on_disk(run):
    from cl_platform.unlearning.canonical import tensor_digest

    opened(run)
    plain = [tensor_digest(f"{name}.1", state_after(3)[f"{name}.1"]) for name in ("prompt", "seen")]
    for path in (run / "unlearning").rglob("*"):
        if path.is_file():
            assert not any(digest.encode() in path.read_bytes() for digest in plain), path


def test_images_and_curves_of_classes_leave_tensorboard_and_its_host_name_the_certificate(tmp_path):
    run = write_run(tmp_path / "run", tensorboard=True)
    assert redaction.image_tags(run / EVENTS) == ["confusion/after_task_01"]
    journal, log, actions = opened(run)
    assert by_path(actions)[EVENTS].action == "rewrite"
    path = finish(journal, log, NAMES)
    assert redaction.image_tags(run / EVENTS) == []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / EVENTS))
    read.Reload()
    assert read.Tags()["scalars"] == ["accuracy/task_01", "recall/class_05"]
    for proof in (path, run / "unlearning/audit.jsonl"):
        assert HOST not in proof.read_text()
        assert "tensorboard/events.out.tfevents.1700000000.host.77.0" in proof.read_text()


def test_a_half_written_record_of_tensorboard_goes(tmp_path):
    run = write_run(tmp_path / "run", tensorboard=True)
    whole, clean = (run / EVENTS).read_bytes(), redaction.events(run / EVENTS, SUBJECT)
    for torn in (whole[:7], whole[:20], b"\xff" * 40):
        (run / EVENTS).write_bytes(whole + torn)
        assert redaction.events(run / EVENTS, SUBJECT) == clean
        (run / EVENTS).write_bytes(clean + torn)
        assert redaction.events(run / EVENTS, SUBJECT) == clean
    (run / EVENTS).write_bytes(clean)
    assert redaction.events(run / EVENTS, SUBJECT) is None


def test_the_log_that_the_process_writes_to_keeps_its_place(run):
    with open(run / "run.log", "a") as held:
        finish(*opened(run)[:2], NAMES)
        held.write("12:03 INFO purged\n")
    lines = (run / "run.log").read_text().splitlines()
    assert lines[1:] == [redaction.REMOVED, "12:02 INFO after task 1: 75 %", "12:03 INFO purged"]


def test_links_and_odd_files_are_listed_and_left(run, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/weights.bin").write_bytes(b"abc")
    (run / "linked").symlink_to(tmp_path / "outside")
    os.mkfifo(run / "pipe")
    os.link(run / "notes.txt", tmp_path / "again.txt")
    _, _, actions = opened(run)
    listed = by_path(actions)
    assert (listed["linked"].action, listed["pipe"].action) == ("keep", "keep")
    assert "not covered" in listed["linked"].reason
    assert "another name" in listed["notes.txt"].reason
    finish(journals.find(run), *_log(run))
    assert (tmp_path / "outside/weights.bin").read_bytes() == b"abc"


def _log(run):
    from cl_platform.unlearning.audit import AuditLog

    return AuditLog(run / "unlearning/audit.jsonl", NAMES), NAMES


def test_an_unknown_file_whose_name_tells_too_much_is_listed_without_it(run):
    (run / "otter").mkdir()
    (run / "otter/mine.txt").write_text("x")
    path = finish(*opened(run)[:2], NAMES)
    assert "*/mine.txt" in {entry["path"] for entry in certificates.read(path)[0]["files"]}


def test_weights_that_a_logger_was_given_go(run):
    (run / "wandb/files").mkdir(parents=True)
    (run / "wandb/files/model.bin").write_bytes((run / "checkpoints/task_2/model.safetensors").read_bytes())
    (run / "wandb/files/summary.json").write_text("{}")
    listed = by_path(opened(run)[2])
    assert listed["wandb/files/model.bin"].action == "delete"
    assert listed["wandb/files/summary.json"].action == "keep"


def test_files_that_the_caller_removes_or_brings_are_taken(run):
    journal = journals.begin(run, {})
    journal.stage("report.html", b"new")
    journal.stage("unknown/new.txt", b"new too")
    listed = by_path(plan_purge(journal, SUBJECT, {}, removals={"notes.txt": "says too much"}))
    assert (listed["report.html"].action, listed["unknown/new.txt"].action) == ("rewrite", "rewrite")
    assert (listed["notes.txt"].action, listed["notes.txt"].reason) == ("delete", "says too much")


def test_a_second_request_is_refused_while_one_is_open(run):
    opened(run)
    with pytest.raises(UserError, match="still open"):
        journals.begin(run, {})


def test_of_the_data_cache_goes_what_was_asked_for_and_nothing_beside_it(run, tmp_path):
    cache, mine, other = tmp_path / "cache", "a" * 40, "b" * 40
    for name in (f"entries/{mine}/about.json", f"index/{mine}.json", f"entries/{other}/train.npy", "other/file"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_bytes(b"x")
    journal, log, actions = opened(run)
    asked = [f"entries/{mine}", f"index/{mine}.json", "other/file", "entries", "."]
    journal.commit(actions, journal.plan()[1], outside=[cache / name for name in asked])
    finish(journal, log, NAMES)
    assert sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()) == [
        f"entries/{other}/train.npy", "other/file",
    ]  # fmt: skip
    assert str(tmp_path) not in (run / "unlearning/audit.jsonl").read_text()


# -- the search ------------------------------------------------------------------------------------------------------


def test_the_search_finds_a_needle_wherever_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "CHUNK", 256)
    draws = torch.Generator().manual_seed(9)
    tensors = {f"w{i}": torch.randn(40, generator=draws) for i in range(30)}
    found = scan.needles(scan.leads(tensors), {})
    assert len(found) == 30
    noise = torch.randint(0, 256, (2000,), generator=draws, dtype=torch.uint8).numpy().tobytes()
    for place in (0, 1, 3, 190, 193, 230, 255, 256, 257, 511, 1936):
        content = noise[:place] + found["w7"] + noise[place:]
        (tmp_path / "x.bin").write_bytes(content)
        assert scan.found_in(tmp_path / "x.bin", found) == ["w7"], place
    (tmp_path / "x.bin").write_bytes(noise + found["w7"][:-1])
    assert scan.found_in(tmp_path / "x.bin", found) == []


def test_what_stands_everywhere_is_not_searched_for():
    before = {
        "zeros": torch.zeros(99), "few": torch.tensor([1, 2]), "counts": torch.arange(40), "kept": torch.randn(40),
        "moved": torch.randn(40), "gone": torch.randn(40),
    }  # fmt: skip
    after = {"kept": before["kept"], "other": before["moved"].clone()}
    assert list(scan.needles(scan.leads(before), after)) == ["gone"]


def test_an_entry_by_the_name_of_a_deleted_tensor_is_found(tmp_path):
    save_file({"prompt.1": torch.ones(3)}, tmp_path / "x.safetensors")
    (hit,) = scan.scan_for({"prompt.1": bytes(range(64))}, tmp_path)
    assert (hit.path, hit.name, hit.how) == ("x.safetensors", "prompt.1", "name")
