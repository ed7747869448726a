"""Low-rank adapters: where they act, one for each image, merged and put back."""

import dataclasses
import math

import pytest
import torch
from tiny import config_of, digits
from torch import nn
from torch.nn import functional as F

from cl_platform.backbones import BackboneConfig, PromptedViT
from cl_platform.backbones import lora as module
from cl_platform.backbones.lora import TARGETS, LoRALayout, Merge, layout_of, low_rank, merged_weight
from cl_platform.backbones.nano import nano_model
from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, seeded_globals, stream
from cl_platform.run import build_learner


def vit(**changes):
    with seeded_globals(0, RUN_LEVEL, "small"):
        model = nano_model(16, **{"embed_dim": 32, "depth": 4, "num_heads": 2, **changes})
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return PromptedViT(model.eval(), 16)


def layout(trunk=None, targets=TARGETS, blocks="all", rank=3, scale=2.0):
    return layout_of(trunk or vit(), targets, blocks, rank, scale, "strategy.x")


def adapters(of, *seeds):
    """Factors with both parts away from zero; of several seeds stacked."""
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        found.append({n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in of.first(0, 0).items()})
    return found[0] if len(found) == 1 else {n: torch.stack([f[n] for f in found]) for n in found[0]}


def images(count=5):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def run(of, factors, batch, rows=None, dense=None):
    trunk = of.vit
    with torch.no_grad():
        return trunk.readout(trunk.finish(trunk.run(trunk.embed(batch), extras=of.extras(factors, rows, dense))))


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("proj",), ("fc1", "fc2"), TARGETS])
def test_a_new_adapter_changes_no_bit(targets):
    of = layout(targets=targets)
    batch = images()
    with torch.no_grad():
        assert torch.equal(run(of, of.first(0, 3), batch), of.vit(batch))


@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_is_a_change_of_its_layers_weight(target):
    of = layout(targets=(target,), blocks=[1, 3])
    factors, batch = adapters(of, 1), images()
    plain, adapted = vit(), run(of, factors, batch)
    width = 32
    for index, block in enumerate((1, 3)):
        weight = {
            "proj": plain.vit.blocks[block].attn.proj,
            "fc1": plain.vit.blocks[block].mlp.fc1,
            "fc2": plain.vit.blocks[block].mlp.fc2,
        }.get(target, plain.vit.blocks[block].attn.qkv).weight.data
        if target in ("q", "k", "v"):
            start = width * ["q", "k", "v"].index(target)
            weight = weight[start : start + width]
        weight += 2.0 * factors[f"B_{target}"][index] @ factors[f"A_{target}"][index]
    with torch.no_grad():
        torch.testing.assert_close(adapted, plain(batch), rtol=1e-4, atol=1e-5)
    assert (adapted - run(of, of.first(0, 0), batch)).abs().max() > 1e-3


def test_first_factors_are_those_of_the_reference_implementation_keyed_by_their_place():
    first = layout().first(7, 4)
    assert first["A_fc2"].shape == (4, 3, 128)
    assert first["B_fc1"].shape == (4, 128, 3)
    assert not any(tensor.any() for name, tensor in first.items() if name.startswith("B"))
    drawn = torch.rand(3, 32, generator=stream(7, 4, "lora/2/v"))
    assert torch.equal(first["A_v"][2], (2 * drawn - 1) / math.sqrt(32))
    reference = torch.empty(3000, 32)
    nn.init.kaiming_uniform_(reference, a=math.sqrt(5))
    assert float(reference.abs().max()) == pytest.approx(1 / math.sqrt(32), rel=0.01)
    alone = layout(targets=("v",), blocks=[2]).first(7, 4)["A_v"][0]
    assert torch.equal(alone, first["A_v"][2])  # whatever else has an adapter


# -- one adapter for each image ---------------------------------------------------------------------------------------


