"""InfLoRA is InfLoRA because each adapter reads, by design, only directions that earlier tasks' inputs leave free."""

import pytest
import torch

from cl_platform.backbones.lora import Merge
from cl_platform.strategies import inflora as module
from cl_platform.strategies.gradient_memory import Span, complement, design, extend_span, left_vectors

KEYS = {"rank": 4}


@pytest.fixture
def bench_of(learner_of):
    return lambda vit=None, **keys: learner_of({"inflora": {**KEYS, **keys}}, vit=vit)


def moments(rank=32, width=32, seed=0, decay=0.8):
    """Second moments of drawn inputs whose directions fade by ``decay``."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q[:, :rank]
    inputs = torch.randn(400, rank, generator=generator, dtype=torch.float64) * decay ** torch.arange(rank)
    inputs = inputs @ directions.T
    return inputs.T @ inputs / 400


def orthonormal(basis):
    return (basis.T @ basis - torch.eye(basis.shape[1]).double()).abs().max() <= 1e-10


def held(span, c):
    """Share of the squared singular values of ``c`` in the directions that are used."""
    used = complement(span.basis) if span.free else span.basis
    return float((used @ used.T @ c).square().sum() / c.square().sum())


def test_what_every_adapter_strategy_promises(adapter_promise, learner_of):
    adapter_promise(learner_of, "inflora", KEYS, None)


# -- the design -------------------------------------------------------------------------------------------------------


def test_the_first_design_is_the_leading_directions_of_the_inputs(bench_of):
    c = moments()
    rows = design(c, None, 4)
    values, vectors = torch.linalg.eigh(c)
    leading = vectors.flip(1)[:, :4].T / 3**0.5
    assert torch.allclose((rows @ leading.T).abs(), torch.eye(4).double() / 3, atol=1e-10)
    assert torch.allclose(rows.norm(dim=1), torch.full((4,), 3**-0.5).double())


@pytest.mark.parametrize("free", [False, True], ids=["remove", "retain"])
def test_a_design_reads_only_what_is_free(free):
    used = extend_span(None, moments(seed=1, decay=0.6), 0.9999).basis
    span = Span(complement(used) if free else used, free)
    rows = design(moments(seed=2), span, 6)
    assert (rows @ used).abs().max() <= 1e-6
    assert (rows.norm(dim=1) > 0.5).all()
    assert (design(moments(seed=2), None, 6) @ used).abs().max() > 0.1  # there was something to leave out
    expected, _ = left_vectors((torch.eye(32).double() - used @ used.T) @ moments(seed=2))
    assert torch.allclose((rows @ expected[:, :6]).abs(), torch.eye(6).double() / 3**0.5, atol=1e-8)


def test_rows_without_anything_left_to_read_are_zero():
    used = torch.linalg.qr(torch.randn(32, 8, dtype=torch.float64)).Q
    extra = torch.linalg.qr(torch.cat([used, torch.randn(32, 2, dtype=torch.float64)], dim=1)).Q[:, 8:]
    span = Span(used, free=False)
    inputs = torch.cat([used, extra], dim=1)
    rows = design(inputs @ inputs.T, span, 4)
    assert (rows[:2].norm(dim=1) > 0.5).all()
    assert not rows[2:].any()
    assert not design(used @ used.T, span, 4).any()


def test_where_nothing_is_free_any_more_a_design_reads_nothing(bench_of):
    span = extend_span(Span(torch.eye(32).double()[:, :30], free=False), torch.eye(32).double(), 1.0)
    assert span.free and span.basis.shape == (32, 0)
    assert not design(moments(), span, 4).any()
    assert extend_span(span, moments(), 1.0) is span
    bench = bench_of().learn(0)
    bench.strategy.columns.zero_()
    bench.strategy.free.fill_(1)
    assert bench.strategy.span(0).basis.shape == (32, 0)
    assert not bench.begin(1).strategy.bank.get(1, "A").any()


def test_directions_have_one_sign_whatever_the_decomposition_gives():
    vectors, _ = left_vectors(moments())
    turned, _ = left_vectors(moments().T.contiguous())
    assert torch.allclose(vectors, turned)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


# -- the memory -------------------------------------------------------------------------------------------------------


def test_the_first_task_takes_in_one_direction_less_than_would_reach_the_share():
    c = moments()
    parts = torch.linalg.svdvals(c).square()
    parts = parts / parts.sum()
    for share in (0.3, 0.9, 0.95, 0.999):
        span = extend_span(None, c, share)
        taken = span.basis.shape[1]
        assert not span.free and orthonormal(span.basis)
        assert taken == 1 or parts[:taken].sum() < share
        assert parts[: taken + 1].sum() >= share
        assert torch.allclose(span.basis, left_vectors(c)[0][:, :taken])


def test_a_first_task_that_uses_most_directions_keeps_the_free_ones_instead():
    c = torch.diag(torch.linspace(1.0, 0.9, 32, dtype=torch.float64))
    span = extend_span(None, c, 0.95)
    assert span.free and orthonormal(span.basis)
    assert span.basis.shape[1] < 4  # of 32, those with the least inputs
    assert (span.basis.abs().argmax(0) > 27).all()


def test_a_later_task_adds_the_fewest_directions_that_reach_the_share():
    first = extend_span(None, moments(seed=1, decay=0.6), 0.95)
    c = moments(seed=2, decay=0.85)
    span = extend_span(first, c, 0.97)
    assert not span.free and orthonormal(span.basis)
    assert held(span, c) >= 0.97 - 1e-12
    assert held(Span(span.basis[:, :-1], False), c) < 0.97
    before = first.basis
    assert torch.allclose(span.basis @ (span.basis.T @ before), before, atol=1e-10)  # nothing is given up
    assert extend_span(span, c, 0.97) is span


def test_more_than_half_of_the_directions_are_kept_as_what_is_free():
    span = None
    for seed in range(6):
        earlier, span = span, extend_span(span, moments(seed=seed, decay=0.75), 0.99)
        assert orthonormal(span.basis)
        if earlier is not None:
            used = complement(earlier.basis) if earlier.free else earlier.basis
            now = complement(span.basis) if span.free else span.basis
            assert torch.allclose(now @ (now.T @ used), used, atol=1e-8)
            assert now.shape[1] >= used.shape[1]
    assert span.free
    assert span.basis.shape[1] < 16


def test_what_is_free_shrinks_by_the_fewest_directions_that_reach_the_share():
    used = torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    span, c = Span(complement(used), free=True), moments(seed=3, decay=0.7)
    grown = extend_span(span, c, 0.97)
    assert grown.free and orthonormal(grown.basis)
    assert grown.basis.shape[1] < span.basis.shape[1]
    assert held(grown, c) >= 0.97
    taken = span.basis.shape[1] - grown.basis.shape[1]
    leading, values = left_vectors(span.allowed(c))
    short = values[taken - 1 :].square().sum() / c.square().sum()
    assert float(1 - short) < 0.97
    assert (grown.basis.T @ leading[:, :taken]).abs().max() <= 1e-8
    assert torch.allclose(span.basis @ (span.basis.T @ grown.basis), grown.basis, atol=1e-10)


# -- the learner ------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_all_tokens_that_enter_the_attention_as_the_adapted_network_sees_them(bench_of):
    bench, seen = bench_of(blocks=[1, 3]).learn(0), {1: [], 3: []}
    for block, inputs in seen.items():
        bench.vit.vit.blocks[block].attn.qkv.register_forward_pre_hook(lambda _, x, to=inputs: to.append(x[0]))
    task = bench.stream.task(1)
    with bench.learner.answering():
        bench.strategy(bench.batch(images=task.train.images(slice(None))))
        expected = []
        for inputs in seen.values():
            x = inputs[-1].flatten(0, 1).double()
            assert x.shape == (16 * 5, 32)
            expected.append(x.T @ x / len(x))
    for found, wanted in zip(bench.strategy.input_moments(task), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_adapters_stay_out_of_the_directions_of_earlier_tasks_and_do_not_change_their_answers_there(bench_of):
    bench = bench_of().learn(0)
    for task_id in (1, 2):
        spans = [bench.strategy.span(i) for i in range(4)]
        bench.learn(task_id)
        down = bench.strategy.bank.get(task_id, "A").double()
        assert down.any()
        for index, span in enumerate(spans):
            used = complement(span.basis) if span.free else span.basis
            assert orthonormal(span.basis)
            assert (down[index] @ used).abs().max() <= 1e-6
            x = (used @ torch.randn(used.shape[1], 9, dtype=torch.float64)).T.float()  # inputs of earlier tasks
            up = bench.strategy.bank.get(task_id, "B_v")[index]
            assert up.any()
            assert (x @ down[index].float().T @ up.T).abs().max() <= 1e-5 * x.norm()


def test_a_new_adapter_changes_no_answer_before_it_is_trained(bench_of):
    bench = bench_of().learn(0)
    before = bench.logits()
    assert (bench.begin(1).logits()[:, :2] - before).abs().max() <= 1e-5
    assert not bench.strategy.bank.get(1, "B_k").any()


def test_only_up_factors_and_the_tasks_own_head_rows_are_trained(bench_of):
    bench = bench_of().learn(0).begin(1)
    designed = bench.strategy.bank.get(1, "A").clone()
    trained = {id(p) for p in bench.learner.parameters() if p.requires_grad}
    blocks = bench.learner.head.blocks
    own = [*bench.strategy.bank.parameters_of(1).values(), *blocks.parameters_of(1).values()]
    assert trained == {id(p) for p in own}
    assert sorted(bench.strategy.bank.parameters_of(1)) == ["B_k", "B_v"]
    bench.learn(1)
    assert torch.equal(bench.strategy.bank.get(1, "A"), designed)
    assert bench.strategy.inspect()["adapter_parameters"] == 2 * 4 * 4 * 32


def test_the_share_rises_from_epsilon_towards_one_and_then_stays(bench_of, monkeypatch):
    shares = []
    monkeypatch.setattr(module, "extend_span", lambda s, c, share: shares.append(share) or extend_span(s, c, share))
    bench = bench_of(epsilon=0.9, blocks=[0]).learn(0, 1, 2)
    bench.learner.context.num_tasks = 2
    bench.strategy.end_task(bench.stream.task(2))
    assert shares == pytest.approx([0.9, 0.9 + 0.1 / 3, 0.9 + 0.2 / 3, 0.95])


def test_a_task_that_brings_no_new_direction_leaves_the_spans_as_they_are(bench_of):
    bench = bench_of().learn(0)
    bench.strategy.end_task(bench.stream.task(0))  # the first time one direction was left out
    before = bench.state()
    bench.strategy.end_task(bench.stream.task(0))
    assert not bench.changed(before)


def test_designs_and_spans_see_the_images_without_augmentation_and_draw_nothing(bench_of):
    one, other = bench_of().begin(0), bench_of().begin(0)
    assert torch.equal(one.strategy.bank.get(0, "A"), other.strategy.bank.get(0, "A"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one.strategy.input_moments(one.stream.task(0))
    assert torch.equal(state, torch.get_rng_state())


def test_moments_are_gathered_in_eval_mode_and_the_mode_is_put_back(bench_of):
    bench = bench_of(vit={"drop_path_rate": 0.5}).learn(0)
    before = bench.strategy.input_moments(bench.stream.task(0))
    bench.vit.frozen = False
    bench.vit.train()
    after = bench.strategy.input_moments(bench.stream.task(0))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert bench.vit.training


def test_answers_use_the_sum_of_all_adapters_and_can_be_merged(bench_of):
    bench = bench_of().learn(0, 1, 2)
    bank = bench.strategy.bank
    with torch.no_grad():
        down = torch.cat(bank.all("A"), dim=1)
        factors = {"A_k": down, "A_v": down, **{n: torch.cat(bank.all(n), dim=2) for n in ("B_k", "B_v")}}
        batch, expected = bench.batch(), bench.logits()
        with Merge(bench.strategy.layout, factors):
            merged = bench.learner.head(bench.vit(batch.images))
    assert (merged - expected).norm() <= 1e-5 * expected.norm()


def test_spans_belong_to_all_tasks_and_an_adapter_to_those_before_it(bench_of):
    bench = bench_of().learn(0, 1)
    parts = {part.name: part.tasks for part in bench.strategy.components()}
    assert parts == {
        "bank.tasks.0": (0,), "bank.tasks.1": (0, 1), "basis": (0, 1), "columns": (0, 1), "free": (0, 1),
        "trained": (0, 1),
    }  # fmt: skip
    before = bench.state()
    bench.strategy.drop_task(0)
    assert not bench.changed(before)
    assert set(before) - set(bench.state()) == {n for n in before if "inflora.bank.tasks.0." in n}
    assert bench.logits().isfinite().all()
