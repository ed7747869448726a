"""DualPrompt is DualPrompt because a shared prefix and the prefix of one task, found by its key, act side by side."""

import pytest
import torch
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, stream

KEYS = {"g_length": 2, "g_layers": [0, 1], "e_length": 3, "e_layers": [1, 2]}  # block 1 takes both


@pytest.fixture
def bench_of(learner_of):
    return lambda **keys: learner_of({"dual_prompt": {**KEYS, **keys}})


@pytest.fixture
def mixed(bench_of):
    """Three tasks learnt, prefixes made large, keys set so that images choose different tasks."""
    bench = bench_of().learn(0, 1, 2)
    query, generator = bench.batch().extra["query"], torch.Generator().manual_seed(0)
    with torch.no_grad():
        bench.strategy.g_prompt.copy_(torch.randn(bench.strategy.g_prompt.shape, generator=generator))
        for task_id in range(3):
            prefix = bench.strategy.e_prompt.get(task_id, "prefix")
            prefix.copy_(torch.randn(prefix.shape, generator=generator))
            bench.strategy.e_prompt.get(task_id, "key").copy_(query[16 * task_id + 3])
    return bench


def attention_of(attn, x, prefix):
    """Softmax attention of one image (N, D), head by head, with rows (2, L, D) before its keys and values."""
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, dim=1)
    if prefix is not None:
        k, v = torch.cat([prefix[0], k]), torch.cat([prefix[1], v])
    heads = []
    for h in range(attn.num_heads):
        part = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
        heads.append((q[:, part] @ k[:, part].T / attn.head_dim**0.5).softmax(dim=1) @ v[:, part])
    return torch.cat(heads, dim=1) @ attn.proj.weight.T + attn.proj.bias


def by_hand(bench, images, choices):
    """Features by a loop over images, blocks and heads; ``choices`` are the tasks whose E-prompt each image gets."""
    vit, strategy, features = bench.vit, bench.strategy, []
    for image, task_id in zip(images, choices, strict=True):
        x = vit.embed(image[None])[0]
        e_prompt = strategy.e_prompt.get(int(task_id), "prefix")
        for number, block in enumerate(vit.vit.blocks):
            rows = []
            if number in strategy.config.g_layers:
                rows.append(strategy.g_prompt[strategy.config.g_layers.index(number)])
            if number in strategy.config.e_layers:
                rows.append(e_prompt[strategy.config.e_layers.index(number)])
            x = x + attention_of(block.attn, block.norm1(x), torch.cat(rows, dim=1) if rows else None)
            x = x + block.mlp(block.norm2(x))
        features.append(vit.vit.norm(x)[0])
    return torch.stack(features)


def test_what_every_prompt_strategy_promises(prompt_promise, learner_of):
    prompt_promise(learner_of, "dual_prompt", KEYS, {"g_length": 0, "e_length": 0})


def test_prompts_and_keys_start_uniform_from_keyed_streams(bench_of):
    strategy = bench_of(copy_previous=False).begin(0).begin(2).strategy
    assert torch.equal(
        strategy.g_prompt, torch.rand(2, 2, 2, 32, generator=stream(0, RUN_LEVEL, "dual_prompt_init")) * 0.01
    )
    for task_id in (0, 2):
        generator = stream(0, task_id, "dual_prompt_init")
        assert torch.equal(strategy.e_prompt.get(task_id, "key"), torch.rand(32, generator=generator) * 0.01)
        drawn = torch.rand(2, 2, 3, 32, generator=generator) * 0.01
        assert torch.equal(strategy.e_prompt.get(task_id, "prefix"), drawn)


def test_features_equal_attention_by_hand_with_g_then_e_before_keys_and_values(mixed):
    batch = mixed.batch()
    choices = mixed.strategy.select(batch)
    assert len(choices.unique()) == 3
    with mixed.learner.answering():
        together = mixed.strategy(batch)
        assert torch.allclose(together, by_hand(mixed, batch.images, choices), atol=1e-5)
        own = mixed.batch(task_id=1)
        assert torch.equal(mixed.strategy(own), together)
        mixed.strategy.train()  # where alone a task id is read
        assert torch.allclose(mixed.strategy(own), by_hand(mixed, batch.images, [1] * 48), atol=1e-5)


