"""CODA-Prompt is CODA-Prompt because an image's prompt is the sum of all components, weighted by attended cosines."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.random_streams import stream
from cl_platform.strategies.coda_prompt import PARTS, component_weights, orthogonal_rows

KEYS = {"num_components": 12, "length": 4, "layers": [0, 2]}  # 4 components a task
OFF = {"length": 0}


@pytest.fixture
def bench_of(learner_of):
    def make(optimizer=None, **keys):
        return learner_of({"coda_prompt": {**KEYS, **keys}}, **(optimizer or {}))

    return make


def parts_of(bench, task_id):
    return {part: bench.strategy.bank.get(task_id, part) for part in PARTS}


def rows_of(bench, part):
    """All rows (layers, M, dim) of learnt tasks."""
    return torch.cat(bench.strategy.bank.all(part), dim=1).flatten(2).detach()


def enlarge(bench, by=20.0):
    """Prompts far from small, so that what they do is well above rounding."""
    with torch.no_grad():
        for task_id in bench.strategy.bank.task_ids:
            bench.strategy.bank.get(task_id, "prompt").mul_(by)
    return bench


def test_what_every_strategy_with_prompts_promises(prompt_promise, learner_of):
    prompt_promise(learner_of, "coda_prompt", KEYS, OFF)


# -- the sum --------------------------------------------------------------------------------------------------------


def test_an_images_prompt_is_the_sum_of_all_components_weighted_by_the_cosine_of_attended_query_and_key(bench_of):
    bench = bench_of().learn(0, 1)
    query = bench.batch().extra["query"][:5]
    found = bench.strategy.prompts(query)  # (layers, B, L, D)
    assert found.shape == (2, 5, 4, 32)
    prompt = torch.cat(bench.strategy.bank.all("prompt"), dim=1)
    key, attention = rows_of(bench, "key"), rows_of(bench, "attention")
    for layer in range(2):
        for b in range(5):
            expected = torch.zeros(4, 32)
            for m in range(8):  # the components of both tasks, and no others
                weight = F.cosine_similarity(query[b] * attention[layer, m], key[layer, m], dim=0)
                expected += weight * prompt[layer, m].detach()
            torch.testing.assert_close(found[layer, b], expected, rtol=1e-4, atol=1e-6)


def test_the_first_half_of_a_prompt_goes_to_the_keys_and_the_second_to_the_values_of_its_own_layer(bench_of):
    bench = enlarge(bench_of().learn(0))
    batch = bench.batch()
    prompts = bench.strategy.prompts(batch.extra["query"])
    vit, expected = bench.vit, []
    with torch.no_grad():
        for b in range(len(batch)):
            x = vit.embed(batch.images[b : b + 1])[0]
            for number, block in enumerate(vit.vit.blocks):
                attn, y = block.attn, block.norm1(x)
                q, k, v = (y @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, dim=1)
                if number in KEYS["layers"]:
                    own = prompts[KEYS["layers"].index(number), b]
                    k, v = torch.cat([own[:2], k]), torch.cat([own[2:], v])
                heads = []
                for h in range(attn.num_heads):
                    part = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
                    weights = (q[:, part] @ k[:, part].T / attn.head_dim**0.5).softmax(dim=1)
                    heads.append(weights @ v[:, part])
                x = x + torch.cat(heads, dim=1) @ attn.proj.weight.T + attn.proj.bias
                x = x + block.mlp(block.norm2(x))
            expected.append(vit.vit.norm(x)[0])
        expected = torch.stack(expected)
        with bench.learner.answering():
            found = bench.learner.composition.features(batch)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (found - batch.extra["query"]).abs().max() > 0.05


def test_the_weights_by_two_products_equal_those_by_the_large_one():
    draw = torch.Generator().manual_seed(0)
    query, key, attention = (torch.randn(*s, generator=draw) for s in ((7, 24), (3, 10, 24), (3, 10, 24)))
    attended = query[None, :, None] * attention[:, None]  # (layers, B, M, D)
    expected = torch.einsum("jbmd,jmd->jbm", F.normalize(attended, dim=3), F.normalize(key, dim=2))
    torch.testing.assert_close(component_weights(query, key, attention), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "attention"])
def test_weights_are_cosines_that_know_no_length(which):
    draw = torch.Generator().manual_seed(1)
    tensors = [torch.randn(*s, generator=draw) for s in ((64, 24), (2, 10, 24), (2, 10, 24))]
    before = component_weights(*tensors)
    assert before.abs().max() <= 1 + 1e-6
    assert (before < 0).any()  # neither a softmax nor a rectifier
    tensors[which] = tensors[which] * 37.0
    torch.testing.assert_close(component_weights(*tensors), before, rtol=1e-5, atol=1e-6)
    parallel = component_weights(torch.ones(1, 24), tensors[2], tensors[2])
    torch.testing.assert_close(parallel, torch.ones_like(parallel), rtol=0, atol=1e-6)


def test_a_query_of_zeros_gives_weights_of_zero_and_finite_gradients():
    key, attention = torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 4, 8, requires_grad=True)
    weights = component_weights(torch.zeros(2, 8), key, attention)
    assert not weights.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(weights.sum(), (key, attention)))


def test_prompts_are_linear_in_the_components(bench_of):
    bench = bench_of().learn(0, 1)
    query = bench.batch().extra["query"]
    once = bench.strategy.prompts(query)
    with torch.no_grad():
        for prompt in bench.strategy.bank.all("prompt"):
            prompt.mul_(3.0)
    torch.testing.assert_close(bench.strategy.prompts(query), 3.0 * once, rtol=1e-5, atol=1e-6)


def test_a_block_of_zero_components_is_no_block_but_zero_prompts_still_take_attention(bench_of):
    bench = enlarge(bench_of().learn(0, 1))
    with torch.no_grad():
        bench.strategy.bank.get(1, "prompt").zero_()
    batch = bench.batch()

    def features():
        with bench.learner.answering():
            return bench.learner.composition.features(batch)

    silent = features()
    bench.strategy.bank.drop(1)
    torch.testing.assert_close(features(), silent, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        bench.strategy.bank.get(0, "prompt").zero_()
    assert (features() - batch.extra["query"]).abs().max() > 1e-3


def test_every_tasks_components_enter_the_prompt_of_every_image(bench_of):
    bench = enlarge(bench_of().learn(0, 1))
    before = bench.logits()
    with torch.no_grad():
        bench.strategy.bank.get(1, "prompt").mul_(2.0)
    changed = (bench.logits() - before).abs().amax(dim=1)
    assert (changed > 1e-6).all()  # images of task 0 too


# -- new components -------------------------------------------------------------------------------------------------


def test_new_rows_are_orthonormal_and_orthogonal_to_old_rows_that_are_so_no_longer(bench_of):
    bench = bench_of().learn(0, 1)
    with torch.no_grad():
        for task_id in (0, 1):
            for part, tensor in parts_of(bench, task_id).items():
                tensor.add_(0.5 * torch.randn(tensor.shape, generator=stream(0, task_id, part)) * tensor.std())
    old = {part: F.normalize(rows_of(bench, part), dim=2) for part in PARTS}
    assert all((rows @ rows.mT - torch.eye(8)).abs().max() > 0.05 for rows in old.values())
    bench.begin(2)
    for part in PARTS:
        new = bench.strategy.bank.get(2, part).flatten(2).detach()
        assert new.shape[1] == 4
        assert (new @ new.mT - torch.eye(4)).abs().max() <= 1e-5
        assert (new @ old[part].mT).abs().max() <= 1e-5


def test_the_released_projection_misses_the_complement_of_trained_rows():
    old = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    unit = F.normalize(old, dim=1)
    span = orthogonal_rows(old, 4, 64, torch.Generator().manual_seed(1), "span")
    classical = orthogonal_rows(old, 4, 64, torch.Generator().manual_seed(1), "classical")
    assert (span @ unit.T).abs().max() <= 1e-6
    assert (classical @ unit.T).abs().max() > 1e-2
    rows = list(old.double())
    for v in torch.randn(4, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        taken = sum((v @ u) / (u @ u) * u for u in rows)  # every projection of the vector as it was drawn
        rows.append(v - taken)
    expected = F.normalize(torch.stack(rows[6:]), dim=1).float()
    torch.testing.assert_close(classical, expected, rtol=1e-5, atol=1e-6)


def test_layers_and_parts_are_drawn_apart_from_the_tasks_own_stream(bench_of):
    bench = bench_of().begin(0)
    key, attention = bench.strategy.bank.get(0, "key"), bench.strategy.bank.get(0, "attention")
    assert not torch.equal(key[0], key[1])
    assert not torch.equal(key, attention)
    other = bench_of().begin(1)  # a first task with another id
    assert not torch.equal(other.strategy.bank.get(1, "key"), key)


# -- training -------------------------------------------------------------------------------------------------------


def test_blocks_of_earlier_tasks_keep_their_bits_under_weight_decay(bench_of):
    bench = bench_of({"weight_decay": 0.1}).learn(0, 1)
    before = bench.state()
    bench.learn(2)
    changed = bench.changed(before)
    assert not [name for name in changed if ".tasks.0." in name or ".tasks.1." in name]
    for part in (*PARTS, "weight", "bias"):
        assert any(name.endswith(f".tasks.2.{part}") for name in changed)


def test_neither_prompt_nor_key_nor_attention_of_an_old_block_has_a_gradient_and_the_new_one_has_on_every_layer(
    bench_of,
):
    bench = bench_of().learn(0).begin(1)
    for tensor in parts_of(bench, 0).values():
        tensor.requires_grad_(True)  # even so: old rows are constants of the graph
    _, terms = bench.step()
    terms["coda_prompt/ce"].backward()
    assert all(tensor.grad is None for tensor in parts_of(bench, 0).values())
    for tensor in parts_of(bench, 1).values():
        assert tensor.grad.flatten(1).abs().amax(dim=1).gt(0).all()  # (layers,)


def test_the_loss_is_the_cross_entropy_over_the_tasks_own_classes(bench_of):
    bench = bench_of().learn(0).begin(1)
    step, terms = bench.step()
    assert step.seen_classes == [0, 1, 2, 3]
    assert set(terms) == {"coda_prompt/ce"}
    masked = step.logits.clone()
    masked[:, :2] = float("-inf")
    assert torch.equal(terms["coda_prompt/ce"], F.cross_entropy(masked, step.batch.labels))
    assert not torch.equal(terms["coda_prompt/ce"], F.cross_entropy(step.logits, step.batch.labels))


def test_the_prompted_features_and_not_the_query_are_classified(bench_of):
    bench = enlarge(bench_of().learn(0)).begin(1)
    step, _ = bench.step()
    assert torch.equal(step.logits, bench.learner.head(step.features))
    assert (step.features - step.batch.extra["query"]).abs().max() > 1e-3


def test_a_task_beyond_those_planned_leaves_the_rows_before_it(bench_of):
    bench = bench_of(num_components=None, components_per_task=2).learn(0, 1)
    before, later = bench.state(), dataclasses.replace(bench.stream.tasks[2], task_id=9)
    bench.stream = dataclasses.replace(bench.stream, tasks=(*bench.stream.tasks[:2], later))
    bench.learn(9)
    assert bench.strategy.bank.task_ids == [0, 1, 9]
    assert bench.strategy.bank.get(9, "key").shape == (2, 2, 32)
    assert not [name for name in bench.changed(before) if ".tasks.9." not in name]


def test_the_order_in_which_tasks_came_is_not_needed_to_answer(bench_of):
    bench = bench_of().learn(2, 0)  # the trained block stands first among the rows
    other = bench_of()
    other.learner.load_state_dict(bench.learner.state_dict())
    assert torch.equal(other.logits(), bench.logits())


# -- the orthogonality penalty --------------------------------------------------------------------------------------


def test_without_a_weight_there_is_no_penalty_in_the_graph_and_none_is_computed(bench_of, monkeypatch):
    bench = bench_of(mu=0.0).begin(0)
    monkeypatch.setattr(bench.strategy, "penalty", lambda: pytest.fail("it was computed"))
    _, terms = bench.step()
    assert set(terms) == {"coda_prompt/ce"}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_penalty_of_orthonormal_rows_is_nothing_in_any_precision(learner_of, precision):
    bench = learner_of({"coda_prompt": {**KEYS, "mu": 1.0}}, precision=precision).begin(0)
    with bench.learner.precision_context():
        assert bench.strategy.penalty().item() < 1e-10


def test_the_penalty_is_the_mean_squared_gap_to_the_identity_summed_over_layers_and_parts(bench_of):
    bench = bench_of(mu=0.5).learn(0).begin(1)
    enlarge(bench, 3.0)
    expected = 0.0
    for part in PARTS:
        for rows in rows_of(bench, part):
            gap = rows @ rows.T - torch.eye(8)
            expected += float((gap**2).sum()) / 64
    _, terms = bench.step()
    assert terms["coda_prompt/ortho"].item() == pytest.approx(0.5 * expected, rel=1e-4)


def test_the_penalty_alone_pulls_new_rows_towards_orthogonality_and_leaves_old_ones(bench_of):
    bench = bench_of(mu=1.0).learn(0).begin(1)
    with torch.no_grad():
        for part, tensor in parts_of(bench, 1).items():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=stream(0, 0, part)) * tensor.std() + 0.05)
    before = bench.strategy.penalty().item()
    new = list(parts_of(bench, 1).values())
    for tensor in parts_of(bench, 0).values():
        tensor.requires_grad_(True)
    gradients = torch.autograd.grad(bench.strategy.penalty(), new)
    with torch.no_grad():
        for tensor, gradient in zip(new, gradients, strict=True):
            tensor.sub_(0.05 * gradient)
    assert bench.strategy.penalty().item() < before
    bench.learner.zero_grad()
    bench.strategy.penalty().backward()
    assert all(tensor.grad is None for tensor in parts_of(bench, 0).values())


# -- half precision, refusals ---------------------------------------------------------------------------------------


def test_weights_and_prompts_stay_in_float32_under_autocast(learner_of):
    bench = learner_of({"coda_prompt": KEYS}, precision="bf16-mixed").learn(0)
    query = bench.batch().extra["query"]
    with bench.learner.precision_context():
        inside = bench.strategy.prompts(query)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, bench.strategy.prompts(query))


@pytest.mark.parametrize(
    "keys, key, words",
    [
        ({"num_components": 10}, "num_components", ("9", "12", "components_per_task")),
        ({"num_components": 2}, "num_components", ("3",)),
        ({"num_components": None}, "num_components", ("components_per_task",)),
        ({"num_components": 33}, "num_components", ("32",)),
        ({"num_components": None, "components_per_task": 11}, "components_per_task", ("32",)),
        ({"length": 3}, "length", ("even",)),
        ({"layers": [0, 4]}, "layers", ("0 to 3",)),
        ({"layers": [1, 1]}, "layers", ("different",)),
        ({"layers": []}, "layers", ("length=0",)),
        ({"mu": -1.0}, "mu", ("0",)),
        ({"ortho_init": "qr"}, "ortho_init", ("span",)),
    ],
)
def test_keys_that_cannot_work_are_refused_before_any_data_are_read(bench_of, keys, key, words):
    with pytest.raises(UserError) as refusal:
        bench_of(**keys)
    assert refusal.value.key == f"strategy.coda_prompt.{key}"
    assert all(word in str(refusal.value) for word in words)
