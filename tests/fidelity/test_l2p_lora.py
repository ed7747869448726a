"""L2P with adapters is itself because each image picks adapters of a shared pool by its query and runs their sum."""

import pytest
import torch
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, stream

KEYS = {"rank": 2, "alpha": 4.0, "pool_size": 6, "top_k": 2}


@pytest.fixture
def bench_of(learner_of):
    return lambda **keys: learner_of({"l2p_lora": {**KEYS, **keys}})


def spread(bench):
    """Keys at the queries of six images, so that images pick differently, and adapters that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pool = bench.strategy.pool
        pool["key"].copy_(bench.batch().extra["query"][::8] + 0.05)
        for name in ("B_q", "B_v"):
            pool[name].copy_(0.3 * torch.randn(pool[name].shape, generator=generator))
    return bench


def pool_of(bench):
    return {name: tensor.detach().clone() for name, tensor in bench.strategy.pool.items()}


def test_what_every_adapter_strategy_promises(adapter_promise, learner_of):
    adapter_promise(learner_of, "l2p_lora", KEYS, None)


def test_before_training_the_features_are_the_plain_trunks_whatever_is_picked(bench_of):
    bench = bench_of().begin(0)
    with bench.learner.answering():
        batch = bench.batch()
        torch.testing.assert_close(bench.strategy(batch), bench.vit(batch.images), rtol=0, atol=0)


def test_keys_start_in_plus_minus_one_and_every_adapter_has_a_draw_of_its_own(bench_of):
    pool = bench_of().strategy.pool
    assert torch.equal(pool["key"], 2 * torch.rand(6, 32, generator=stream(0, RUN_LEVEL, "l2p_lora/key")) - 1)
    drawn = torch.rand(2, 32, generator=stream(0, RUN_LEVEL, "lora/3/v", 5))
    assert torch.equal(pool["A_v"][5, 3], (2 * drawn - 1) / 32**0.5)
    assert not pool["B_v"].any()


def test_each_image_picks_its_own_nearest_keys(bench_of):
    bench = spread(bench_of())
    batch = bench.batch()
    chosen = bench.strategy.select(batch)
    for query, picks in zip(batch.extra["query"], chosen, strict=True):
        similarity = torch.stack([F.cosine_similarity(query, key, dim=0) for key in bench.strategy.pool["key"]])
        assert torch.allclose(similarity[picks], similarity.topk(2).values)
    assert len(chosen.unique(dim=0)) > 3
    for row in range(len(batch)):
        assert torch.equal(bench.strategy.select(bench.batch(images=bench.images()[row : row + 1]))[0], chosen[row])


def test_training_rows_pick_for_themselves_too(bench_of):
    bench = spread(bench_of()).begin(0)
    step, _ = bench.step()
    alone = [bench.strategy.select(step.batch.select(torch.tensor([row]))) for row in range(len(step.batch))]
    assert torch.equal(torch.cat(alone), bench.strategy.select(step.batch))
    assert len(torch.cat(alone).unique(dim=0)) > 1


def test_an_image_runs_with_the_sum_of_its_adapters(bench_of):
    bench = spread(bench_of())
    batch, pool, layout = bench.batch(), pool_of(bench), bench.strategy.layout
    chosen = bench.strategy.select(batch)
    with bench.learner.answering():
        found = bench.strategy(batch)
        for row in range(0, len(batch), 7):
            dense = {
                t: 2.0 * sum(pool[f"B_{t}"][p] @ pool[f"A_{t}"][p] for p in chosen[row].tolist()) for t in ("q", "v")
            }
            nothing = {name: torch.zeros_like(tensor[0]) for name, tensor in pool.items() if name != "key"}
            extras = layout.extras(nothing, dense=dense)
            tokens = bench.vit.run(bench.vit.embed(batch.images[row : row + 1]), extras=extras)
            expected = bench.vit.readout(bench.vit.finish(tokens))
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_picking_all_adapters_gives_every_image_their_sum(bench_of):
    bench = spread(bench_of(top_k=6))
    batch, pool, layout = bench.batch(), pool_of(bench), bench.strategy.layout
    dense = {t: 2.0 * torch.einsum("plor,plri->loi", pool[f"B_{t}"], pool[f"A_{t}"]) for t in ("q", "v")}
    nothing = {name: torch.zeros_like(tensor[0]) for name, tensor in pool.items() if name != "key"}
    with bench.learner.answering():
        tokens = bench.vit.run(bench.vit.embed(batch.images), extras=layout.extras(nothing, dense=dense))
        expected = bench.vit.readout(bench.vit.finish(tokens))
        torch.testing.assert_close(bench.strategy(batch), expected, rtol=1e-4, atol=1e-5)


def test_the_pull_is_one_minus_the_cosines_of_the_picked_keys_and_moves_keys_alone(bench_of):
    bench = spread(bench_of(pull=0.3)).begin(0)
    step, terms = bench.step()
    similarity = F.cosine_similarity(step.batch.extra["query"][:, None], bench.strategy.pool["key"][None], dim=2)
    expected = 0.3 * (2 - similarity.topk(2, dim=1).values.sum(1)).mean()
    torch.testing.assert_close(terms["l2p_lora/pull"], expected)
    terms["l2p_lora/pull"].backward()
    assert bench.strategy.pool["key"].grad.any()
    assert all(p.grad is None for name, p in bench.strategy.pool.items() if name != "key")


def test_a_step_along_the_pull_brings_picked_keys_nearer(bench_of):
    bench = spread(bench_of()).begin(0)
    key = bench.strategy.pool["key"]

    def nearness():
        query = bench.learner._last_step.batch.extra["query"]
        return F.cosine_similarity(query[:, None], key[None], dim=2).gather(1, picked).mean()

    step, terms = bench.step()
    picked = bench.strategy.select(step.batch)
    before = nearness()
    terms["l2p_lora/pull"].backward()
    with torch.no_grad():
        key -= 0.1 * key.grad
    assert nearness() > before


def test_adapters_that_no_image_picked_keep_their_bits_against_the_optimizers_memory(bench_of):
    bench = spread(bench_of(pool_size=6)).begin(0)
    strategy, pool = bench.strategy, bench.strategy.pool
    optimizer = torch.optim.Adam(pool.values(), lr=0.01, weight_decay=0.1)
    for picks in ((0, 1), (2, 3)):
        bench.learner.composition.members["l2p_lora"].select = lambda batch, p=picks: torch.tensor([p] * len(batch))
        step, terms = bench.step()
        sum(terms.values()).backward()
        before = pool_of(bench)
        strategy.after_backward(step)
        optimizer.step()
        assert any(not torch.equal(pool[n][0], before[n][0]) for n in before)  # what the memory alone would do
        strategy.after_update(step)
        for name, tensor in pool.items():
            for p in range(6):
                assert torch.equal(tensor[p], before[name][p]) == (p not in picks), (name, p)


def test_training_moves_only_what_was_picked(bench_of):
    bench = bench_of().learn(0)
    first = pool_of(bench)
    with torch.no_grad():  # from now on only adapters 4 and 5 are near
        direction = bench.batch().extra["query"].mean(0)
        bench.strategy.pool["key"].copy_(-direction.expand(6, -1) + 0.01 * first["key"])
        bench.strategy.pool["key"][4:] *= -1
    first = pool_of(bench)
    bench.learn(1)
    assert bench.strategy.inspect()["usage"]["1"][:4] == [0, 0, 0, 0]
    for name, tensor in bench.strategy.pool.items():
        assert torch.equal(tensor[:4], first[name][:4]), name
        assert not torch.equal(tensor[4:], first[name][4:])


def test_picks_are_counted_by_task_and_belong_to_those_that_moved_the_keys(bench_of):
    bench = bench_of().learn(0, 1)
    usage = bench.strategy.inspect()["usage"]
    assert [sum(usage[t]) for t in ("0", "1")] == [2 * 2 * 16, 2 * 2 * 16]  # two picks, two epochs, 16 images
    assert 0 < bench.strategy.inspect()["most_picked_share"] <= 1
    parts = {part.name: part.tasks for part in bench.strategy.components()}
    assert parts == {"pool": (0, 1), "trained": (0, 1), "usage.tasks.0": (0,), "usage.tasks.1": (0, 1)}
    bench.strategy.drop_task(0)
    assert "usage.tasks.0" not in {part.name for part in bench.strategy.components()}


def test_a_pool_of_which_one_adapter_is_picked_by_nearly_all_images_is_reported(bench_of, caplog):
    bench = bench_of(top_k=1)
    with torch.no_grad():
        bench.strategy.pool["key"].copy_(-bench.batch().extra["query"].mean(0).expand(6, -1))
        bench.strategy.pool["key"][2] *= -1.0
    with caplog.at_level("WARNING", logger="cl_platform"):
        bench.learn(0)
    assert "one adapter was picked by 100 % of the images" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="cl_platform"):
        bench_of(top_k=6).learn(0)  # all are picked by all: nothing to choose from
    assert not caplog.records


def test_more_picks_than_adapters_are_refused(bench_of):
    with pytest.raises(UserError, match=r"strategy\.l2p_lora\.top_k=7: must be at most the pool's 6 adapters"):
        bench_of(top_k=7)
