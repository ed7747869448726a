"""What a drop leaves where tasks were not learnt apart: declared, found in the bytes, and never called exact."""

import pytest
import torch
from paired import names_that_differ, quick, trained, without
from tiny import built, config_of, digits, learn

import cl_platform.strategies  # noqa: F401
from cl_platform import registry
from cl_platform.strategies.base import LEAKS
from cl_platform.unlearning.lineage import full_names, holders, remaining_leaks

NAMES = registry.strategies.names()
LEAKY = [name for name in NAMES if registry.strategies.get(name).leaks]

TABLE = {
    "finetune": "L-01 L-05 L-07",
    "joint": "L-01",
    "linear_probe": "L-01 L-04",
    "nmc": "",
    "l2p": "L-01 L-13",
    "dual_prompt": "L-01 L-02",
    "coda_prompt": "L-02 L-03",
    "s_prompt": "",
    "er": "L-01 L-05 L-10",
    "er_ace": "L-01 L-05 L-10",
    "mir": "L-01 L-05 L-10",
    "der": "L-01 L-10 L-11",
    "derpp": "L-01 L-10 L-11",
    "agem": "L-01 L-10",
    "gem": "L-01",
    "icarl": "L-01 L-04 L-10 L-14",
    "gdumb": "L-10",
    "bfp": "L-01 L-14",
    "fpf": "L-01 L-15",
    "k_fpf": "L-01 L-10 L-15",
    "lora": "L-01",
    "s_lora": "",
    "l2p_lora": "L-01 L-13",
    "olora": "L-03 L-04",
    "inflora": "L-02 L-03 L-12",
    "online_lora": "L-01 L-03 L-12 L-15",
    "ewc": "L-01 L-12",
    "si": "L-01 L-12",
    "l2": "L-01 L-04 L-14",
    "lwf": "L-01 L-04 L-14",
    "feature_distillation": "L-01 L-04 L-14",
    "slda": "",
    "ranpac": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_declared_leaks_are_channels_of_the_list_and_what_is_known_of_each_strategy(name):
    cls = registry.strategies.get(name)
    assert cls.leaks <= set(LEAKS)
    if name in TABLE:
        assert cls.leaks == frozenset(TABLE[name].split())


@pytest.mark.parametrize("name", LEAKY)
def test_a_drop_that_cannot_be_exact_says_what_still_holds_the_task_and_through_what(name):
    config, stream = quick(name), digits(3)
    learner = trained(config, stream)
    predicted = remaining_leaks(learner, 1)
    learner.drop_task(1)
    held = [component for component in holders(learner, 1) if component.kind not in ("lineage", "bookkeeping")]
    assert held
    assert remaining_leaks(learner, 1) == predicted != ()
    assert 1 not in learner.learnt
    assert not set(stream.tasks[1].classes) & set(learner.seen_classes())
    reference = trained(config, without(stream, 1))
    names = {key for component in held for key in full_names(component)}
    assert names & names_that_differ(learner, reference)  # the leak is there, not only declared
    learner.drop_task(2)  # and what is left goes on
    assert learner.seen_classes() == sorted(stream.tasks[0].classes)


def test_leaks_follow_the_configuration():
    def of(name, **keys):
        return built(config_of(name, strategy=keys), digits(3)).composition.leaks

    assert of("linear_probe", loss="task") == frozenset()
    assert of("linear_probe", loss="task", mode="joint") == {"L-01", "L-04"}
    assert of("dual_prompt", isolated=True) == frozenset()
    assert of("dual_prompt", copy_previous=False) == {"L-01"}
    assert of("slda", update="streaming") == {"L-12"}
    assert of("lora", mode="merge") == {"L-01", "L-03"}
    assert of("gdumb", buffer={"policy": "ring"}) == frozenset()
    assert of("agem") == {"L-01"}  # its ring holds each task's rows apart
    assert of("agem", buffer={"policy": "reservoir"}) == {"L-01", "L-10"}
    assert of("k_fpf") == {"L-01", "L-10"}
    assert of("k_fpf", modules="auto") == {"L-01", "L-10", "L-15"}


def test_a_composition_has_the_leaks_of_all_members():
    alone = built(config_of("bfp"), digits(2))
    assert alone.composition.leaks == {"L-01", "L-14"}
    beside = built(config_of("fpf"), digits(2))
    assert beside.composition.leaks == {"L-01", "L-05", "L-10"}


def test_the_last_task_of_added_prompts_is_dropped_without_a_trace():
    config, stream = config_of("coda_prompt"), digits(3)
    learner = trained(config, stream)
    learner.drop_task(2)
    assert not holders(learner, 2)
    assert remaining_leaks(learner, 2) == ()
    assert not names_that_differ(learner, trained(config, without(stream, 2)))


def test_a_teacher_keeps_no_rows_of_a_dropped_task_and_is_gone_where_it_was_taken_at_its_end():
    config, stream = config_of("lwf"), digits(3)
    learner = trained(config, stream)
    learner.drop_task(1)
    teacher = learner.composition.teacher
    assert not any(".tasks.1." in name for name, _ in teacher.copy.items())
    assert teacher.classes == sorted([*stream.tasks[0].classes, *stream.tasks[2].classes])
    learner.drop_task(2)
    assert not teacher.ready
    learn(learner, config, digits(4).tasks[3:])
    assert teacher.ready


def test_hard_examples_and_head_rows_of_a_dropped_task_are_gone_from_a_mixture():
    config, stream = config_of("online_lora"), digits(2)
    learner = trained(config, stream)
    strategy = learner.composition.members["online_lora"]
    own, first = list(stream.tasks[1].classes), built(config, stream).composition.members["online_lora"]
    assert len(strategy.hard_labels)
    learner.drop_task(1)
    assert len(strategy.hard_labels) == len(strategy.hard_images) == 0
    assert learner.seen_classes() == sorted(stream.tasks[0].classes)
    rows, drawn = (s.head.blocks.get(-1, "weight")[own] for s in (strategy, first))
    assert torch.equal(rows, drawn)
    learn(learner, config, digits(3).tasks[2:])


def test_means_of_dropped_classes_are_gone_from_running_statistics():
    config, stream = config_of("slda", strategy={"update": "streaming"}), digits(3)
    learner = trained(config, stream)
    learner.drop_task(1)
    assert learner.seen_classes() == sorted([*stream.tasks[0].classes, *stream.tasks[2].classes])
    assert {c.name.rpartition(".")[2] for c in holders(learner, 1)} >= {"covariance", "mean", "count"}
