"""Verification finds what was forgotten exactly, what was not forgotten, and what it cannot know."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from forgetful_runs import TARGET, WORKSHOP, copied, drop, forget, nothing, trained

from cl_platform.errors import UserError
from cl_platform.run_folder import checkpoints
from cl_platform.unlearning.audit import AuditLog, check_pinned
from cl_platform.unlearning.certificate import read
from cl_platform.unlearning.checks import NO_PROOF
from cl_platform.unlearning.verify import Options, verify

said: list[str] = []


def verified(run, **options):
    said.clear()
    return verify(run, WORKSHOP, Options(**options), said.append)


def outcome(result, name):
    return next(check for check in result.checks if check.name == name)


def test_an_exact_drop_is_proven_and_written_into_certificate_and_log(run, references):
    forget(run)
    result = verified(run, reference=references[0])
    assert result.verdict == "exact, proven on this machine"
    assert result.passed
    assert result.comparison.equal
    assert result.comparison.tensors > 10
    for key, sides in result.figures.items():
        if sides.u.value is not None and sides.r.value is not None:
            assert sides.gap.value == 0, key
    certificate, sha256 = read(run / "unlearning" / "certificate.json")
    assert certificate["verification"]["verdict"] == result.verdict
    assert certificate["reference"]["equal"] is True
    log = AuditLog(run / "unlearning" / "audit.jsonl")
    assert log.entries()[-1]["event"] == "verified"
    assert check_pinned(log.entries(), certificate, sha256) is None
    assert verified(run, reference=references[0]).passed  # and once more on the certificate it has written


def test_an_unlearner_that_does_nothing_never_passes_whatever_it_claims(run, references):
    forget(run, nothing, keep_older=True)
    result = verified(run, reference=references[0])
    assert not result.passed
    assert not result.comparison.equal
    assert outcome(result, "changed").passed is False
    assert outcome(result, "parts").passed is False
    assert outcome(result, "checkpoints").passed is False
    assert result.verdict.startswith("not forgotten as claimed")
    auc = result.figures["mia_auc_loss"]
    assert auc.u == auc.o  # the attack sees the model before
    assert result.figures["relearn_steps"].u == result.figures["relearn_steps"].o


@pytest.mark.parametrize("level", ["approximate", "E-law"])
def test_doing_nothing_does_not_pass_at_a_level_without_equal_bytes(run, references, level):
    forget(run, nothing, level=level)
    result = verified(run, reference=references[0])
    assert not result.passed
    assert "proven" not in result.verdict


def test_a_change_that_forgets_nothing_does_not_pass_as_approximate(run, references):
    def nudge(learner):
        for block in learner.composition.members["s_lora"].heads.all("bias"):
            block.data.add_(1e-6)

    forget(run, nudge, level="approximate")
    result = verified(run, reference=references[0])
    assert outcome(result, "changed").passed is True
    assert any(check.passed is False and "answers" in check.name for check in result.checks)
    assert not result.passed


def test_a_reference_that_is_given_decides_the_verdict(run, references):
    forget(run)
    result = verified(run, reference=references[1])  # the same but for its seed
    assert not result.passed
    assert outcome(result, "bytes").passed is False
    assert "differ from the reference's" in result.verdict
    assert verified(run, reference=references[0]).passed


def test_one_flipped_bit_is_found_and_named(run, references):
    def flip(learner):
        drop(learner)
        head = learner.composition.members["s_lora"].heads.get(0, "bias")
        bits = head.data.view(torch.int32)
        bits[0] ^= 1

    forget(run, flip)
    result = verified(run, reference=references[0])
    (difference,) = result.comparison.differences
    assert difference.name.endswith("heads.tasks.0.bias")
    assert difference.elements == 1
    assert not result.passed


def test_a_checkpoint_that_still_holds_the_task_fails_and_serves_as_the_model_before(run, references):
    forget(run, keep_older=True)
    result = verified(run, reference=references[0])
    assert outcome(result, "bytes").passed is True
    assert outcome(result, "checkpoints").passed is False
    assert "checkpoints/task_2" in outcome(result, "checkpoints").detail
    assert result.figures["forget_acc_test_cil"].o.value is not None
    assert not result.passed


def test_dropped_rows_are_no_evidence_and_the_attack_needs_no_label(run, references):
    forget(run)
    result = verified(run, reference=references[0])
    assert result.figures["forget_acc_train_cil"].u.by_construction
    assert result.figures["ua"].u.value == 1
    assert result.figures["ua"].u.by_construction
    assert result.figures["mia_auc_loss"].u.value is None
    assert result.lead == "entropy"
    assert result.figures["mia_auc_entropy"].u.value is not None
    assert outcome(result, "answers").passed is None
    assert result.figures["mia_tpr_at_1fpr"].u.reason == "needs >= 100 non-members, has 12"
    assert result.figures["forget_probe_acc"].u.value is not None
    assert (
        result.figures["relearn_steps"].u.reason == "the accuracy on the task before forgetting is not known any more"
    )


def test_relearning_takes_u_as_long_as_the_reference_when_nothing_is_left(run, references, monkeypatch):
    monkeypatch.setattr("cl_platform.unlearning.relearn.RELEARNING_STEPS", (0, 1, 2, 4))
    forget(run)
    rows = "after_task,task_0,task_1,task_2\n0,0.9,NaN,NaN\n1,0.9,0.8,NaN\n2,0.9,NaN,0.9\n"
    (run / "accuracy_matrix.csv").write_text(rows)
    steps = verified(run, reference=references[0]).figures["relearn_steps"]
    assert steps.u == steps.r
    assert steps.u.censored_at == 4 or steps.u.value > 0


def test_other_numerics_are_not_compared_and_a_given_reference_of_other_numerics_is_refused(run, references):
    from cl_platform.unlearning.canonical import fingerprint

    forget(run, numerics={**fingerprint(), "threads": 77})
    result = verified(run)
    assert result.comparison is None
    assert result.verdict == "exact by construction, not yet compared"
    assert "threads 77" in outcome(result, "bytes").detail
    (references[0] / "reference.json").write_text(json.dumps({"fingerprint": fingerprint()}))
    with pytest.raises(UserError, match="threads") as refusal:
        verified(run, reference=references[0])
    (references[0] / "reference.json").unlink()
    assert refusal.value.exit_code == 2


def test_the_reference_is_trained_once_and_its_price_is_said_before(run):
    forget(run)
    first = verified(run)
    assert any("a run without task 1 is trained, about 4 steps, 32 images, 2 s" in line for line in said)
    assert first.passed
    assert not first.reference.cached
    again = verified(run)
    assert again.reference.cached
    assert any("from the cache" in line for line in said)
    config = yaml.safe_load((again.reference.folder / "config.yaml").read_text())
    assert config["scenario"]["skip_tasks"] == [TARGET]
    newest = next(checkpoints(again.reference.folder))
    assert TARGET not in newest.state["learnt"]


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda run, _: run, "is the run itself"),
        (lambda run, learnt: learnt, "it has learnt task 1 itself"),
        (lambda run, _: run / "nowhere", "there is no such folder"),
        (lambda run, _: run / "checkpoints", "is no run folder"),
    ],
)
def test_a_folder_that_is_no_reference_is_refused(run, learnt, spoil, why):
    forget(run)
    with pytest.raises(UserError, match=why) as refusal:
        verified(run, reference=spoil(run, learnt))
    assert refusal.value.exit_code == 2


def test_a_reference_of_another_configuration_is_refused(run, references, tmp_path):
    forget(run)
    other = copied(references[0], tmp_path / "other")
    config = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**config, "optimizer": {"lr": 0.5}}))
    with pytest.raises(UserError, match="more than seed"):
        verified(run, reference=other)


def test_a_run_that_forgot_nothing_cannot_be_verified(run):
    with pytest.raises(UserError, match="nothing was forgotten"):
        verified(run)


@pytest.mark.parametrize("entry", [0, 1])
def test_a_changed_audit_log_is_named_by_its_entry_with_exit_code_3(run, entry):
    forget(run)
    path = run / "unlearning" / "audit.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[entry] = lines[entry].replace(":", " :", 1) if entry else lines[entry].replace('"drop"', '"dr0p"')
    path.write_text("".join(lines))
    with pytest.raises(UserError, match=f"entry {entry}") as refusal:
        verified(run)
    assert refusal.value.exit_code == 3


def test_a_changed_certificate_is_found_by_the_log(run):
    forget(run)
    path = run / "unlearning" / "certificate.json"
    path.write_text(path.read_text().replace('"lineage": "declared"', '"lineage": "verified"'))
    with pytest.raises(UserError, match="certificate") as refusal:
        verified(run)
    assert refusal.value.exit_code == 3


def test_a_forgotten_task_of_shared_weights_is_called_approximate_with_its_gaps(tmp_path):
    run = trained(tmp_path, "finetune")
    forget(run, level="approximate", leaks=("L-01",))
    result = verified(run)
    assert outcome(result, "bytes").passed is None
    assert not result.comparison.equal
    assert NO_PROOF in result.verdict or "not forgotten" in result.verdict
    assert "proven" not in result.verdict
    assert result.figures["js_retain"].u.value > 0
