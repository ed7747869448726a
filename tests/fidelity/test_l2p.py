"""L2P is L2P because each image picks the prompts whose keys are nearest to its own query, and reads their outputs."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, stream

KEYS = {"pool_size": 8, "length": 3, "top_k": 2}


@pytest.fixture
def bench_of(learner_of):
    return lambda **keys: learner_of({"l2p": {**KEYS, **keys}})


def spread_keys(bench):
    """Keys at the queries of eight images, so that images pick differently."""
    with torch.no_grad():
        bench.strategy.pool["key"].copy_(bench.batch().extra["query"][::6] + 0.05)
    return bench


def test_what_every_prompt_strategy_promises(prompt_promise, learner_of):
    prompt_promise(learner_of, "l2p", KEYS, {"length": 0})


def test_an_empty_pool_is_the_plain_trunk(bench_of):
    bench = bench_of(pool_size=0).learn(0)
    assert "pool.key" not in bench.strategy.state_dict()
    with bench.learner.answering():
        assert torch.equal(bench.strategy(bench.batch()), bench.vit(bench.batch().images))


def test_pool_and_keys_start_uniform_from_the_runs_own_stream(bench_of):
    pool, generator = bench_of().strategy.pool, stream(0, RUN_LEVEL, "l2p_init")
    assert torch.equal(pool["prompt"], torch.rand(8, 3, 32, generator=generator) * 0.01)
    assert torch.equal(pool["key"], torch.rand(8, 32, generator=generator) * 0.01)


def test_each_image_picks_its_own_nearest_keys(bench_of):
    bench = spread_keys(bench_of())
    batch = bench.batch()
    chosen = bench.strategy.select(batch)
    for query, picks in zip(batch.extra["query"], chosen, strict=True):
        similarity = torch.stack([F.cosine_similarity(query, key, dim=0) for key in bench.strategy.pool["key"]])
        assert torch.allclose(similarity[picks], similarity.topk(2).values)
    assert len(chosen.unique(dim=0)) > 3
    for row in range(len(batch)):  # alone or in company: the same, exactly
        assert torch.equal(bench.strategy.select(bench.batch(images=bench.images()[row : row + 1]))[0], chosen[row])


def test_equal_keys_give_the_lowest_ids(bench_of):
    bench = bench_of(top_k=3)
    with torch.no_grad():
        bench.strategy.pool["key"][:] = bench.strategy.pool["key"][0].clone()
    assert (bench.strategy.select(bench.batch()) == torch.tensor([0, 1, 2])).all()


def test_the_length_of_queries_and_keys_does_not_matter(bench_of):
    bench = spread_keys(bench_of())
    batch = bench.batch()
    chosen = bench.strategy.select(batch)
    scaled = batch.with_extra(query=batch.extra["query"] * torch.logspace(-2, 2, len(batch))[:, None])
    with torch.no_grad():
        bench.strategy.pool["key"].mul_(torch.logspace(-3, 3, 8)[:, None])
    assert torch.equal(bench.strategy.select(scaled), chosen)


def test_bfloat16_picks_as_float32_where_the_choice_is_clear(learner_of):
    bench = spread_keys(learner_of({"l2p": KEYS}))
    batch = bench.batch()
    chosen = bench.strategy.select(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(bench.strategy.select(batch), chosen)  # cosines leave autocast
        rough = batch.with_extra(query=bench.vit(batch.images).float())
        picked = bench.strategy.select(rough).sort(dim=1).values
    similarity = F.cosine_similarity(batch.extra["query"][:, None], bench.strategy.pool["key"][None], dim=2)
    top = similarity.sort(dim=1, descending=True).values
    clear = top[:, 1] - top[:, 2] > 1e-2
    assert clear.any()
    assert torch.equal(picked[clear], chosen.sort(dim=1).values[clear])


def test_prompts_join_the_tokens_behind_positions_and_the_readout_is_their_mean(bench_of):
    bench = bench_of().begin(0)
    batch, seen, inputs = bench.batch(), [], []
    for block in bench.vit.vit.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    bench.vit.vit.norm.register_forward_hook(lambda _, __, out: seen.append(out))
    features = bench.strategy(batch)
    assert [tokens.shape[1] for tokens in inputs] == [5 + 2 * 3] * 4  # N + k * L in every block
    prompts = bench.strategy.pool["prompt"][bench.strategy.select(batch)].flatten(1, 2)
    plain = bench.vit.embed(batch.images)
    assert torch.equal(inputs[0], torch.cat([plain[:, :1], prompts, plain[:, 1:]], dim=1))
    assert torch.equal(features, seen[0][:, 1:7].mean(dim=1))


@pytest.mark.parametrize("head_input, rows", [("token", [0]), ("token+prompt", range(7)), ("gap", range(7, 11))])
def test_other_readouts_average_other_rows(bench_of, head_input, rows):
    bench, seen = bench_of(head_input=head_input).begin(0), []
    bench.vit.vit.norm.register_forward_hook(lambda _, __, out: seen.append(out))
    features = bench.strategy(bench.batch())  # the last pass through the norm; the query's was before
    assert torch.allclose(features, seen[-1][:, list(rows)].mean(dim=1), atol=1e-6)


def test_ports_give_every_prompt_the_class_tokens_position(bench_of):
    one, other, inputs = bench_of().begin(0), bench_of(prompt_pos_embed=True).begin(0), []
    for bench in (one, other):
        batch = bench.batch()
        bench.vit.vit.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        bench.strategy(batch)
    difference = inputs[1] - inputs[0]
    assert torch.allclose(difference[:, 1:7], one.vit.vit.pos_embed[:, :1].expand(48, 6, -1), atol=1e-6)
    assert not difference[:, :1].any() and not difference[:, 7:].any()


def test_picking_the_whole_pool_makes_its_order_irrelevant(bench_of):
    bench = bench_of(top_k=8).learn(0)
    before, order = bench.logits(), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    assert (bench.strategy.select(bench.batch()).sort(dim=1).values == torch.arange(8)).all()
    with torch.no_grad():
        for part in bench.strategy.pool.values():
            part.copy_(part[order].clone())
    assert torch.allclose(bench.logits(), before, atol=1e-5)


def test_the_loss_is_masked_cross_entropy_minus_the_mean_sum_of_picked_cosines(bench_of):
    bench = bench_of(pull=0.7).learn(0).begin(1)
    step, terms = bench.step()
    masked = step.logits.clone()
    masked[:, [0, 1]] = -torch.inf
    assert torch.equal(terms["l2p/ce"], F.cross_entropy(masked, step.batch.labels))
    total = 0.0
    for query, picks in zip(step.batch.extra["query"], bench.strategy.select(step.batch), strict=True):
        total += sum(F.cosine_similarity(query, bench.strategy.pool["key"][m], dim=0) for m in picks)
    assert torch.allclose(terms["l2p/pull"], -0.7 * total / len(step.batch))


def test_the_pull_lies_between_minus_and_plus_lambda_k(bench_of):
    bench = bench_of(pull=1.0).begin(0)
    step, terms = bench.step()
    assert abs(terms["l2p/pull"]) <= 2
    query = bench.strategy.pool["key"][:1].detach().expand(8, -1) * torch.arange(1, 9)[:, None]
    with torch.no_grad():
        bench.strategy.pool["key"][5] = 3 * bench.strategy.pool["key"][0]
    first = replace(step.passes[0], batch=step.batch.with_extra(query=query))
    aligned = replace(step, passes=[first])
    assert bench.strategy.losses(aligned)["pull"].item() == pytest.approx(-2, abs=1e-6)


def test_the_pull_alone_raises_the_similarity_and_leaves_prompts_alone(bench_of):
    bench = bench_of().begin(0)
    step, terms = bench.step()
    terms["l2p/pull"].backward()
    pool = bench.strategy.pool
    assert pool["prompt"].grad is None
    with torch.no_grad():
        pool["key"] -= 1e-4 * pool["key"].grad
    assert bench.strategy.losses(step)["pull"] < terms["l2p/pull"]


def test_keys_learn_from_the_pull_only_and_prompts_from_cross_entropy_only(bench_of):
    bench = spread_keys(bench_of()).begin(0)
    step, terms = bench.step()
    terms["l2p/ce"].backward()
    pool, picked = bench.strategy.pool, bench.strategy.select(step.batch).unique().tolist()
    assert pool["key"].grad is None
    moved = pool["prompt"].grad.flatten(1).any(dim=1)
    assert moved.nonzero().flatten().tolist() == picked and 2 <= len(picked) < 8


def test_prompts_that_no_image_picked_in_a_task_stay_bit_identical(bench_of):
    bench = spread_keys(bench_of()).learn(0)
    before = {name: part.detach().clone() for name, part in bench.strategy.pool.items()}
    bench.learn(1, epochs=3)
    count = torch.tensor(bench.strategy.inspect()["usage"]["1"])
    assert count.sum() == 16 * 2 * 3  # images, prompts each, epochs
    assert (count == 0).any() and (count > 0).any()
    for name, part in bench.strategy.pool.items():
        same = (part == before[name]).flatten(1).all(dim=1)
        assert same[count == 0].all() and not same[count > 0].any()


def test_the_usage_is_counted_in_training_only_and_kept_in_the_state(bench_of):
    bench = bench_of().learn(0)
    usage = bench.strategy.inspect()
    bench.logits()
    assert bench.strategy.inspect() == usage
    other = bench_of()
    other.learner.load_learnt_state(bench.learner.learnt_state())
    assert other.strategy.inspect() == usage


def test_a_batch_votes_in_training_only(bench_of):
    bench = spread_keys(bench_of(selection="batch_majority"))
    own = bench.strategy.select(bench.batch())
    assert len(own.unique(dim=0)) > 3
    voted = bench.strategy.select(bench.batch(task_id=0))
    assert len(voted.unique(dim=0)) == 1
    assert (
        voted[0].tolist() == own.flatten().bincount(minlength=8).sort(descending=True, stable=True).indices[:2].tolist()
    )


def test_a_mask_gives_training_rows_their_tasks_prompts_while_the_pool_lasts(bench_of):
    bench = bench_of(prompt_mask=True, pool_size=5)
    nearest = bench.strategy.select(bench.batch())
    assert (bench.strategy.select(bench.batch(task_id=1)) == torch.tensor([2, 3])).all()
    assert torch.equal(bench.strategy.select(bench.batch(task_id=2)), nearest)  # 4 and 5 do not both exist


@pytest.mark.parametrize("copy", [True, False])
def test_with_a_mask_a_task_may_start_from_the_previous_ones_prompts(bench_of, copy):
    bench = bench_of(prompt_mask=True, copy_previous=copy).learn(0)
    before = bench.strategy.pool["prompt"].detach().clone()
    bench.begin(1)
    expected = before.clone()
    if copy:
        expected[2:4] = before[0:2]
    assert torch.equal(bench.strategy.pool["prompt"], expected)


def test_the_pool_belongs_to_all_tasks_and_still_does_after_one_is_dropped(bench_of):
    bench = bench_of().learn(0, 1)
    owners = {c.name: c.tasks for c in bench.strategy.components()}
    assert owners == {"pool": (0, 1), "trained": (0, 1), "usage.tasks.0": (0,), "usage.tasks.1": (0, 1)}
    bench.strategy.drop_task(0)
    assert {c.name: c.tasks for c in bench.strategy.components()} == {
        "pool": (0, 1), "trained": (0, 1), "usage.tasks.1": (0, 1),
    }  # fmt: skip


def test_no_more_prompts_can_be_picked_than_there_are(bench_of):
    with pytest.raises(UserError, match="top_k"):
        bench_of(top_k=9)


def test_a_readout_without_its_token_is_refused(learner_of):
    avg = {"global_pool": "avg", "class_token": False}
    for keys in ({"head_input": "token"}, {"prompt_pos_embed": True}):
        with pytest.raises(UserError, match=next(iter(keys))):
            learner_of({"l2p": {**KEYS, **keys}}, vit=avg)
    assert learner_of({"l2p": KEYS}, vit=avg).learn(0).logits().isfinite().all()
