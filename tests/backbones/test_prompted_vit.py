"""The runner of prompted vision transformers: timm's bits without extras, the right sums with them."""

import math

import pytest
import torch
from small_vits import VARIANTS, draw, small_vit
from torch import nn

from cl_platform.backbones import BlockExtras, PromptedViT, refuse_prompts, supports_prompts
from cl_platform.backbones.prefix import attend, feed_forward, run_block
from cl_platform.errors import UserError


@pytest.fixture
def images():
    return draw(3, 3, 32, 32)


def prefixes(vit, length=3, batch=1, seed=5, dtype=torch.float32):
    return draw(batch, length, vit.attention_width, seed=seed, dtype=dtype), draw(
        batch, length, vit.attention_width, seed=seed + 1, dtype=dtype
    )


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_extras_every_bit_is_timms(variant, fused, grad, images):
    model = small_vit(variant, fused)
    vit = PromptedViT(model, 32)
    with torch.set_grad_enabled(grad):
        expected = model.forward_features(images)
        pooled = model.forward_head(expected, pre_logits=True)
        tokens = vit.finish(vit.run(vit.embed(images)))
        assert torch.equal(tokens, expected)
        assert torch.equal(vit.readout(tokens), pooled)
        assert torch.equal(vit(images), pooled)
        halves = vit.run(vit.run(vit.embed(images), stop=1), start=1)
        assert torch.equal(vit.finish(halves), expected)
        assert pooled.shape == (3, vit.feature_dim)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attend_without_extras_equals_timms_attention(variant, fused):
    attn = small_vit(variant, fused).blocks[0].attn
    x = draw(2, 7, 32)
    assert torch.equal(attend(attn, x), attn(x))
    empty = torch.zeros(1, 0, 32)
    assert torch.equal(attend(attn, x, (empty, empty)), attn(x))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_prompts_are_no_prompts(variant, fused, images):
    vit = PromptedViT(small_vit(variant, fused), 32)
    none = torch.zeros(1, 0, vit.width)
    extras = {i: BlockExtras(tokens=none, kv=(none, none), delta={}) for i in range(vit.depth)}
    assert torch.equal(vit.readout(vit.finish(vit.run(vit.embed(images), extras=extras))), vit.features(images))


@pytest.mark.parametrize("variant", ["plain", "qk_norm", "scale_attn_norm"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "explicit"])
def test_attend_equals_a_softmax_written_out(variant, fused):
    vit = PromptedViT(small_vit(variant, fused), 32)
    attn = vit.vit.blocks[0].attn
    x, (pk, pv) = draw(2, 5, 32), prefixes(vit, batch=2)
    out = torch.zeros(2, 5, 32)
    attn.requires_grad_(False)
    q, k, v = attn.qkv(x).reshape(2, 5, 3, 4, 8).unbind(2)
    q, k = attn.q_norm(q), attn.k_norm(k)
    for b in range(2):
        for h in range(4):
            rows = slice(8 * h, 8 * h + 8)
            keys = [*pk[b, :, rows], *k[b, :, h]]
            values = [*pv[b, :, rows], *v[b, :, h]]
            for n in range(5):
                scores = [math.exp(float(q[b, n, h] @ key) / math.sqrt(8)) for key in keys]
                out[b, n, rows] = sum(s / sum(scores) * value for s, value in zip(scores, values, strict=True))
    torch.testing.assert_close(attend(attn, x, (pk, pv)), attn.proj(attn.norm(out)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "qk_norm", "res_post"])
def test_gradients_of_prefixes_and_tokens_equal_finite_differences(variant):
    vit = PromptedViT(small_vit(variant, double=True), 32)
    vit.freeze()
    image = draw(1, 3, 32, 32, dtype=torch.float64)
    kv = [p.requires_grad_() for p in prefixes(vit, 2, dtype=torch.float64)]
    tokens = draw(1, 1, 32, seed=8, dtype=torch.float64).requires_grad_()

    def features(key, value, token):
        extras = {0: BlockExtras(tokens=token), 1: BlockExtras(kv=(key, value))}
        return vit.readout(vit.finish(vit.run(vit.embed(image), extras=extras)), n_prompt=1)[:, :4]

    assert torch.autograd.gradcheck(features, (*kv, tokens), atol=1e-6, rtol=1e-4, fast_mode=True)
    assert all(p.grad is None for p in vit.parameters())


