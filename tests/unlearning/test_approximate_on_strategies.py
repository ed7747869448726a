"""Approximate methods on every strategy: what was trained is found, what is frozen stays, closed forms are refused."""

import dataclasses

import pytest
import tiny
import torch
from forgetful import changed, method, state_of

import cl_platform.strategies  # noqa: F401  # registers them
from cl_platform.errors import UserError
from cl_platform.registry import strategies
from cl_platform.unlearning.approximate import ApproximateRequest
from cl_platform.unlearning.approximate.work import Work

CLOSED = {"nmc", "slda", "ranpac"}
WITH_A_RULE = {"s_prompt", "s_lora", "online_lora", "clpu"}
TUNES_THE_TRUNK = {"finetune", "joint", "derpp", "icarl", "ewc", "lwf", "fpf"}
MEASURED = ("composition.members.icarl.means.", "composition.teacher.")
"""What is measured with the network, and the copy of it that teaches."""


def stream():
    return tiny.digits(2)


def begun_and_ended(name):
    """A learner that went through the tasks, without any update: what it trains does not depend on them."""
    learner = tiny.built(tiny.config_of(name), stream())
    for phase in learner.composition.arrange(stream().tasks):
        learner.begin_task(phase.task, 1)
        learner.end_task(phase.task)
    return learner


def asked():
    first, second = stream().tasks
    return ApproximateRequest(task=first, forget=first.train, retain={1: second.train}, seed=0, min_retain_ratio=0.0)


@pytest.mark.parametrize("name", strategies.names())
def test_every_strategy_has_a_copy_whose_trained_numbers_are_found(name):
    learner = begun_and_ended(name)
    before = state_of(learner)
    if name in CLOSED:
        with pytest.raises(UserError, match=rf"{name}\] trains nothing"):
            Work(learner, asked(), "grad_ascent")
        return
    work = Work(learner, asked(), "grad_ascent")
    assert work.parameters
    mine = {p.data_ptr() for p in learner.parameters() if p.numel()}
    assert not any(p.data_ptr() in mine for p in work.learner.parameters() if p.numel())
    assert any(n.startswith("backbone.") for n in work.parameters) == (not work.learner.backbone.frozen)
    if name in TUNES_THE_TRUNK:
        assert not work.learner.backbone.frozen
    assert work.by_head == (name not in WITH_A_RULE)
    with torch.no_grad():
        for parameter in work.parameters.values():
            parameter.add_(1.0)
    assert not changed(learner, before)  # nothing is shared with what the copy may change
    work.replace(learner)
    found = changed(learner, before)
    assert {n for n in found if not n.startswith(MEASURED)} == set(work.parameters)
    if name == "icarl":
        assert "sum" in {n.split(".")[-1] for n in found if n.startswith(MEASURED[0])} <= {"sum", "seen"}
    learner.composition.remeasure()  # what was measured is of the network as it is by now
    assert changed(learner, before) == found


@pytest.mark.parametrize("name", ["coda_prompt", "l2p", "s_lora", "derpp"])
def test_a_restored_learner_forgets_as_the_one_that_learnt(name):
    learner = begun_and_ended(name)
    restored = tiny.built(tiny.config_of(name), stream())
    restored.load_learnt_state(learner.learnt_state())
    restored.learnt = list(learner.learnt)
    reports = [method("grad_diff", epochs=1).apply(one, asked()) for one in (learner, restored)]
    one, other = (dataclasses.replace(report, seconds=0.0) for report in reports)
    assert one == other
    assert not changed(restored, state_of(learner))


@pytest.mark.parametrize("name", ["derpp", "coda_prompt"])
def test_a_learner_in_the_middle_of_a_run_is_copied_without_its_trainer(name):
    learner = tiny.learnt(tiny.config_of(name), stream())
    trainer = learner.trainer
    learner.timed = lambda: trainer  # whatever a run has hung on the learner is not copied
    work = Work(learner, asked(), "grad_ascent")
    assert work.learner._trainer is None
    assert work.learner.task is learner.task
    before = state_of(learner)
    report = method("random_label", epochs=1, lr=0.1).apply(learner, asked())
    assert learner.trainer is trainer
    assert report.steps == 1
    assert changed(learner, before) <= set(work.parameters)
    assert changed(learner, before)
    learner.drop_task(0)
    assert learner.head.classes == sorted(stream().tasks[1].classes)
    tiny.answers(learner, tiny.images_of(stream()))
