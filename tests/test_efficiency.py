"""Sizes and FLOPs: known figures, and that counting leaves no trace in what is counted."""

import dataclasses
import json
import logging
import threading

import lightning as L
import pytest
import timm
import torch
from fingerprints import differing_kinds, fingerprint
from hypothesis import given
from hypothesis import strategies as st
from tiny import begun, built, config_of, copy_of, differing, digits, learn, learnt, only, tiny_vit
from torch import nn

import cl_platform.strategies  # noqa: F401  registers the strategies
from cl_platform import efficiency, registry
from cl_platform.backbones import BackboneConfig, PromptedViT, build_backbone
from cl_platform.metrics.efficiency import EFFICIENCY_DEFINITIONS, model_size_efficiency, storage_efficiency
from cl_platform.metrics.matrix import Result, Undefined
from cl_platform.scenarios import TaskLoader
from cl_platform.strategies import Component

NAMES = registry.strategies.names()
GRADIENT = [name for name in NAMES if registry.strategies.get(name).needs.gradient]
CPU = torch.device("cpu")
COUNTS_FLOPS = True


def batch_of(task, size=8):
    return next(iter(TaskLoader(task.train, task.task_id, size, 0)))


def flops(function):
    with efficiency.flop_counter(CPU) as counter:
        function()
    return counter.get_total_flops()


# -- figures ----------------------------------------------------------------------------------------------------------


def test_a_linear_layer_costs_two_per_weight_and_image_and_as_much_again_for_each_gradient():
    layer, rows = nn.Linear(64, 10), torch.randn(8, 64)
    assert flops(lambda: layer(rows)) == 10_240
    with torch.inference_mode():  # here it arrives whole, and has no formula
        assert flops(lambda: layer(rows)) == 10_240
    assert flops(lambda: layer(rows).sum().backward()) == 20_480
    assert flops(lambda: layer(rows.clone().requires_grad_()).sum().backward()) == 30_720


def small_vit(classes):
    return timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3,
        num_classes=classes,
    )  # fmt: skip


def test_attention_counts_on_the_cpu_as_well():
    model = small_vit(10).eval()
    with torch.no_grad():
        assert flops(lambda: model(torch.zeros(1, 3, 32, 32))) == 365_699_328
        assert flops(lambda: model(torch.zeros(2, 3, 32, 32))) == 2 * 365_699_328
    assert efficiency.numbers_in(model.parameters()) == 2_693_578


def test_a_learner_has_the_figures_of_the_network_it_is_made_of():
    stream = digits(5)
    learner = built(config_of("joint"), stream, backbone=PromptedViT(small_vit(0).eval(), 32))
    (phase,) = learner.composition.arrange(stream.tasks)
    learner.begin_task(phase.task, 1)
    images = phase.task.test.images(slice(0, 3))
    assert len(learner.seen_classes()) == 10
    assert efficiency.flops_eval_image(learner, images) == 365_699_328
    counts = efficiency.parameter_counts(learner)
    assert counts["params_total"] == counts["params_trainable"] == 2_693_578
    records = sum(tensor.nbytes for tensor in learner.owners.state_dict().values())
    assert 0 < records < 1000
    assert efficiency.memory_bytes(learner)["model_bytes"] == 4 * 2_693_578 + 10 * 8 + records  # and the class ids


def test_a_buffer_of_two_hundred_images_with_labels_and_logits():
    buffer = [torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64), torch.zeros(200, 10)]
    assert efficiency.bytes_in(buffer) == 624_000


def test_memory_that_tensors_share_counts_once():
    whole = torch.zeros(4, 6)
    assert efficiency.bytes_in([whole, whole, whole.T, whole[1:3], whole.view(-1)[:5]]) == 96
    assert efficiency.bytes_in([whole.view(-1)[:6], whole.view(-1)[3:9]]) == 36
    assert efficiency.bytes_in([torch.zeros(1).expand(1000)]) == 4
    assert efficiency.bytes_in([torch.zeros(0), torch.zeros(3, 0)]) == efficiency.bytes_in([]) == 0
    tied = nn.Linear(6, 4)
    other = nn.Linear(6, 4)
    other.weight = tied.weight
    assert efficiency.numbers_in([*tied.parameters(), *other.parameters()]) == 24 + 4 + 4


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=8))
def test_bytes_are_those_of_the_union(spans):
    whole = torch.zeros(60, dtype=torch.int16)
    touched = {place for start, length in spans for place in range(start, start + length)}
    parts = [whole[start : start + length] for start, length in spans]
    assert efficiency.bytes_in(parts) == 2 * len(touched)
    assert efficiency.numbers_in(parts) == len(touched)