def test_images_that_choose_different_tasks_answer_together_as_they_do_alone(mixed):
    together = mixed.logits()
    alone = torch.cat([mixed.logits(image[None]) for image in mixed.images()])
    assert torch.allclose(together, alone, atol=1e-4 * float(together.abs().max()))
    chosen = [mixed.strategy.select(mixed.batch(images=image[None])) for image in mixed.images()]
    assert torch.equal(torch.cat(chosen), mixed.strategy.select(mixed.batch()))


def test_rows_of_a_prefix_are_a_set_of_key_value_pairs(mixed):
    strategy, before = mixed.strategy, mixed.logits()

    def after(change):
        kept = {t: strategy.e_prompt.get(t, "prefix").detach().clone() for t in range(3)}
        with torch.no_grad():
            for t in range(3):
                strategy.e_prompt.get(t, "prefix").copy_(change(kept[t]))
            answer = mixed.logits()
            for t in range(3):
                strategy.e_prompt.get(t, "prefix").copy_(kept[t])
        return answer

    assert torch.allclose(after(lambda p: p.roll(1, dims=2)), before, atol=1e-5)
    assert not torch.allclose(
        after(lambda p: torch.stack([p[:, 0].roll(1, dims=1), p[:, 1]], dim=1)), before, atol=1e-2
    )
    assert not torch.allclose(after(lambda p: p.flip(1)), before, atol=1e-2)


def test_no_block_sees_more_tokens_than_without_prompts(mixed):
    batch, sizes = mixed.batch(), []
    for block in mixed.vit.vit.blocks:
        block.mlp.register_forward_hook(lambda _, __, out: sizes.append(out.shape[1]))
    mixed.strategy(batch)
    assert sizes == [5] * 4


def test_an_image_goes_to_the_nearest_key_and_the_lowest_task_among_equals(mixed):
    batch, keys = mixed.batch(), mixed.strategy.e_prompt.all("key")
    for query, choice in zip(batch.extra["query"], mixed.strategy.select(batch), strict=True):
        similarity = torch.stack([F.cosine_similarity(query, key, dim=0) for key in keys])
        assert similarity[choice] >= similarity.max() - 1e-6
    with torch.no_grad():
        for key in keys:
            key.copy_(keys[0].clone())
    assert not mixed.strategy.select(batch).any()


def test_bfloat16_chooses_as_float32_where_the_choice_is_clear(mixed):
    batch = mixed.batch()
    chosen = mixed.strategy.select(batch)
    keys = torch.stack(mixed.strategy.e_prompt.all("key"))
    top = F.cosine_similarity(batch.extra["query"][:, None], keys[None], dim=2).sort(dim=1, descending=True).values
    clear = top[:, 0] - top[:, 1] > 1e-2
    assert clear.any()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(mixed.strategy.select(batch), chosen)  # cosines leave autocast
        rough = batch.with_extra(query=mixed.vit(batch.images).float())
        assert torch.equal(mixed.strategy.select(rough)[clear], chosen[clear])


def test_with_one_task_learnt_every_image_chooses_it(bench_of):
    bench = bench_of().learn(2)
    assert not bench.strategy.select(bench.batch()).any()


def test_training_rows_use_their_own_task_also_replayed_ones(mixed):
    batch = mixed.batch()
    ids = torch.arange(48) % 3
    assert torch.equal(mixed.strategy.select(batch.replace(task_ids=ids)), ids)


def test_training_never_reads_the_keys_or_prompts_of_other_tasks(bench_of):
    bench = bench_of().learn(0, 1).begin(2)
    _, before = bench.step()
    with torch.no_grad():
        for task_id in (0, 1):
            for name in ("key", "prefix"):
                bench.strategy.e_prompt.get(task_id, name).fill_(torch.nan)
    _, after = bench.step()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    sum(after.values()).backward()
    assert bench.strategy.g_prompt.grad.isfinite().all()
    assert bench.strategy.e_prompt.get(2, "key").grad.isfinite().all()


def test_the_loss_is_masked_cross_entropy_minus_the_mean_cosine_to_the_tasks_own_key(bench_of):
    bench = bench_of(pull=0.7).learn(0).begin(1)
    step, terms = bench.step()
    masked = step.logits.clone()
    masked[:, [0, 1]] = -torch.inf
    assert torch.equal(terms["dual_prompt/ce"], F.cross_entropy(masked, step.batch.labels))
    key = bench.strategy.e_prompt.get(1, "key")
    cosines = torch.stack([F.cosine_similarity(query, key, dim=0) for query in step.batch.extra["query"]])
    assert torch.allclose(terms["dual_prompt/pull"], -0.7 * cosines.mean())


