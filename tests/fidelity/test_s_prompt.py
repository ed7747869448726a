"""S-Prompts is S-Prompts because tasks share nothing: own prompt, own head, chosen by k-means of frozen features."""

import pytest
import torch

from cl_platform.random_streams import stream
from cl_platform.strategies.routing import ELSEWHERE

KEYS = {"length": 4, "clusters": 3}


@pytest.fixture
def bench_of(learner_of):
    return lambda stream=None, vit=None, **keys: learner_of({"s_prompt": {**KEYS, **keys}}, stream=stream, vit=vit)


def own(bench):
    return {name: t for name, t in bench.state().items() if "members.s_prompt" in name}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_strategies_with_parts_of_their_own_promise(adapter_promise, learner_of):
    adapter_promise(learner_of, "s_prompt", KEYS, None)


def test_without_prompts_it_is_the_plain_trunk(bench_of):
    bench = bench_of(length=0).begin(0)
    with bench.learner.answering():
        assert torch.equal(bench.strategy(bench.batch()), bench.vit(bench.batch().images))


def test_a_prompt_starts_uniform_from_its_tasks_stream(bench_of):
    bench = bench_of().learn(0).begin(1)
    drawn = torch.rand(4, 32, generator=stream(0, 1, "s_prompt_init"))
    assert torch.equal(bench.strategy.bank.get(1, "prompt"), (2 * drawn - 1) / 32**0.5)


def test_prompts_enter_behind_the_class_token_without_positions_and_the_class_token_is_read(bench_of):
    bench = bench_of().learn(0)
    batch, vit = bench.batch(), bench.vit.vit
    with bench.learner.answering():
        tokens = vit._pos_embed(vit.patch_embed(batch.images))
        prompt = bench.strategy.bank.get(0, "prompt").expand(len(batch), -1, -1)
        tokens = torch.cat([tokens[:, :1], prompt, tokens[:, 1:]], dim=1)
        expected = vit.norm(vit.blocks(tokens))[:, 0]
        torch.testing.assert_close(bench.strategy(batch), expected, rtol=1e-5, atol=1e-6)


def test_a_trunk_that_pools_patches_leaves_the_prompts_out(bench_of):
    bench = bench_of(vit={"global_pool": "avg", "class_token": False}).learn(0)
    batch, vit = bench.batch(), bench.vit.vit
    with bench.learner.answering():
        prompt = bench.strategy.bank.get(0, "prompt").expand(len(batch), -1, -1)
        tokens = torch.cat([prompt, vit._pos_embed(vit.patch_embed(batch.images))], dim=1)
        expected = vit.fc_norm(vit.norm(vit.blocks(tokens))[:, 4:].mean(1))
        torch.testing.assert_close(bench.strategy(batch), expected, rtol=1e-5, atol=1e-6)


def test_a_task_trains_its_own_prompt_and_head_alone(bench_of):
    bench = bench_of().learn(0).begin(1)
    _, terms = bench.step()
    sum(terms.values()).backward()
    for slots in (bench.strategy.bank, bench.strategy.heads):
        assert all(p.grad is None for p in slots.parameters_of(0).values())
        assert all(p.grad.any() for p in slots.parameters_of(1).values())


@pytest.mark.parametrize("setting", ["class", "domain"])
@pytest.mark.parametrize("dropped", [0, 1, 2], ids=["first", "middle", "last"])
def test_dropping_a_task_leaves_the_bytes_of_a_learner_that_never_saw_it(bench_of, setting, dropped):
    bench = bench_of({"setting": setting}).learn(0, 1, 2)
    bench.strategy.drop_task(dropped)
    never = bench_of({"setting": setting}).learn(*(t for t in range(3) if t != dropped))
    assert equal(own(bench), own(never))
    assert torch.equal(bench.logits(), never.logits())


def test_a_new_task_moves_images_only_to_itself(bench_of):
    bench = bench_of().learn(0, 1)
    before = bench.strategy.route(bench.batch())
    after = bench.learn(2).strategy.route(bench.batch())
    moved = before != after
    assert moved.any() and not moved.all()
    assert (after[moved] == 2).all()


def test_an_image_at_a_centre_goes_there(bench_of):
    bench = bench_of(clusters=16).learn(0, 1, 2)  # as many centres as images: each is one
    for place, task in enumerate(bench.stream.tasks):
        assert (bench.strategy.route(bench.batch(images=task.train.images(slice(None)))) == place).all()


def test_centres_are_fitted_on_one_task_at_a_time(bench_of):
    together, alone = bench_of().learn(0, 1, 2).strategy, bench_of().learn(1).strategy
    assert torch.equal(together.router.get(1, "centroids"), alone.router.get(1, "centroids"))
    assert together.inspect()["centroids"] == {"0": 3, "1": 3, "2": 3}


def test_the_answer_is_a_class_of_the_task_routed_to(bench_of):
    bench = bench_of().learn(0, 1, 2)
    rows = bench.strategy.route(bench.batch())
    assert torch.equal(bench.logits().argmax(1) // 2, rows)
    low = bench.logits().amax(1, keepdim=True) + ELSEWHERE
    assert ((bench.logits() <= low).sum(1) == 4).all()


def test_the_released_distance_is_another_one(bench_of):
    bench = bench_of(metric="l1").learn(0, 1, 2)
    batch, centroids = bench.batch(), bench.strategy.router.all("centroids")
    query = torch.nn.functional.normalize(batch.extra["query"].double(), dim=1)
    distances = torch.stack([(query[:, None] - own).abs().sum(2).amin(1) for own in centroids], dim=1)
    assert torch.equal(bench.strategy.route(batch), distances.argmin(1))