# -- what tasks cost --------------------------------------------------------------------------------------------------


def steps(name, batch=8, **groups):
    learner = begun(config_of(name, **groups), digits())
    return efficiency.flops_train_step(learner, batch_of(digits().tasks[0], batch))


def test_a_frozen_trunk_makes_a_step_cheaper():
    everything = steps("finetune")
    last_block = steps("finetune", strategy={"trainable": ["blocks.2.*"]})
    assert steps("linear_probe") < last_block < everything
    learner = begun(config_of("finetune"), digits())
    image = efficiency.flops_eval_image(learner, digits().tasks[0].test.images(slice(0, 1)))
    assert 2.8 * 8 * image < everything < 3 * 8 * image  # the gradient of the pixels is not needed
    assert 8 * image < last_block < 2 * 8 * image


def test_a_step_costs_in_proportion_to_its_images():
    assert steps("finetune", 16) == 2 * steps("finetune", 8) == 4 * steps("finetune", 4)


def test_prompts_cost_a_query_pass_and_longer_sequences_in_every_answer():
    image = digits().tasks[0].test.images(slice(0, 1))
    plain, prompted = (
        efficiency.flops_eval_image(begun(config_of(n), digits()), image) for n in ("nmc", "coda_prompt")
    )
    assert prompted > 2 * plain


def test_a_head_that_grows_makes_answers_dearer():
    image = digits().tasks[0].test.images(slice(0, 1))
    first, second = (efficiency.flops_eval_image(begun(config_of("finetune"), digits(), k), image) for k in (0, 1))
    assert second - first == 2 * 32 * 2


def test_precision_changes_no_count():
    config = config_of("finetune", trainer={"precision": "bf16-mixed"})
    learner = begun(config, digits())
    assert efficiency.flops_train_step(learner, batch_of(digits().tasks[0])) == steps("finetune")


def test_compiled_blocks_are_counted_uncompiled_and_stay_compiled():
    backbone = tiny_vit()
    backbone.compile_blocks(backend="eager")
    learner = begun(config_of("finetune"), digits(), backbone=backbone)
    compiled = [block._compiled_call_impl for block in backbone.vit.blocks]
    assert all(compiled)
    assert efficiency.task_flops(learner)["flops_train_step"] == steps("finetune")
    assert compiled == [block._compiled_call_impl for block in backbone.vit.blocks]


def test_a_learner_that_cannot_be_copied_goes_uncounted_and_is_no_error(caplog, monkeypatch):
    learner = begun(config_of("finetune"), digits())
    only(learner).lock = threading.Lock()
    monkeypatch.setattr(logging.getLogger("cl_platform"), "propagate", True)  # the command turns it off
    record = efficiency.task_flops(learner)
    assert record == {"task_id": 0, "flops_eval_image": None, "flops_train_step": None, "reason": "not_countable"}
    assert "FLOPs not counted" in caplog.text


# -- no trace ---------------------------------------------------------------------------------------------------------


def trace(learner):
    cache = learner.cache
    kept = [(key, id(tensor), tensor.clone()) for key, entry in cache._kept.items() for tensor in entry]
    numbers = (cache.images_forwarded, cache.evictions, cache.bytes, cache._digest, learner.epochs, len(learner.terms))
    return fingerprint(learner), [(key, where, tensor.tolist()) for key, where, tensor in kept], numbers


def places(learner):
    """Where tensors lie; counters that a state dict makes on demand lie nowhere."""
    return {n: t.data_ptr() for n, t in (*learner.named_parameters(), *learner.named_buffers())}


def assert_no_trace(learner, count=efficiency.task_flops):
    """What ``count`` finds, which must leave everything as it was."""
    before = trace(learner)
    memory = places(learner)
    state, last, trainer = copy_of(learner.state_dict()), learner._last_step, learner.trainer
    found = count(learner)
    after = trace(learner)
    assert differing_kinds(before[0], after[0]) == set()
    assert before[1:] == after[1:]
    assert not differing(state, learner.state_dict())
    assert memory == places(learner)
    assert learner._last_step is last
    assert learner.trainer is trainer
    assert torch.is_grad_enabled()
    return found