def parts(k=1, batch=9, count=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 5, 32, generator=generator)
    down = torch.randn(count, 6, 32, generator=generator)
    ups = [torch.randn(count, 48, 2, generator=generator), torch.randn(count, 32, 4, generator=generator)]
    rows = torch.randint(0, count, (batch, k), generator=generator)
    return x, down, ups, rows


@pytest.mark.parametrize("k", [1, 3])
def test_gathered_adapters_equal_a_loop_over_images(k):
    x, down, ups, rows = parts(k)
    found = low_rank(x, down, ups, 0.5, rows)
    for image, chosen in enumerate(rows):
        starts = (0, 2)
        for result, up, start in zip(found, ups, starts, strict=True):
            rank = up.shape[-1]
            delta = sum(up[t] @ down[t, start : start + rank] for t in chosen)
            torch.testing.assert_close(result[image], 0.5 * x[image] @ delta.T, rtol=1e-4, atol=1e-4)


def test_an_images_bits_depend_neither_on_batch_mates_nor_on_other_adapters(monkeypatch):
    x, down, ups, rows = parts()
    whole = low_rank(x, down, ups, 1.0, rows)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    shuffled = low_rank(x[order], down, ups, 1.0, rows[order])
    more = low_rank(x, torch.cat([down, down]), [torch.cat([up, up]) for up in ups], 1.0, rows + len(down))
    for i in range(2):
        assert torch.equal(shuffled[i], whole[i][order])
        assert torch.equal(more[i], whole[i])
        alone = [low_rank(x[b : b + 1], down, ups, 1.0, rows[b : b + 1])[i][0] for b in range(len(x))]
        assert torch.equal(torch.stack(alone), whole[i])
    monkeypatch.setattr(module, "GATHER_BYTES", 2 * 4 * (6 * 32 + 48 * 2 + 32 * 4))
    assert all(torch.equal(a, b) for a, b in zip(low_rank(x, down, ups, 1.0, rows), whole, strict=True))


def test_no_more_is_gathered_at_once_than_the_bound(monkeypatch):
    x, down, ups, rows = parts(k=2)
    monkeypatch.setattr(module, "GATHER_BYTES", 3 * 2 * 4 * (6 * 32 + 48 * 2 + 32 * 4))
    real, sizes = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda a, b: sizes.append(len(a)) or real(a, b))
    low_rank(x, down, ups, 1.0, rows)
    assert max(sizes) == 3


def test_images_run_through_the_trunk_with_their_own_adapters():
    of, batch = layout(targets=("q", "v", "fc1")), images(6)
    stacked = adapters(of, 1, 2, 3)
    rows = torch.tensor([2, 0, 1, 1, 0, 2])
    together = run(of, stacked, batch, rows[:, None])
    for t in range(3):
        alone = run(of, {n: f[t] for n, f in stacked.items()}, batch)
        torch.testing.assert_close(together[rows == t], alone[rows == t], rtol=1e-4, atol=1e-5)


def test_the_work_does_not_loop_over_images(monkeypatch):
    of, calls, real = layout(targets=("q", "v")), [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: calls.append(1) or real(a, b))
    run(of, adapters(of, 1, 2), images(40), torch.zeros(40, 1, dtype=torch.int64))
    assert len(calls) == 4 * 3  # blocks times one product down and two up


# -- merging ----------------------------------------------------------------------------------------------------------


def test_a_small_merge_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]])
    up, down = torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0.5, -1.0]])
    merged = merged_weight(weight, down, up, scale=2.0)
    assert merged.tolist() == [[2.0, 0.0], [3.0, 4.0], [2.0, -5.0]]
    x = torch.tensor([[[1.0, 1.0]]])
    assert F.linear(x, merged).flatten().tolist() == [2.0, 7.0, -3.0]
    assert (F.linear(x, weight) + low_rank(x, down, [up], 2.0)[0]).flatten().tolist() == [2.0, 7.0, -3.0]
    assert weight.tolist() == [[1.0, 2.0], [3.0, 4.0], [0.0, -1.0]]


