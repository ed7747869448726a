"""Each way to break the isolation of tasks is found: by the bytes, by the write check, or by the paired run."""

import numpy as np
import pytest
import tiny
import torch
from paired import built_with, compared, forgot, names_that_differ, pair, trained, without
from tiny import config_of, digits, learn, tiny_vit
from wrong_strategies import (
    CountsTasks,
    DecayedRows,
    GlobalOrder,
    KeptMoments,
    LocalHeads,
    OneProduct,
    PooledRouter,
    RunningSums,
    TrunkInTrainMode,
    WritesElsewhere,
    bn_trunk,
)

from cl_platform.strategies.nmc import NMC
from cl_platform.strategies.s_lora import SLoRA
from cl_platform.strategies.s_prompt import SPrompt
from cl_platform.unlearning.lineage import WriteCheck, holders, remaining_leaks

ADAMW = {"optimizer": {"name": "adamw", "lr": 0.01}}


def both(config, stream, gone=1):
    return forgot(config, stream, gone), trained(config, without(stream, gone))


def wide_vit():
    return tiny_vit(embed_dim=384, depth=1, num_heads=2)


# -- the right ones pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", [tiny_vit, bn_trunk, wide_vit])
def test_local_heads_on_a_frozen_trunk_are_exact(trunk):
    one, other = pair(LocalHeads, config_of("finetune", **ADAMW), trunk)
    assert compared(one, other).equal, compared(one, other).differences
    assert not holders(one, 1)


@pytest.mark.parametrize("cls, name", [(SLoRA, "s_lora"), (SPrompt, "s_prompt"), (NMC, "nmc")])
def test_the_strategies_that_the_wrong_ones_start_from_are_exact(cls, name):
    one, other = pair(cls, config_of(name))
    assert compared(one, other).equal
    assert len(one.state_dict()) > 3


# -- the wrong ones are found -----------------------------------------------------------------------------------------


def test_rows_of_the_head_alone_do_not_make_plain_training_forget():
    one, other = both(config_of("finetune"), digits(3))
    assert names_that_differ(one, other, ["backbone."])
    assert {component.name for component in holders(one, 1)} >= {"backbone", "head.blocks.tasks.0"}
    assert remaining_leaks(one, 1) == ("L-01", "L-05", "L-07")


def test_later_prompts_and_rows_still_show_a_dropped_task_of_added_prompts():
    one, other = both(config_of("coda_prompt"), digits(4))
    differing = names_that_differ(one, other)
    for later in (2, 3):
        assert {n for n in differing if f"bank.tasks.{later}." in n}
        assert {n for n in differing if n.startswith(f"head.blocks.tasks.{later}.")}
    assert not {n for n in differing if ".tasks.0." in n and not n.startswith("owners.")}


def test_an_optimizer_that_outlives_its_task_shows_in_later_adapters():
    differing = names_that_differ(*pair(KeptMoments, config_of("s_lora")))
    assert {n.split(".tasks.")[1].split(".")[0] for n in differing} == {"2", "3"}


def test_an_order_of_images_from_one_generator_shows_in_later_adapters(monkeypatch):
    monkeypatch.setattr(tiny, "TaskLoader", GlobalOrder)
    config, stream, learners = config_of("s_lora"), digits(4), []
    for tasks, gone in ((stream, 1), (without(stream, 1), None)):
        GlobalOrder.generator.manual_seed(0)
        learners.append(trained(config, tasks))
        if gone is not None:
            learners[-1].drop_task(gone)
    differing = names_that_differ(*learners)
    assert {n.split(".tasks.")[1].split(".")[0] for n in differing} == {"2", "3"}
    assert not {n for n in differing if ".router." in n}


