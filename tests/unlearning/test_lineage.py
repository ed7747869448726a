"""Owner records: complete, named as the state is, true about every write, and still there after a drop."""

import functools

import pytest
import torch
from paired import quick, trained
from tiny import built, config_of, digits, learn

import cl_platform.strategies  # noqa: F401
from cl_platform import registry
from cl_platform.unlearning.lineage import (
    WriteCheck,
    components,
    full_names,
    is_bookkeeping,
    learnt_state,
    undeclared,
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


@pytest.mark.parametrize("name", NAMES)
def test_whatever_changes_while_a_task_is_learnt_lists_the_task(name):
    assert not [str(write) for write in watched(name)[1]]


@pytest.mark.parametrize("name", NAMES)
def test_every_learnt_tensor_is_in_one_component_under_its_own_key(name):
    learner, _ = watched(name)
    assert not undeclared(learner)
    state = dict(learner.state_dict()) | dict(learner.named_buffers())
    seen = []
    for component in components(learner):
        assert component.tasks == tuple(sorted(set(component.tasks)))
        for key, tensor in full_names(component).items():
            assert torch.equal(tensor, state[key]) or not tensor.isfinite().all(), key
            seen.append(key)
    assert len(seen) == len(set(seen))
    assert set(learnt_state(learner)) == {key for key in seen if not is_bookkeeping(key)}


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