def test_a_merged_trunk_answers_as_one_with_adapters_and_gets_its_own_bytes_back():
    of, batch = layout(), images()
    factors = adapters(of, 1)
    dense = {t: 0.05 * torch.randn(4, *reversed(of.widths(t))) for t in of.targets}
    weights = list(of.vit.parameters())
    digest, adapted = of.vit.digest(), run(of, factors, batch, dense=dense)
    for _ in range(3):
        with Merge(of, factors, dense), torch.no_grad():
            merged = of.vit(batch)
            assert of.vit.digest() != digest
        assert (merged - adapted).norm() <= 1e-5 * adapted.norm()
        assert of.vit.digest() == digest
        assert all(a is b for a, b in zip(of.vit.parameters(), weights, strict=True))


def test_subtracting_what_was_added_would_not_give_the_bytes_back():
    """The negative control of the test above."""
    weight, delta = torch.randn(64, 64), torch.randn(64, 4) @ torch.randn(4, 64)
    assert not torch.equal((weight + delta) - delta, weight)


def test_weights_of_half_precision_are_merged_only_by_force():
    of = layout(targets=("q", "proj"))
    of.vit.to(torch.bfloat16)
    digest, factors = of.vit.digest(), adapters(of, 1)
    with pytest.raises(UserError, match="merge=bfloat16"):
        Merge(of, factors)
    assert of.vit.digest() == digest
    merge = Merge(of, factors, force=True)
    assert of.vit.digest() != digest
    merge.undo()
    assert of.vit.digest() == digest


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_the_share_that_an_adapter_trains():
    nano = PromptedViT(nano_model(), 32)
    of = layout_of(nano, ["q", "v"], "all", 8, 1.0, "x")
    assert of.numbers == 36_864 == sum(t.numel() for t in of.first(0, 0).values())
    assert of.share(of.numbers) == 36_864 / sum(p.numel() for p in nano.parameters())
    large = dataclasses.replace(of, blocks=tuple(range(12)), targets=("q", "v"))
    assert large.numbers == 2 * 36_864


def test_targets_and_blocks_stand_in_order_whatever_was_typed():
    of = layout(targets=("v", "q"), blocks=[3, 0])
    assert (of.targets, of.blocks) == (("q", "v"), (0, 3))
    assert isinstance(of, LoRALayout)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": ["q", "x"]}, r"strategy\.x\.targets=\[q,x\]: must be different names among q, k"),
        ({"targets": []}, r"strategy\.x\.targets=\[\]"),
        ({"targets": ["q", "q"]}, r"strategy\.x\.targets"),
        ({"blocks": [0, 4]}, r"strategy\.x\.blocks=\[0,4\]: must be all, or different block numbers from 0 to 3"),
        ({"blocks": []}, r"strategy\.x\.blocks"),
        ({"blocks": "some"}, r"strategy\.x\.blocks=some"),
    ],
)
def test_what_is_not_there_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        layout(**keys)


def test_another_mlp_takes_no_adapters():
    from timm.layers import SwiGLU

    trunk = vit(mlp_layer=SwiGLU)
    assert layout(trunk, targets=("q", "proj")).targets == ("q", "proj")
    with pytest.raises(UserError, match="SwiGLU takes no adapters"):
        layout(trunk, targets=("fc1",))


@pytest.mark.parametrize("backbone", ["resnet18_slim", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("name", ["inflora", "l2p_lora", "lora", "olora", "online_lora", "s_lora"])
def test_strategies_with_adapters_are_refused_by_name_on_a_convolutional_network(name, backbone):
    config = config_of(name)
    kind = {"kind": "timm", "name": backbone, "pretrained": False} if "lite0" in backbone else {"kind": backbone}
    with pytest.raises(UserError) as caught:
        build_learner(dataclasses.replace(config, backbone=BackboneConfig(**kind)), digits())
    assert str(caught.value).startswith(f"strategy={name}: needs a vision transformer")