def counted_in_all_ways(learner):
    """The record of a task, which is what the parts give."""
    task, record = learner.task, efficiency.task_flops(learner)
    assert json.loads(json.dumps(record)) == record
    assert record["task_id"] == task.task_id
    assert record["flops_eval_image"] > 0
    assert efficiency.flops_train_step(learner, batch_of(task)) == record["flops_train_step"]
    assert efficiency.flops_eval_image(learner, task.test.images(slice(0, 2))) > 0
    return record


class InTheMiddle(L.Callback):
    """Counts where gradients wait for the optimizer; once."""

    record = None

    def on_after_backward(self, trainer, learner):
        if self.record is None:
            assert any(p.grad is not None for p in learner.parameters())
            self.record = assert_no_trace(learner)


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_is_counted_without_a_trace_and_without_changing_a_byte_of_what_is_learnt(name):
    config, counted = config_of(name), built(config_of(name), digits())
    *earlier, last = counted.composition.arrange(digits().tasks)
    real, records, middle = counted.begin_task, [], InTheMiddle()

    def begin_task(task, *rest):
        real(task, *rest)
        counted.train()
        way = counted_in_all_ways if task is last.task else efficiency.task_flops
        records.append(assert_no_trace(counted, way))

    counted.begin_task = begin_task
    learn(counted, config, earlier)
    learn(counted, config, [last], middle)
    assert not differing(counted.state_dict(), learnt(config, digits()).state_dict())
    assert len(records) == 1 + len(earlier)
    if name in GRADIENT:
        assert records[-1] == middle.record
        assert records[-1]["flops_train_step"] > 0
        assert "reason" not in records[-1]
    else:
        assert records[-1]["flops_train_step"] is None
        assert records[-1]["reason"] == "closed_form"


@pytest.mark.parametrize("backbone", ["dropout", "batch norm"])
def test_counting_draws_nothing_and_moves_no_statistics(backbone):
    network = (
        tiny_vit(proj_drop_rate=0.2) if backbone == "dropout" else build_backbone(BackboneConfig(kind="resnet18_slim"))
    )
    learner = begun(config_of("finetune"), digits(), 0, network)
    learner.train()
    assert_no_trace(learner, counted_in_all_ways)


def test_the_copy_is_of_its_own_and_shares_no_weight_that_is_trained():
    learner = begun(config_of("finetune"), digits(), 1)
    twin = efficiency._twin(learner)
    assert twin.context.backbone is twin.backbone is not learner.backbone
    assert only(twin).context is twin.context
    assert twin.cache._backbone is twin.backbone
    assert twin.context.autocast.__self__ is twin
    assert twin.task is learner.task  # images are not copied
    assert twin.trainer is not learner.trainer
    places = {p.data_ptr() for p in learner.parameters()}
    assert not places & {p.data_ptr() for p in twin.parameters()}
    frozen = begun(config_of("linear_probe"), digits(), 1)
    copied = [
        a.data_ptr() != b.data_ptr()
        for a, b in zip(efficiency._twin(frozen).parameters(), frozen.parameters(), strict=True)
    ]
    assert copied == [p.requires_grad or not n.startswith("backbone.") for n, p in frozen.named_parameters()]


# -- parameters and bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_bytes_add_up_for_every_strategy(name):
    learner = begun(config_of(name), digits(), 1)
    counts, memory = efficiency.parameter_counts(learner), efficiency.memory_bytes(learner)
    assert counts["params_total"] == sum(p.numel() for p in learner.parameters())
    assert counts["params_trainable"] == learner.trainable_parameters()
    assert set(counts["params_per_task"]) == {0, 1}
    assert sum(counts["params_per_task"].values()) <= counts["params_total"]
    assert counts["params_per_task"][1] >= 2 * 32 + 2  # its rows of the head
    state = learner.state_dict().values()  # with the counters of a replay buffer
    parts = memory["strategy_state_bytes"]
    whole = memory["model_bytes"] + memory["buffer_bytes"] + sum(parts.values())
    assert whole == sum(t.element_size() * t.numel() for t in state)
    assert memory["cache_bytes"] == learner.cache.bytes


