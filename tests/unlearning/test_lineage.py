"""Owner records: complete, named as the state is, true about every write, and still there after a drop."""

import functools

import pytest
import torch
from paired import quick, trained
from tiny import built, config_of, digits, learn

import cl_platform.strategies  # noqa: F401
from cl_platform import registry
from cl_platform.unlearning import lineage
from cl_platform.unlearning.canonical import tensor_digest
from cl_platform.unlearning.lineage import (
    WriteCheck,
    components,
    learnt_state,
)

NAMES = registry.strategies.names()


@functools.cache
def watched(name):
    """A learner of three tasks, and what the write check said about each."""
    config, stream = quick(name), digits(3)
    learner, check, found = built(config, stream), WriteCheck(), []
    for phase in learner.composition.arrange(stream.tasks):
        check.before(learner)
        learn(learner, config, [phase])
        found += check.after(learner, *(part.task_id for part in phase.task.parts or (phase.task,)))
    return learner, found


def test_rows_of_the_head_list_who_trained_them_and_who_stood_behind():
    def owners(name, **keys):
        learner = trained(config_of(name, strategy=keys), digits(3))
        found = {c.name: c.tasks for c in components(learner)}
        return [found[f"head.blocks.tasks.{t}"] for t in range(3)], found["backbone"]

    assert owners("linear_probe", loss="task") == ([(0,), (1,), (2,)], ())
    assert owners("linear_probe") == ([(0, 1, 2)] * 3, ())
    assert owners("finetune") == ([(0, 1, 2)] * 3, (0, 1, 2))
    assert owners("coda_prompt") == ([(0,), (0, 1), (0, 1, 2)], ())
    assert owners("dual_prompt", isolated=True) == ([(0,), (0, 1), (0, 2)], ())
    assert owners("nmc") == ([(0,), (1,), (2,)], ())


def test_a_union_of_tasks_belongs_to_all_of_them():
    learner, _ = watched("joint")
    found = {c.name: c.tasks for c in components(learner)}
    assert found["backbone"] == found["head.blocks.tasks.2"] == (0, 1, 2)
    assert learner.owners.learnt == [0, 1, 2]


def test_a_task_that_was_dropped_before_any_other_was_learnt_stays_listed_in_shared_weights():
    config, stream = config_of("finetune"), digits(3)
    learner = learn(built(config, stream), config, stream.tasks[:1])
    learner.drop_task(0)
    learn(learner, config, stream.tasks[1:2])
    found = {c.name: c.tasks for c in components(learner)}
    assert found["backbone"] == (0, 1)
    assert found["head.blocks.tasks.1"] == (0, 1)


@pytest.mark.parametrize("name", ["ewc", "si", "l2", "lwf"])
def test_records_and_teachers_taken_later_list_a_task_that_was_dropped_first(name):
    config, stream = config_of(name), digits(3)
    learner = learn(built(config, stream), config, stream.tasks[:1])
    learner.drop_task(0)
    learn(learner, config, stream.tasks[1:2])
    own = [c for c in components(learner) if c.name.startswith("composition")]
    assert own
    assert all(c.tasks == (0, 1) for c in own)


def digested(monkeypatch):
    """Names of what is digested from here on."""
    names = []

    def note(name, tensor):
        names.append(name)
        return tensor_digest(name, tensor)

    monkeypatch.setattr(lineage, "tensor_digest", note)
    return names


def test_what_was_digested_behind_a_task_serves_the_start_of_the_next(monkeypatch):
    config, stream = config_of("s_lora"), digits(3)
    learner, check, names = built(config, stream), WriteCheck(), digested(monkeypatch)
    counts = []
    for task in stream.tasks:
        check.before(learner)
        counts.append(len(names))
        learn(learner, config, [task])
        assert not check.after(learner, task.task_id)
        counts.append(len(names) - counts[-1])
        names.clear()
    assert counts[0] > 0
    assert counts[2] == counts[4] == 0
    assert counts[5] == len(learnt_state(learner))


def test_what_changes_between_two_tasks_is_digested_anew_and_blamed_on_neither(monkeypatch):
    config, stream = config_of("slda"), digits(3)
    learner, check = built(config, stream), WriteCheck()
    for task in stream.tasks[:2]:
        check.before(learner)
        learn(learner, config, [task])
        check.after(learner, task.task_id)
    learner.drop_task(0)
    with torch.no_grad():
        next(learner.backbone.parameters()).mul_(2)
    names = digested(monkeypatch)
    check.before(learner)
    assert [name for name in names if name.startswith("backbone.")]
    assert len(names) < len(learnt_state(learner))
    learn(learner, config, stream.tasks[2:])
    assert not check.after(learner, 2)


def test_a_write_that_no_count_shows_is_blamed_on_the_next_task_and_never_missed():
    config, stream = config_of("s_lora"), digits(2)
    learner, check = built(config, stream), WriteCheck()
    check.before(learner)
    learn(learner, config, stream.tasks[:1])
    check.after(learner, 0)
    trunk = next(learner.backbone.parameters())
    trunk.detach().numpy()[...] += 1
    check.before(learner)
    learn(learner, config, stream.tasks[1:])
    assert [write.name.split(".")[0] for write in check.after(learner, 1)] == ["backbone"]
