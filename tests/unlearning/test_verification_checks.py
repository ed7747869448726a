"""What a verification asserts, one check at a time, and the sentence it ends in."""

from __future__ import annotations

import pytest

from cl_platform.metrics.measured import Measured, undefined
from cl_platform.unlearning.canonical import Comparison, Difference
from cl_platform.unlearning.checks import NO_PROOF, checks_of, verdict
from cl_platform.unlearning.figures import Sides

EQUAL = Comparison(True, 3, 96, 0, ())
OTHER = Comparison(False, 3, 96, 1, (Difference("head.bias", "values", 1, 0.5),))
GONE = Measured(0.0, by_construction=True)


def sides(u, r, error=0.0):
    return Sides(undefined("gone"), Measured(u, error=error), Measured(r, error=error))


def figures(train=(0.0, 0.0), test=(0.0, 0.0), attack=(0.5, 0.5), error=0.02):
    return {
        "forget_acc_train_cil": sides(*train, error),
        "forget_acc_test_cil": sides(*test, error),
        "retain_acc_test_cil": sides(0.8, 0.9),
        "mia_auc_loss": sides(*attack, error),
        "mia_auc_entropy": sides(0.9, 0.1, error),
    }


def certificate(level="approximate", actions=("deleted", "kept")):
    names = ("part.1", "part.0")
    entries = [{"name": name, "action": action} for name, action in zip(names, actions, strict=True)]
    return {"level": level, "components": entries}


def judged(found=None, level="approximate", comparison=OTHER, state=("part.0",), held=(), files=(), **changes):
    found = figures() if found is None else found
    checks = checks_of(certificate(level, **changes), state, held, comparison, None, found, files)
    return {check.name: check for check in checks}, verdict(level, comparison, checks, found)


def test_an_exact_level_stands_and_falls_with_the_bytes():
    checks, said = judged(level="E-bit", comparison=EQUAL)
    assert checks["bytes"].passed is True
    assert said == "exact, proven on this machine"
    checks, said = judged(level="E-bit", comparison=OTHER)
    assert checks["bytes"].passed is False
    assert said.startswith("not forgotten as claimed")
    assert "head.bias" in said


def test_bytes_that_were_not_compared_prove_nothing():
    checks = checks_of(certificate("E-bit"), ("part.0",), (), None, "other numerics", figures(), ())
    assert verdict("E-bit", None, checks, figures()) == "exact by construction, not yet compared"


def test_equality_in_distribution_may_happen_to_be_equality_of_bytes():
    assert judged(level="E-law")[1] == "exact in distribution"
    assert judged(level="E-law")[0]["bytes"].passed is None
    assert judged(level="E-law", comparison=EQUAL)[1] == "exact in distribution, and here the bytes are equal"


def test_an_approximate_verdict_gives_the_gaps_and_is_no_proof():
    _, said = judged()
    assert said.startswith("approximate: gaps to the reference forget_acc_test_cil +0.000")
    assert "retain_acc_test_cil -0.100" in said
    assert said.endswith(NO_PROOF)


@pytest.mark.parametrize(
    "found, failing",
    [
        (figures(test=(0.5, 0.0)), "answers"),
        (figures(train=(0.5, 0.0)), "answers on training images"),
        (figures(attack=(0.7, 0.5)), "attack"),
        (figures(attack=(0.3, 0.5)), "attack"),  # less like members than unseen images gives the task away as well
        (figures(test=(0.0, 0.5), attack=(0.52, 0.5)), None),
    ],
)
def test_knowing_more_of_the_task_than_the_reference_fails_beyond_chance(found, failing):
    checks, _ = judged(found)
    assert [name for name, check in checks.items() if check.passed is False] == ([failing] if failing else [])


def test_answers_that_cannot_be_given_are_no_evidence():
    found = figures()
    found["forget_acc_test_cil"] = Sides(GONE, GONE, GONE)
    assert judged(found)[0]["answers"].passed is None
    found["forget_acc_test_cil"] = Sides(GONE, Measured(0.9, error=0.05), GONE)  # the rows are there still
    assert judged(found)[0]["answers"].passed is False


def test_without_labels_the_attack_by_entropy_is_judged():
    found = figures()
    missing = undefined("no labels")
    found["mia_auc_loss"] = Sides(missing, missing, missing)
    assert judged(found)[0]["attack"].passed is False  # its entropy is far from the reference's


def test_parts_and_files_that_should_be_gone_are_named():
    assert "part.1" in judged(state=("part.0", "part.1"))[0]["parts"].detail
    assert judged(state=("part.0", "part.1"))[0]["parts"].passed is False
    assert judged(level="E-bit", comparison=EQUAL, held=("backbone",))[0]["parts"].passed is False
    assert judged(held=("backbone",))[0]["parts"].passed is True  # what an approximate level admits
    assert judged(files=("checkpoints/task_2",))[0]["checkpoints"].passed is False
    assert judged(actions=("kept", "kept"))[0]["changed"].passed is False