def test_a_trunk_in_train_mode_shows_in_its_statistics_alone():
    one, other = pair(TrunkInTrainMode, config_of("finetune", **ADAMW), bn_trunk)
    assert names_that_differ(one, other) == {
        f"backbone.model.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    check = WriteCheck()
    check.before(other)
    learn(other, config_of("finetune", **ADAMW), digits(5).tasks[4:])
    assert "backbone.model.1.running_mean" in {write.name for write in check.after(other, 4)}


def test_a_subtraction_from_running_sums_leaves_the_last_bits():
    stream = digits(4, "domain")
    one, other = pair(RunningSums, config_of("nmc"), stream=stream)
    assert names_that_differ(one, other) == {"composition.members.nmc.total"}
    ours, theirs = (learner.composition.members["nmc"].total for learner in (one, other))
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    assert compared(*pair(NMC, config_of("nmc"), stream=stream)).equal  # on the grid


def test_centroids_of_pooled_features_show_in_the_router():
    differing = names_that_differ(*pair(PooledRouter, config_of("s_prompt")))
    assert differing == {f"composition.members.s_prompt.router.tasks.{t}.centroids" for t in (2, 3)}


def test_one_product_over_all_rows_shows_by_rounding():
    one, other = pair(OneProduct, config_of("finetune", **ADAMW), wide_vit)
    differing = names_that_differ(one, other)
    assert differing
    assert all(n.startswith("head.blocks.tasks.") for n in differing)
    for name in differing:
        ours, theirs = one.state_dict()[name], other.state_dict()[name]
        assert torch.allclose(ours, theirs, atol=1e-2)


def test_weight_decay_on_idle_rows_shows_in_other_tasks_rows():
    one, other = pair(DecayedRows, config_of("finetune", **ADAMW))
    assert names_that_differ(one, other, ["head.blocks.tasks.0."])
    assert "head.blocks.tasks.0" in {component.name for component in holders(one, 1)}


@pytest.mark.parametrize("name, policy", [("er", "class_balanced"), ("er", "reservoir"), ("gdumb", "greedy")])
def test_shares_of_a_buffer_by_what_was_seen_show_in_other_tasks_rows(name, policy):
    keys = {"buffer": {"policy": policy, "size": 24}, **({"passes": 0} if name == "gdumb" else {})}
    learners = both(config_of(name, strategy=keys), digits(4))
    held = [learner.composition.members[name].buffer.contents for learner in learners]
    rows = [set(zip(c.task_ids.tolist(), c.example_ids.tolist(), strict=True)) for c in held]
    assert {t for t, _ in rows[0]} == {t for t, _ in rows[1]} == {0, 2, 3}
    assert rows[0] != rows[1]
    assert any(component.kind == "buffer" for component in holders(learners[0], 1))


def test_logits_that_a_learner_stored_which_knew_the_task_show():
    keys = {"buffer": {"policy": "ring", "size": 40}}
    one, other = both(config_of("der", strategy=keys), digits(4))
    buffers = [learner.composition.members["der"].buffer for learner in (one, other)]
    for column in ("labels", "task_ids", "example_ids"):
        assert np.array_equal(getattr(buffers[0].contents, column), getattr(buffers[1].contents, column))
    own = torch.from_numpy(buffers[0].contents.task_ids == 2)
    first, second = (buffer.logits[: len(own)][own] for buffer in buffers)
    assert len(first)
    assert not torch.equal(first[:, 2:4], second[:, 2:4])  # of their own classes
    assert any(component.name.endswith(".buffer") for component in holders(one, 1))


def test_a_ring_holds_what_it_would_hold_without_the_task():
    one, other = both(config_of("gem"), digits(4))
    assert not names_that_differ(one, other, ["composition.members.gem.buffer"])
    assert not [component for component in holders(one, 1) if component.kind == "buffer"]


def test_a_tensor_that_no_component_declares_is_named_by_the_write_check():
    config, stream = config_of("finetune", **ADAMW), digits(2)
    learner, check = built_with(WritesElsewhere, config, stream), WriteCheck()
    check.before(learner)
    learn(learner, config, stream.tasks[:1])
    (write,) = check.after(learner, 0)
    assert write.name == "composition.members.local_heads.average"
    assert str(write) == f"{write.name} changed while task 0 was learnt, and no component declares it"


def test_a_declaration_that_lacks_the_task_is_named_by_the_write_check():
    config, stream = config_of("finetune"), digits(2)
    learner, check = trained(config, stream), WriteCheck()
    check.before(learner)
    with torch.no_grad():
        learner.head.blocks.get(0, "bias").add_(1.0)
    (write,) = check.after(learner, 7)
    assert (write.name, write.owners) == ("head.blocks.tasks.0.bias", (0, 1))
    with pytest.raises(ValueError, match="before"):
        check.after(learner, 7)


def test_a_claim_of_isolation_by_a_strategy_that_counts_tasks_is_refuted_by_the_paired_run():
    one, other = pair(CountsTasks, config_of("finetune", **ADAMW, trainer={"gradient_clip_val": None}))
    assert not holders(one, 1)
    assert remaining_leaks(one, 1) == ()  # what it claims
    assert not compared(one, other).equal


def test_another_seed_gives_other_bytes():
    config, stream = config_of("s_lora"), digits(2)
    one, other = tiny.learnt(config, stream), tiny.learnt(config, stream, seed=1)
    assert not compared(one, other).equal