def test_prompt_parts_belong_to_the_task_that_brought_them():
    learner = begun(config_of("coda_prompt"), digits(3), 1)
    counts = efficiency.parameter_counts(learner)
    assert counts["params_per_task"] == {0: counts["params_trainable"], 1: counts["params_trainable"]}
    assert set(efficiency.memory_bytes(learner)["strategy_state_bytes"]) == {
        "coda_prompt.bank.tasks.0",
        "coda_prompt.bank.tasks.1",
    }


def test_buffers_and_what_no_component_names_are_told_apart(monkeypatch):
    learner = begun(config_of("finetune"), digits())
    strategy = only(learner)
    strategy.register_buffer("images", torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    strategy.register_buffer("labels", torch.zeros(5, dtype=torch.int64))
    strategy.register_buffer("teacher", torch.zeros(7))
    strategy.register_buffer("forgotten", torch.zeros(3))
    parts = [
        Component("memory", (0,), "buffer", {"images": strategy.images, "labels": strategy.labels}),
        Component("teacher", (0,), "teacher", {"teacher": strategy.teacher, "again": strategy.images}),
    ]
    monkeypatch.setattr(strategy, "components", lambda: iter(parts))
    memory = efficiency.memory_bytes(learner)
    assert memory["buffer_bytes"] == 5 * (192 + 8)
    assert memory["strategy_state_bytes"] == {"finetune.teacher": 28, "undeclared": 12}
    assert efficiency.parameter_counts(learner)["params_per_task"] == {0: 66}  # a buffer is no parameter


def test_the_summary_of_a_run_is_json_with_both_ratios():
    config, stream, records = config_of("coda_prompt"), digits(), []
    learner = built(config, stream)
    for task in stream.tasks:
        learn(learner, config, [task])
        records.append({"task_id": task.task_id, **efficiency.task_sizes(learner)})
    found = json.loads(json.dumps(efficiency.summary(learner, records, stream.tasks)))
    first, last = (record["params_total"] for record in records)
    assert found["model_size_efficiency"] == pytest.approx((1 + first / last) / 2)
    assert found["storage_efficiency"] == 1.0
    assert found["tasks"] == records
    known = {definition.key for definition in EFFICIENCY_DEFINITIONS}
    assert set(found) - {"tasks"} <= known
    assert set(records[0]) - {"task_id"} <= known


def test_the_training_data_are_images_and_labels():
    task = digits().tasks[0]
    assert efficiency.training_bytes([task]) == 16 * (3 * 8 * 8 + 8)
    shorter = dataclasses.replace(task, train=task.train.select(torch.arange(3)))
    assert efficiency.training_bytes([shorter, task]) == 19 * efficiency.training_bytes([task]) // 16


# -- ratios -----------------------------------------------------------------------------------------------------------


def test_known_ratios():
    assert model_size_efficiency([100, 200, 400]) == Result((1 + 0.5 + 0.25) / 3)
    assert model_size_efficiency([100, 50]) == Result(1.0)
    assert storage_efficiency([0, 500, 1000], 1000) == Result(0.5)
    assert storage_efficiency([5000], 1000) == Result(0.0)
    assert model_size_efficiency([]) == storage_efficiency([], 5) == storage_efficiency([1], 0) == Undefined("empty")
    for wrong in ([0], [5, -1]):
        with pytest.raises(ValueError):
            model_size_efficiency(wrong)
    with pytest.raises(ValueError):
        storage_efficiency([-1], 5)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=9), st.integers(1, 10**12), st.integers(1, 9))
def test_ratios_stay_within_their_range_and_know_no_unit(sizes, data, unit):
    model, storage = model_size_efficiency(sizes), storage_efficiency(sizes, data)
    assert 0 < model.value <= 1
    assert 0 <= storage.value <= 1
    assert model_size_efficiency([unit * size for size in sizes]) == model
    assert storage_efficiency([unit * size for size in sizes], unit * data) == storage
    assert model_size_efficiency(sizes[:1] * 3) == Result(1.0)


def test_definitions_are_unique_and_numbered():
    keys = [definition.key for definition in EFFICIENCY_DEFINITIONS]
    assert len(set(keys)) == len(keys)
    ids = [definition.id for definition in EFFICIENCY_DEFINITIONS]
    assert ids == sorted(ids)
    assert set(ids) == {f"6.{n}" for n in range(1, 10)}
