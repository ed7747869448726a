"""Sequential LoRA is itself because one low-rank pair a layer is trained on and on while the trunk's bytes stay."""

import pytest
import torch

from cl_platform.backbones.lora import Merge
from cl_platform.random_streams import stream

KEYS = {"rank": 4, "alpha": 8.0}


@pytest.fixture
def bench_of(learner_of):
    return lambda **keys: learner_of({"lora": {**KEYS, **keys}})


def factors(bench):
    return {name: tensor.detach().clone() for name, tensor in bench.strategy.factors.items()}


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_what_every_adapter_strategy_promises(adapter_promise, learner_of, mode):
    adapter_promise(learner_of, "lora", {**KEYS, "mode": mode}, None)


def test_before_training_the_features_are_the_plain_trunks_bit_for_bit(bench_of):
    bench = bench_of(targets=["q", "k", "v", "proj", "fc1", "fc2"])
    for started in (bench, bench.begin(0)):
        with started.learner.answering():
            batch = bench.batch()
            assert torch.equal(bench.strategy(batch), bench.vit(batch.images))


def test_the_pair_starts_from_the_first_tasks_stream_and_is_trained_on_in_the_next(bench_of):
    bench = bench_of().begin(0)
    first = factors(bench)
    drawn = torch.rand(4, 32, generator=stream(0, 0, "lora/2/v"))
    assert torch.equal(first["A_v"][2], (2 * drawn - 1) / 32**0.5)
    assert not first["B_q"].any()
    after = factors(bench.learn(0))
    assert all((after[name] != first[name]).any() for name in first)
    again = factors(bench.begin(1))
    assert all(torch.equal(after[name], again[name]) for name in after)
    later = factors(bench.learn(1))
    assert all((later[name] != after[name]).any() for name in after)


def test_the_pair_counts_alpha_over_rank_or_over_its_root(bench_of):
    assert bench_of().strategy.layout.scale == 2.0
    assert bench_of(rslora=True).strategy.layout.scale == 4.0


def test_only_the_pair_and_the_tasks_own_head_rows_are_trained(bench_of):
    bench = bench_of().learn(0).begin(1)
    step, terms = bench.step()
    sum(terms.values()).backward()
    blocks = bench.learner.head.blocks
    assert all(p.grad is None or not p.grad.any() for p in blocks.parameters_of(0).values())
    assert all(p.grad.any() for p in blocks.parameters_of(1).values())
    assert all(p.grad.any() for p in bench.strategy.factors.values())
    trained = 4 * 2 * 4 * (32 + 32) + 2 * 33
    assert bench.learner.trainable_parameters() == trained
    assert bench.strategy.inspect()["adapter_parameters"] == trained - 66


def test_weight_decay_leaves_head_rows_of_other_tasks_alone(learner_of):
    bench = learner_of({"lora": KEYS}, weight_decay=0.5).learn(0)
    before = {n: p.detach().clone() for n, p in bench.learner.head.blocks.parameters_of(0).items()}
    bench.learn(1)
    assert all(torch.equal(before[n], p) for n, p in bench.learner.head.blocks.parameters_of(0).items())


@pytest.mark.parametrize("mode", ["continue", "merge"])
def test_merged_and_unmerged_answers_agree_and_unmerging_gives_the_bytes_back(bench_of, mode):
    bench = bench_of(mode=mode, targets=["q", "v", "proj", "fc1"]).learn(0, 1)
    expected, digest = bench.logits(), bench.vit.digest()
    pairs = {name: tensor.clone() for name, tensor in factors(bench).items()}
    batch = bench.batch()
    with Merge(bench.strategy.layout, pairs, bench.strategy.dense()), torch.no_grad():
        merged = bench.learner.head(bench.vit(batch.images))
    assert (merged - expected).norm() <= 1e-5 * expected.norm()
    assert bench.vit.digest() == digest


def test_folding_leaves_the_function_and_the_next_pair_is_new(bench_of, monkeypatch):
    bench, answers = bench_of(mode="merge"), []
    real = bench.strategy.end_task

    def watched(task):
        answers.append(bench.logits())
        real(task)
        answers.append(bench.logits())

    monkeypatch.setattr(bench.strategy, "end_task", watched)
    bench.learn(0, 1, 2)
    for before, after in zip(answers[::2], answers[1::2], strict=True):
        assert (before - after).norm() <= 1e-5 * before.norm()
    assert (answers[0] - answers[-1][:, :2]).norm() > 1e-3
    bench = bench_of(mode="merge").learn(0).begin(1)
    drawn = torch.rand(4, 32, generator=stream(0, 1, "lora/0/q"))
    assert torch.equal(factors(bench)["A_q"][0], (2 * drawn - 1) / 32**0.5)
    assert not factors(bench)["B_q"].any()
    assert all(total.any() for total in bench.strategy.dense().values())


def test_all_of_it_belongs_to_every_task_learnt(bench_of):
    bench = bench_of(mode="merge").learn(0, 1)
    assert {part.name: part.tasks for part in bench.strategy.components()} == {
        "factors": (0, 1),
        "folded": (0, 1),
        "trained": (0, 1),
    }
    before = bench.state()
    bench.strategy.drop_task(0)
    assert not bench.changed(before)


def test_blocks_before_the_first_adapter_are_kept_for_evaluation(bench_of):
    bench = bench_of(blocks=[2, 3]).begin(0)
    assert bench.learner.context.kept_blocks == 2
