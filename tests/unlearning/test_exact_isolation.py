"""What is dropped exactly: every byte equals that of a learner whose stream never had the task."""

import functools

import pytest
import torch
from paired import CASES, IDS, compared, forgot, forgot_between, trained, without
from tiny import answers, config_of, digits, images_of

import cl_platform.strategies  # noqa: F401
from cl_platform.unlearning.lineage import holders, remaining_leaks

ROUTED = [("nmc", {}), ("slda", {}), ("ranpac", {}), ("s_prompt", {}), ("s_lora", {"router": "kmeans"})]


def never(config, stream, *gone):
    return trained(config, without(stream, *gone))


@functools.cache
def reference_of(case):
    """A learner that never saw task 1 of four; not to be changed."""
    name, keys = CASES[case]
    return never(config_of(name, strategy=keys), digits(4), 1)


@pytest.mark.parametrize("name, keys", CASES, ids=IDS)
def test_a_dropped_task_leaves_the_bytes_of_a_learner_that_never_saw_it(name, keys):
    config, stream = config_of(name, strategy=keys), digits(4)
    reference = reference_of(CASES.index((name, keys)))
    dropped = forgot(config, stream)
    comparison = compared(dropped, reference)
    assert comparison.equal, comparison.differences
    assert comparison.bytes > 10_000
    assert not holders(dropped, 1)
    assert remaining_leaks(dropped, 1) == ()
    assert dropped.learnt == reference.learnt == [0, 2, 3]
    assert dropped.seen_classes() == reference.seen_classes()
    images = images_of(stream)
    assert torch.equal(answers(dropped, images), answers(reference, images))


@pytest.mark.parametrize("name, keys", CASES, ids=IDS)
def test_what_is_learnt_after_a_task_was_dropped_has_the_bytes_of_a_learner_that_never_saw_it(name, keys):
    config = config_of(name, strategy=keys)
    comparison = compared(forgot_between(config, digits(4)), reference_of(CASES.index((name, keys))))
    assert comparison.equal, comparison.differences


@pytest.mark.parametrize("name", ["s_lora", "s_prompt", "linear_probe"])
def test_the_first_and_the_last_task_are_dropped_as_well(name):
    config, stream = config_of(name, strategy={"loss": "task"} if name == "linear_probe" else {}), digits(3)
    dropped = forgot(config, stream, 0)
    assert compared(dropped, never(config, stream, 0)).equal
    dropped.drop_task(2)
    assert compared(dropped, never(config, stream, 0, 2)).equal
    dropped.drop_task(1)
    assert not dropped.seen_classes()
    assert dropped.learnt == []


@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("name, keys", ROUTED, ids=[name for name, _ in ROUTED])
def test_tasks_that_share_their_classes_are_dropped_exactly(name, keys, gone):
    config, stream = config_of(name, strategy=keys), digits(3, "domain")
    dropped = forgot(config, stream, gone)
    comparison = compared(dropped, never(config, stream, gone))
    assert comparison.equal, comparison.differences
    assert dropped.seen_classes() == list(range(len(stream.tasks[0].classes)))


def test_a_head_block_whose_classes_others_learn_stays_and_lists_the_dropped_task():
    config, stream = config_of("linear_probe", strategy={"loss": "task"}), digits(3, "domain")
    learner = trained(config, stream)
    assert remaining_leaks(learner, 0) == ("L-01",)
    learner.drop_task(0)
    held = {component.name for component in holders(learner, 0)}
    assert "head.blocks.tasks.0" in held
    assert remaining_leaks(learner, 0) == ("L-01",)
    assert learner.seen_classes() == [0, 1]


def test_the_first_task_of_isolated_prompts_stays_in_the_prompt_that_all_share():
    config, stream = config_of("dual_prompt", strategy={"isolated": True}), digits(3)
    learner = forgot(config, stream, 0)
    assert any(component.name.endswith("g_prompt") for component in holders(learner, 0))
    learner.drop_task(1)
    assert not holders(learner, 1)
