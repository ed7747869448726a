"""O-LoRA is O-LoRA because a new adapter is trained beside frozen ones and pays for reading their input directions."""

import pytest
import torch

from cl_platform.backbones.lora import Merge
from cl_platform.strategies.adapters import summed

KEYS = {"rank": 3, "alpha": 6.0}


@pytest.fixture
def bench_of(learner_of):
    return lambda **keys: learner_of({"olora": {**KEYS, **keys}})


def factor(bench, task_id, name):
    return bench.strategy.bank.get(task_id, name)


def test_what_every_adapter_strategy_promises(adapter_promise, learner_of):
    adapter_promise(learner_of, "olora", KEYS, None)


def test_a_new_adapter_changes_no_answer_before_it_is_trained(bench_of):
    bench = bench_of().learn(0)
    before = bench.logits()
    bench.begin(1)
    assert (bench.logits()[:, :2] - before).abs().max() <= 1e-5


def test_the_overlap_is_the_sum_of_absolute_products_with_all_earlier_directions(bench_of):
    bench = bench_of().learn(0, 1).begin(2)
    expected = 0.0
    for target in ("q", "v"):
        for block in range(4):
            for earlier in (0, 1):
                for one in factor(bench, earlier, f"A_{target}")[block]:
                    for other in factor(bench, 2, f"A_{target}")[block]:
                        expected += abs(float(one.detach() @ other.detach()))
    _, terms = bench.step()
    assert float(terms["olora/ortho"]) == pytest.approx(0.5 * expected, rel=1e-5)
    squares = bench_of(orth="fro2").learn(0).begin(1)
    products = factor(squares, 0, "A_q") @ factor(squares, 1, "A_q").transpose(1, 2)
    others = factor(squares, 0, "A_v") @ factor(squares, 1, "A_v").transpose(1, 2)
    expected = (products.square().sum() + others.square().sum()).item()
    assert float(squares.step()[1]["olora/ortho"]) == pytest.approx(0.5 * expected, rel=1e-5)


def test_orthogonal_directions_overlap_in_nothing_and_equal_ones_in_their_own_products(bench_of):
    bench = bench_of(lambda1=1.0).learn(0).begin(1)
    with torch.no_grad():
        for target in ("q", "v"):
            own = factor(bench, 1, f"A_{target}")
            past = factor(bench, 0, f"A_{target}")
            past[..., 16:], own[..., :16] = 0.0, 0.0
        assert float(bench.strategy.overlap([0])) == 0.0
        for target in ("q", "v"):
            factor(bench, 1, f"A_{target}").copy_(factor(bench, 0, f"A_{target}"))
        rows = [factor(bench, 0, f"A_{target}") for target in ("q", "v")]
        expected = sum(float((a @ a.transpose(1, 2)).abs().sum()) for a in rows)
        assert float(bench.strategy.overlap([0])) == pytest.approx(expected, rel=1e-5)


def test_the_overlap_moves_the_new_directions_alone(bench_of):
    bench = bench_of().learn(0).begin(1)
    _, terms = bench.step()
    terms["olora/ortho"].backward()
    for target in ("q", "v"):
        assert factor(bench, 1, f"A_{target}").grad.any()
        assert factor(bench, 1, f"B_{target}").grad is None
        assert factor(bench, 0, f"A_{target}").grad is None


def test_training_takes_the_new_directions_away_from_the_old_ones(bench_of):
    def overlap(**keys):
        bench = bench_of(**keys).learn(0, 1, epochs=6)
        with torch.no_grad():
            return float(bench.strategy.overlap([0]))

    assert overlap() < 0.5 * overlap(lambda1=0.0)


def test_on_the_first_task_it_is_sequential_lora_bit_for_bit(learner_of):
    one = learner_of({"olora": KEYS}).begin(0)
    assert set(one.step()[1]) == {"olora/ce"}
    one = learner_of({"olora": KEYS}).learn(0)
    other = learner_of({"lora": KEYS}).learn(0)
    for name, tensor in other.strategy.factors.items():
        assert torch.equal(tensor, factor(one, 0, name))
    assert torch.equal(one.logits(), other.logits())


def test_only_the_new_pair_and_the_tasks_own_head_rows_are_trained(bench_of):
    bench = bench_of().learn(0).begin(1)
    trained = {id(p) for p in bench.learner.parameters() if p.requires_grad}
    own = [*bench.strategy.bank.parameters_of(1).values(), *bench.learner.head.blocks.parameters_of(1).values()]
    assert trained == {id(p) for p in own}


def test_norms_are_not_squared(bench_of):
    bench = bench_of(lambda2=0.25).learn(0).begin(1)
    expected = sum(float(matrix.detach().norm()) for f in bench.strategy.bank.parameters_of(1).values() for matrix in f)
    assert float(bench.step()[1]["olora/norm"]) == pytest.approx(0.25 * expected, rel=1e-5)


def test_answers_use_the_sum_of_all_adapters_and_can_be_merged(bench_of):
    bench = bench_of().learn(0, 1, 2)
    with torch.no_grad():
        found = summed(bench.strategy.bank, ("q", "v"))
        dense = sum(factor(bench, t, "B_v")[1] @ factor(bench, t, "A_v")[1] for t in range(3))
        torch.testing.assert_close(found["B_v"][1] @ found["A_v"][1], dense, rtol=1e-4, atol=1e-6)
        batch, expected = bench.batch(), bench.logits()
        with Merge(bench.strategy.layout, found):
            merged = bench.learner.head(bench.vit(batch.images))
    assert (merged - expected).norm() <= 1e-5 * expected.norm()


def test_an_adapter_owes_to_those_before_it_and_can_be_removed(bench_of):
    bench = bench_of().learn(2, 0, 1)
    parts = {part.name: part.tasks for part in bench.strategy.components()}
    assert parts == {"bank.tasks.0": (0, 2), "bank.tasks.1": (0, 1, 2), "bank.tasks.2": (2,), "trained": (0, 1, 2)}
    bench.strategy.drop_task(0)
    assert {part.name: part.tasks for part in bench.strategy.components()} == {
        "bank.tasks.1": (0, 1, 2),
        "bank.tasks.2": (2,),
        "trained": (0, 1, 2),
    }
    assert bench.logits().isfinite().all()