def test_prefixes_of_each_sample_stay_its_own(images):
    vit = PromptedViT(small_vit(), 32)
    pk, pv = prefixes(vit, batch=3)
    prompts = draw(3, 2, 32, seed=9)

    def features(rows):
        extras = {0: BlockExtras(prompts[rows], (pk[rows], pv[rows])), 1: BlockExtras(kv=(pk[rows], pv[rows]))}
        return vit.readout(vit.finish(vit.run(vit.embed(images[rows]), extras=extras)), 2)

    together = features(slice(0, 3))
    alone = torch.cat([features(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_one_shared_prefix_equals_the_same_prefix_for_each_sample(images):
    vit = PromptedViT(small_vit(), 32)
    pk, pv = prefixes(vit)
    shared = vit.run(vit.embed(images), extras={1: BlockExtras(kv=(pk, pv))})
    repeated = vit.run(vit.embed(images), extras={1: BlockExtras(kv=(pk.repeat(3, 1, 1), pv.repeat(3, 1, 1)))})
    assert torch.equal(shared, repeated)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_is_timms_and_loads_after_prompts_ran(variant, images):
    model = small_vit(variant)
    keys, digest = list(model.state_dict()), PromptedViT(model, 32).digest()
    vit = PromptedViT(model, 32)
    vit.run(vit.embed(images), extras={0: BlockExtras(draw(1, 2, 32), prefixes(vit))})
    assert list(vit.model.state_dict()) == keys
    assert vit.digest() == digest
    vit.model.load_state_dict(small_vit(variant, seed=3).state_dict(), strict=True)
    assert vit.digest() != digest


@pytest.mark.parametrize("variant", VARIANTS)
def test_pooled_features_do_not_read_prompt_tokens(variant, images):
    vit = PromptedViT(small_vit(variant), 32)
    tokens = vit.finish(vit.embed(images)).contiguous()  # a mean's last bits depend on the layout in memory
    first = vit.num_prefix_tokens
    junk = 100 * draw(3, 4, 32, seed=3)
    mixed = torch.cat((tokens[:, :first], junk, tokens[:, first:]), dim=1)
    assert torch.equal(vit.readout(mixed, 4), vit.readout(tokens))
    assert torch.equal(vit.readout(mixed, 4, "gap"), vit.readout(tokens, 0, "gap"))


def test_the_readout_of_prompts_reads_them_alone():
    vit = PromptedViT(small_vit(), 32)
    tokens, other = draw(2, 20, 32), draw(2, 20, 32, seed=2)
    other[:, 1:4] = tokens[:, 1:4]
    assert torch.equal(vit.readout(tokens, 3, "prompt"), vit.readout(other, 3, "prompt"))
    assert torch.equal(vit.readout(tokens, 3, "prompt"), tokens[:, 1:4].mean(1))
    assert torch.equal(vit.readout(tokens, 3, "token+prompt"), tokens[:, 0:4].mean(1))
    assert torch.equal(vit.readout(tokens, 3, "token"), tokens[:, 0])


def test_readouts_that_cannot_be_are_refused():
    vit = PromptedViT(small_vit("avg_pool"), 32)
    tokens = draw(1, 16, 32)
    for n_prompt, kind in ((0, "prompt"), (2, "token"), (0, "cls")):
        with pytest.raises(ValueError, match=r"readout"):
            vit.readout(tokens, n_prompt, kind)


def test_prompt_tokens_queue_up_behind_the_prefix_tokens(images):
    vit = PromptedViT(small_vit("layer_scale_reg"), 32)
    for block in vit.vit.blocks:  # with these at zero each block is the identity
        block.ls1.gamma.data.zero_()
        block.ls2.gamma.data.zero_()
    first, second = draw(1, 2, 32, seed=2), draw(3, 1, 32, seed=3)
    tokens = vit.embed(images)
    out = vit.run(tokens, extras={0: BlockExtras(first), 1: BlockExtras(second)})
    assert torch.equal(out, torch.cat((tokens[:, :5], first.expand(3, -1, -1), second, tokens[:, 5:]), 1))
    halves = vit.run(vit.run(tokens, stop=1, extras={0: BlockExtras(first)}), 1, None, {1: BlockExtras(second)}, 2)
    assert torch.equal(halves, out)


@pytest.mark.parametrize("variant", ["plain", "qk_norm", "layer_scale_reg", "res_post"])
def test_a_delta_that_gives_zero_changes_no_bit(variant, images):
    vit = PromptedViT(small_vit(variant), 32)
    widths = {"qkv": 96, "proj": 32, "fc1": 128, "fc2": 32}
    zero = {site: (lambda x, w=w: x.new_zeros(*x.shape[:2], w)) for site, w in widths.items()}
    extras = {i: BlockExtras(delta=zero) for i in range(2)}
    assert torch.equal(vit.run(vit.embed(images), extras=extras), vit.run(vit.embed(images)))


def test_deltas_equal_merged_weights(images):
    vit = PromptedViT(small_vit(), 32)
    merged = small_vit()
    block = merged.blocks[1]
    sites = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
    added = {site: 0.1 * draw(*linear.weight.shape, seed=4) for site, linear in sites.items()}
    for site, linear in sites.items():
        linear.weight.data += added[site]
    delta = {site: (lambda x, w=w: nn.functional.linear(x, w)) for site, w in added.items()}
    out = vit.run(vit.embed(images), extras={1: BlockExtras(delta=delta)})
    torch.testing.assert_close(vit.finish(out), merged.forward_features(images), rtol=1e-4, atol=1e-5)


def test_a_delta_at_an_unknown_site_is_refused(images):
    vit = PromptedViT(small_vit(), 32)
    with pytest.raises(ValueError, match="unknown sites"):
        vit.run(vit.embed(images), extras={0: BlockExtras(delta={"query": lambda x: x})})


def test_a_delta_inside_another_mlp_is_refused_by_name():
    from timm.layers import SwiGLU

    mlp = SwiGLU(32, 64)
    with pytest.raises(UserError, match="SwiGLU"):
        feed_forward(mlp, draw(1, 2, 32), {"fc1": lambda x: x})


def test_checkpointed_blocks_give_the_same_gradients(images):
    model = small_vit()
    vit = PromptedViT(model, 32)
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        kv = tuple(p.requires_grad_() for p in prefixes(vit))
        vit.run(vit.embed(images), extras={1: BlockExtras(kv=kv)}).square().sum().backward()
        gradients.append(kv[0].grad)
    assert torch.equal(*gradients)


def test_prefixes_work_under_bfloat16_autocast(images):
    vit = PromptedViT(small_vit(), 32)
    extras = {0: BlockExtras(draw(1, 2, 32), prefixes(vit))}
    with torch.autocast("cpu", torch.bfloat16):
        low = vit.run(vit.embed(images), extras=extras)
    full = vit.run(vit.embed(images), extras=extras)
    torch.testing.assert_close(low.float(), full, rtol=0.1, atol=0.1)


def test_the_digest_of_a_prefix_sees_only_the_weights_before_it():
    vit = PromptedViT(small_vit(), 32)
    before = [vit.prefix_digest(stop) for stop in (0, 1, 2)]
    vit.vit.blocks[1].mlp.fc1.weight.data[0, 0] += 1
    after = [vit.prefix_digest(stop) for stop in (0, 1, 2)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False]


@pytest.mark.parametrize("variant", VARIANTS)
def test_supported_models_take_prompts(variant):
    assert supports_prompts(small_vit(variant)) is None


def _unsupported():
    import timm
    from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, VisionTransformer

    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}

    class Mine(VisionTransformer):
        pass

    yield "ParallelThingsBlock", VisionTransformer(**small, block_fn=ParallelThingsBlock)
    yield "ParallelScalingBlock", VisionTransformer(**small, block_fn=ParallelScalingBlock)
    yield "DiffAttention", VisionTransformer(**small, attn_layer="diff")
    yield "Mine", Mine(**small)
    yield "Eva", timm.models.eva.Eva(**small)
    yield "Beit", timm.models.beit.Beit(**small)
    yield "VisionTransformerRelPos", timm.models.vision_transformer_relpos.VisionTransformerRelPos(**small)
    yield (
        "VisionTransformerSAM",
        timm.models.vision_transformer_sam.VisionTransformerSAM(
            img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0
        ),
    )
    yield "Sequential", nn.Sequential(nn.Flatten())


def test_unsupported_models_are_refused_by_name():
    for name, model in _unsupported():
        reason = supports_prompts(model)
        assert reason is not None and name in reason
        with pytest.raises(TypeError, match=name):
            PromptedViT(model, 32)
        message = str(refuse_prompts(model, "coda_prompt"))
        assert name in message and "strategy=coda_prompt" in message and "backbone=vit_nano" in message


def test_a_block_without_extras_is_timms_own_call():
    block = small_vit().blocks[0]
    calls = []
    block.register_forward_hook(lambda *_: calls.append(1))
    run_block(block, draw(1, 3, 32), BlockExtras(tokens=draw(1, 1, 32)))
    assert calls == [1]
