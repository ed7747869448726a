"""Probe, nearest mean and drift of the features after each task."""

import pytest
import torch
from tiny import answers, built, config_of, copy_of, differing, digits, images_of, learn

from cl_platform.representation import Representation


def looked_at(name, folder, **keys):
    config = config_of(name, **keys)
    learner, probe = built(config, digits()), Representation(digits(), 0, folder)
    for position, task in enumerate(digits().tasks):
        learn(learner, config, [task])
        probe.end_task(learner, position)
    return learner, probe


def test_a_frozen_trunk_without_prompts_does_not_drift(tmp_path):
    _, probe = looked_at("linear_probe", tmp_path)
    entries = probe.entries("cil")
    assert entries["cka_drift_cil"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert entries["cka_drift_cil"]["after"][0] is None
    assert 0.5 < entries["probe_acc_cil"]["value"] <= 1
    assert len(entries["nme_acc_cil"]["after"]) == 2


def test_a_trained_trunk_drifts(tmp_path):
    _, probe = looked_at("finetune", tmp_path, optimizer={"lr": 0.01})
    assert probe.entries("cil")["cka_drift_cil"]["value"] > 0.01


@pytest.mark.parametrize("name", ["coda_prompt", "nmc", "finetune"])
def test_looking_changes_nothing(name, tmp_path):
    config = config_of(name)
    learner = learn(built(config, digits()), config, digits().tasks)
    before, state = copy_of(learner.state_dict()), torch.get_rng_state()
    expected = answers(learner, images_of(digits()))
    probe = Representation(digits(), 0, tmp_path)
    for position in range(2):
        probe.end_task(learner, position)
    assert not differing(before, learner.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(expected, answers(learner, images_of(digits())))


def test_a_resumed_run_compares_with_the_features_of_the_first_process(tmp_path):
    learner, whole = looked_at("finetune", tmp_path)
    other = Representation(digits(), 0, tmp_path)
    other.reopen(whole.records[:1])
    other.end_task(learner, 1)
    assert other.records == whole.records


def test_nothing_seen_has_a_reason(tmp_path):
    entries = Representation(digits(), 0, tmp_path).entries("cil")
    assert {entry["reason"] for entry in entries.values()} == {"empty"}
