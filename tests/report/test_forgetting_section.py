"""The section about forgotten tasks: before, after and never learnt side by side, escaped, absent without requests."""

from __future__ import annotations

import json

import pytest
from run_folders import Made, write_run
from test_report_html import page_of

from cl_platform.errors import UserError
from cl_platform.report.forgetting import forgotten_tasks

REQUEST = "ab" * 16


def side(value=None, reason=None, **more):
    return {"value": value, "reason": reason, **more}


def certificate(**changes):
    metric = {"o": side(0.9, error=0.05), "u": side(0.0, by_construction=True), "r": side(0.0, by_construction=True),
              "gap": side(0.0, by_construction=True)}  # fmt: skip
    attack = {
        "o": side(reason="the model before forgetting is gone"),
        "u": side(0.56),
        "r": side(0.52),
        "gap": side(0.04),
    }
    nothing = {name: side(reason="needs >= 100 non-members, has 12") for name in ("o", "u", "r", "gap")}
    made = {
        "request_id": REQUEST,
        "state": "done",
        "created_utc": "2025-01-02T03:04:05Z",
        "closed_utc": "2025-01-02T03:04:06Z",
        "target": {"task_id": 1, "class_ids": [2, 3], "n_train": 240, "n_buffer": 0, "trigger": "command"},
        "method": {"requested": "auto", "used": "drop", "params": {}, "reason": "no kept component has seen the task"},
        "level": "E-bit",
        "level_basis": {"lineage": "verified", "leaks": []},
        "components": [
            {"name": "a", "action": "deleted", "bytes_before": 64},
            {"name": "b", "action": "kept", "bytes_before": 1000},
        ],
        "files": [{"path": "checkpoints/task_2/model.safetensors", "action": "rewritten", "reason": "held it"}],
        "not_covered": [{"what": "process memory", "why": "it is not wiped"}],
        "cost": {"seconds": 0.25, "seconds_purge": 0.5, "optimizer_steps": 0},
        "reference": {"compared": True, "equal": True, "tensors": 42, "bytes": 123456, "differences": []},
        "verification": {
            "verdict": "exact, proven on this machine",
            "passed": True,
            "checks": [{"name": "bytes", "passed": True, "detail": "42 tensors equal the reference's"}],
            "metrics": {"forget_acc_test_cil": metric, "mia_auc_entropy": attack, "mia_tpr_at_1fpr": nothing},
        },
    }
    return {**made, **changes}


def write(run, made, name=REQUEST):
    (run / "unlearning").mkdir(exist_ok=True)
    for file in (f"certificate_{name}.json", "certificate.json"):
        (run / "unlearning" / file).write_text(json.dumps(made))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", Made())


def test_a_run_that_forgot_nothing_has_no_section(run):
    page = page_of(run)
    assert "forgetting" not in page.ids
    assert "#forgetting" not in page.links


def test_the_three_models_stand_side_by_side_with_verdict_and_definitions(run):
    write(run, certificate())
    page = page_of(run)
    assert "forgetting" in page.ids
    assert "#forgetting" in page.links
    assert "Exact, proven on this machine." in page.text
    assert "before after never learnt gap definition" in page.text
    assert "4.3.1 forget_acc_test_cil 90.0 % ± 5.0 0.0 %" in page.text
    assert "4.3.8 mia_auc_entropy - the model before forgetting is gone 56.0 % 52.0 % 4.0 Members" in page.text
    assert "by construction, no evidence" in page.text
    assert "needs >= 100 non-members, has 12" in page.text
    assert "42 tensors, 123,456 bytes" in page.text
    assert "the same bytes as a run that never learnt the task" in page.text
    assert "tensors deleted 1 tensor, 64 bytes before" in page.text
    assert "not covered: process memory it is not wiped" in page.text


def test_a_failed_check_is_a_warning_with_the_tensors_that_differ(run):
    differences = [{"name": "head.blocks.tasks.2.bias", "kind": "values", "elements": 1, "largest": 1e-9}]
    checks = [{"name": "bytes", "passed": False, "detail": "1 of 42 tensors differ"}]
    write(run, certificate(
        reference={"compared": True, "equal": False, "tensors": 42, "bytes": 9, "differences": differences},
        verification={"verdict": "not forgotten as claimed: bytes", "passed": False, "checks": checks, "metrics": {}},
    ))  # fmt: skip
    page = page_of(run)
    assert "Not forgotten as claimed: bytes." in page.text
    assert "head.blocks.tasks.2.bias 1 1e-09" in page.text
    assert "failed" in page.text


def test_a_request_that_was_not_verified_says_how_to(run):
    write(run, certificate(verification=None, reference=None))
    assert "Not verified yet" in page_of(run).text


def test_requests_stand_in_the_order_in_which_they_came(run):
    second = certificate(
        created_utc="2025-01-03T00:00:00Z", target={"task_id": 0, "class_ids": [0]}, state="refused", level="none"
    )
    write(run, second, "0" * 32)
    write(run, certificate())
    assert [task.task_id for task in forgotten_tasks(run)] == [1, 0]
    assert "Task 0: none (refused)" in page_of(run).text


def test_what_a_certificate_says_is_escaped(run):
    evil = "<script>alert(1)</script>"
    write(run, certificate(
        method={"requested": evil, "used": evil, "reason": evil},
        not_covered=[{"what": evil, "why": evil}],
        verification={"verdict": evil, "passed": False, "checks": [{"name": evil, "passed": None, "detail": evil}],
                      "metrics": {evil: {"u": side(reason=evil)}}},
    ))  # fmt: skip
    page = page_of(run)
    assert "script" not in page.tags
    assert evil in page.text


def test_a_damaged_certificate_is_named(run):
    (run / "unlearning").mkdir()
    (run / "unlearning" / "certificate_x.json").write_text("{")
    with pytest.raises(UserError, match="certificate_x.json"):
        page_of(run)
    (run / "unlearning" / "certificate_x.json").write_text("[]")
    with pytest.raises(UserError, match="no certificate"):
        page_of(run)