def test_the_pull_alone_raises_the_similarity_and_leaves_prefixes_alone(bench_of):
    bench = bench_of().begin(0)
    step, terms = bench.step()
    terms["dual_prompt/pull"].backward()
    own = bench.strategy.e_prompt.parameters_of(0)
    assert own["prefix"].grad is None and bench.strategy.g_prompt.grad is None
    with torch.no_grad():
        own["key"] -= 1e-4 * own["key"].grad
    assert bench.strategy.losses(step)["pull"] < terms["dual_prompt/pull"]
    bench.step()[1]["dual_prompt/ce"].backward()
    assert own["key"].grad is None and own["prefix"].grad.any()


def test_a_task_trains_the_g_prompt_its_own_e_prompt_key_and_head_rows(bench_of):
    bench = bench_of().learn(0, 1).begin(2)
    before = bench.state()
    bench.learn(2)
    assert bench.changed(before) == {
        "composition.members.dual_prompt.g_prompt",
        "composition.members.dual_prompt.e_prompt.tasks.2.prefix",
        "composition.members.dual_prompt.e_prompt.tasks.2.key",
        "head.blocks.tasks.2.weight",
        "head.blocks.tasks.2.bias",
    }


@pytest.mark.parametrize("copy", [True, False])
def test_a_new_e_prompt_is_a_copy_of_the_last_and_nothing_else_changes(bench_of, copy):
    bench = bench_of(copy_previous=copy).learn(0, 1)
    before = bench.state()
    e_prompt = bench.begin(2).strategy.e_prompt
    assert torch.equal(e_prompt.get(2, "prefix"), e_prompt.get(1, "prefix")) == copy
    assert e_prompt.get(2, "prefix").data_ptr() != e_prompt.get(1, "prefix").data_ptr()
    assert not torch.equal(e_prompt.get(2, "key"), e_prompt.get(1, "key"))
    assert all(".tasks.2." in name for name in bench.changed(before))


def test_isolated_tasks_train_as_if_the_others_had_never_been(bench_of):
    whole = bench_of(isolated=True).learn(0)
    g_prompt = whole.strategy.g_prompt.detach().clone()
    whole.learn(1, 2)
    assert torch.equal(whole.strategy.g_prompt, g_prompt)
    without, now = bench_of(isolated=True).learn(0, 2).state(), whole.state()
    compared = [name for name in now if ".tasks.2." in name and not name.endswith("order")]
    assert len(compared) == 5  # prefix, key, weight, bias, classes
    assert all(torch.equal(now[name], without[name]) for name in compared)


@pytest.mark.parametrize(
    "keys, g_prompt, last",
    [
        ({}, (0, 1, 2), (0, 1, 2)),
        ({"copy_previous": False}, (0, 1, 2), (0, 1, 2)),  # trained beside a G-prompt that the others had shaped
        ({"isolated": True}, (0,), (0, 2)),
        ({"isolated": True, "g_length": 0}, (0,), (2,)),
        ({"copy_previous": False, "g_length": 0}, (0, 1, 2), (2,)),
    ],
)
def test_components_name_every_task_that_shaped_them_also_after_it_is_dropped(bench_of, keys, g_prompt, last):
    strategy = bench_of(**keys).learn(0, 1, 2, epochs=1).strategy
    owners = {c.name: c.tasks for c in strategy.components()}
    assert owners["g_prompt"] == g_prompt and owners["e_prompt.tasks.2"] == last
    strategy.drop_task(1)
    after = {c.name: c.tasks for c in strategy.components()}
    assert "e_prompt.tasks.1" not in after
    if strategy.leaks:
        assert all(after[name] == owners[name] for name in after)
    else:  # nothing of the others has seen it
        assert not any(1 in tasks for tasks in after.values())


def test_a_dropped_task_is_no_longer_chosen(mixed):
    mixed.strategy.drop_task(1)
    batch = mixed.batch()
    assert set(mixed.strategy.select(batch).tolist()) == {0, 1}  # rows of the tasks 0 and 2
    assert torch.equal(mixed.strategy.select(batch.replace(task_ids=torch.full((48,), 2))), torch.ones(48).long())


@pytest.mark.parametrize("key", ["g_layers", "e_layers"])
def test_blocks_that_do_not_exist_are_refused(bench_of, key):
    with pytest.raises(UserError, match=rf"strategy\.dual_prompt\.{key}"):
        bench_of(**{key: [0, 4]})
