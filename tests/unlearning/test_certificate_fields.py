"""A certificate has exactly its fields in their types, contradicts itself nowhere and names nobody."""

import copy
import json

import pytest
import torch
from purgeable import NAMES, certificate_draft

from cl_platform.errors import UserError
from cl_platform.unlearning import certificate as certificates
from cl_platform.unlearning import journal as journals
from cl_platform.unlearning.audit import AuditLog
from cl_platform.unlearning.canonical import tensor_digest
from cl_platform.unlearning.certificate_fields import problems


@pytest.fixture
def draft(tmp_path):
    journal = journals.begin(tmp_path, {})
    before = {"prompt.1": torch.randn(4, 2), "prompt.0": torch.randn(4, 2), "means": torch.ones(3)}
    after = {"prompt.0": before["prompt.0"].clone(), "means": torch.zeros(3), "new": torch.ones(2)}
    owners = {"prompt.1": ("prompt", (1,)), "prompt.0": ("prompt", (0,)), "means": ("statistics", (0, 1))}
    seen = certificates.look_at(before, journal.salt)
    entries = certificates.component_entries(seen, after, owners, {"means": "recomputed"})
    made = certificate_draft(journal, entries)
    made["files"] = [
        {"path": "a/b.json", "action": "deleted", "reason": "x", "bytes": 3, "sha256_before": "0" * 64,
         "sha256_after": None},
    ]  # fmt: skip
    return made, before, after, journal


def test_a_draft_has_no_problem(draft):
    assert problems(draft[0], NAMES) == []


def test_a_class_may_be_called_like_a_value_of_a_key(draft):
    made = draft[0]
    made["method"]["params"] = {"optimizer": "adam", "checks": {"retain_split": "train"}}
    assert problems(made, ["train", "Adam"]) == []
    made["method"]["params"]["word"] = "maple"
    assert problems(made, ["train", "maple"])


def test_components_say_what_became_of_each_tensor(draft):
    made, before, after, journal = draft
    entries = {entry["name"]: entry for entry in made["components"]}
    assert {name: entry["action"] for name, entry in entries.items()} == {
        "prompt.1": "deleted", "prompt.0": "kept", "means": "recomputed", "new": "modified",
    }  # fmt: skip
    gone, kept = entries["prompt.1"], entries["prompt.0"]
    assert (gone["bytes_before"], gone["bytes_after"], gone["sha256_after"], gone["owners"]) == (32, 0, None, [1])
    assert gone["sha256_before"] == tensor_digest("prompt.1", before["prompt.1"], journal.salt)
    assert kept["sha256_before"] == kept["sha256_after"] == tensor_digest("prompt.0", before["prompt.0"])
    assert (gone["salted"], kept["salted"], entries["means"]["salted"], entries["new"]["salted"]) == (
        True, False, True, False,
    )  # fmt: skip
    assert entries["new"]["sha256_before"] is None


def changed(made, path, value):
    made = copy.deepcopy(made)
    *parents, last = path.split(".")
    place = made
    for name in parents:
        place = place[int(name)] if name.isdigit() else place[name]
    if value is ...:
        del place[last]
    else:
        place[int(last) if last.isdigit() else last] = value
    return made


WRONG = {
    "request_id": "r1",
    "schema": "other",
    "state": "finished",
    "created_utc": "2025-01-02 03:04",
    "run.config_sha256": "ab",
    "run.git_commit": 3,
    "target.task_id": "1",
    "target.n_train": -1,
    "target.class_ids": [1.5],
    "target.trigger": "cron",
    "method.requested": "approximate:",
    "method.params": [],
    "level": "exact",
    "level_basis.lineage": "believed",
    "level_basis.leaks": ["L1"],
    "fingerprint.threads": 1.0,
    "components.0.action": "erased",
    "components.0.bytes_before": 1.5,
    "components.0.salted": 1,
    "files.0.path": "/etc/x",
    "files.0.sha256_before": "xyz",
    "kept_counts.n_train": 0.5,
    "cost.seconds": float("nan"),
    "cost.images": True,
    "audit.head": "0",
    "not_covered": {},
    "verification": {"ua": {"u": float("inf")}},
    "reference": {"compared": True},
}


@pytest.mark.parametrize("path", WRONG)
def test_a_value_of_another_type_is_named(draft, path):
    found = problems(changed(draft[0], path, WRONG[path]))
    assert found
    assert path.split(".")[0] in found[0]


@pytest.mark.parametrize("path", ["level", "run.version", "audit.entries", "components.0.salted", "cost.estimated"])
def test_a_missing_field_is_named(draft, path):
    assert any("is missing" in line for line in problems(changed(draft[0], path, ...)))


def test_an_unknown_field_is_named(draft):
    assert problems({**draft[0], "author": "x"}) == ["certificate.author is not a field"]


@pytest.mark.parametrize(
    "path,value,word",
    [
        ("method.reason", "read from /home/x/run", "path"),
        ("run.scenario", "C:\\data", "path"),
        ("method.params", {"source": "Otter"}, "class"),
        ("kept_counts", {"otter": 3}, "class"),
        ("files.0.path", "figures/otter/x.png", "class"),
        ("verification", {"note": "beaver, otter"}, "class"),
    ],
)
def test_what_is_nobodys_business_is_named(draft, path, value, word):
    assert any(word in line for line in problems(changed(draft[0], path, value), NAMES))


@pytest.mark.parametrize(
    "path,value",
    [
        ("level_basis.leaks", ["L-01"]),
        ("level_basis.lineage", "violated"),
        ("closed_utc", "2025-01-02T03:04:05Z"),
        ("level", "none"),
        ("method.used", "approximate:salun"),
        ("components.gone.salted", False),
        ("files.0.sha256_after", "0" * 64),
    ],
)
def test_contradictions_are_named(draft, path, value):
    names = [entry["name"] for entry in draft[0]["components"]]
    place = path.replace("gone", str(names.index("prompt.1")))
    assert problems(changed(draft[0], place, value))


def test_sealing_writes_the_newest_and_its_own_file_and_pins_the_log(draft, tmp_path):
    made = draft[0]
    log = AuditLog(tmp_path / "unlearning/audit.jsonl")
    log.append("request_opened", {}, made["request_id"])
    closed = certificates.closed(made, [certificates.FileEntry("a", "kept", "x", 1, "0" * 64, "0" * 64)])
    path = certificates.seal(closed, tmp_path / "unlearning", log)
    own = path.with_name(f"certificate_{made['request_id']}.json")
    assert path.read_bytes() == own.read_bytes()
    read, sha = certificates.read(path)
    assert (read["audit"]["entries"], read["audit"]["head"]) == (1, log.entries()[0]["hash"])
    assert log.entries()[1]["data"]["certificate_sha256"] == sha
    assert sha.encode() not in path.read_bytes()


def test_nothing_is_written_if_something_is_wrong(draft, tmp_path):
    log = AuditLog(tmp_path / "unlearning/audit.jsonl")
    with pytest.raises(ValueError, match="level"):
        certificates.seal({**draft[0], "level": "sure"}, tmp_path / "unlearning", log)
    assert not (tmp_path / "unlearning/certificate.json").exists()
    assert log.entries() == []


def test_a_damaged_certificate_is_refused_with_what_is_wrong(draft, tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps({**draft[0], "level": "sure"}))
    with pytest.raises(UserError, match=r"certificate\.level must be one of") as refusal:
        certificates.read(path)
    assert refusal.value.exit_code == 3
    path.write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        certificates.read(path)
    with pytest.raises(UserError, match="cannot be read"):
        certificates.read(tmp_path / "none.json")
