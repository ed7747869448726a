"""Weights from files: strict, in the layouts that people have, and never by running what the file holds."""

import argparse
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_vits import small_vit
from torch import nn

from cl_platform.backbones import weights_digest
from cl_platform.backbones.loading import load_weights, smoke_check
from cl_platform.backbones.nano import PACKED_WEIGHTS
from cl_platform.errors import UserError


class RunsAProgram:
    def __reduce__(self):
        return os.system, ("touch /tmp/a_pickle_ran",)


def refusal(path, model=None, **keys):
    with pytest.raises(UserError) as caught:
        load_weights(model or small_vit(), path, **keys)
    return str(caught.value)


@pytest.fixture
def source():
    return small_vit(seed=7)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".tar"])
def test_a_file_fills_every_weight(tmp_path, source, suffix):
    path = tmp_path / f"w{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    model = small_vit()
    load_weights(model, path)
    assert weights_digest(model) == weights_digest(source)


@pytest.mark.parametrize("entry", ["state_dict_ema", "model_ema", "state_dict", "model"])
def test_weights_are_found_in_the_usual_entries(tmp_path, source, entry):
    path = tmp_path / "w.pth"
    torch.save({entry: source.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    model = small_vit()
    load_weights(model, path)
    assert weights_digest(model) == weights_digest(source)


def test_other_entries_and_prefixes_are_mapped(tmp_path, source):
    trunk = {f"module.base_encoder.{k}": v for k, v in source.state_dict().items()}
    extra = {"module.base_encoder.head.0.weight": torch.zeros(2), "module.momentum_encoder.norm.bias": torch.ones(2)}
    path = tmp_path / "w.pth"
    torch.save({"nets": {"teacher": trunk | extra}}, path)
    model = small_vit()
    load_weights(model, path, prefix="module.base_encoder.", container="nets.teacher")
    assert weights_digest(model) == weights_digest(source)
    assert "no such entry" in refusal(path, container="nets.student")
    assert "begins so" in refusal(path, container="nets.teacher", prefix="backbone.")
    assert "backbone.container" in refusal(path)


def test_heads_and_mask_tokens_of_the_file_are_left_out(tmp_path, source):
    state = source.state_dict() | {"head.weight": torch.zeros(5, 32), "head_dist.bias": torch.zeros(5)}
    state |= {"attn_pool.latent": torch.zeros(1), "masked_embed": torch.zeros(1, 32)}
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    model = small_vit()
    load_weights(model, path)
    assert weights_digest(model) == weights_digest(source)


def test_half_precision_is_cast_to_the_models_type(tmp_path, source):
    path = tmp_path / "w.safetensors"
    save_file({k: v.half() for k, v in source.state_dict().items()}, path)
    model = small_vit()
    load_weights(model, path)
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight, source.norm.weight.half().float())


def test_positions_are_resampled_to_the_models_grid(tmp_path, source):
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    model = small_vit(img_size=64)
    load_weights(model, path)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])


def test_layer_scales_named_gamma_are_renamed(tmp_path):
    source, model = small_vit("layer_scale_reg", seed=7), small_vit("layer_scale_reg")
    state = {
        k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for k, v in source.state_dict().items()
    }
    torch.save(state, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth")
    assert weights_digest(model) == weights_digest(source)


def test_a_pickle_that_runs_a_program_is_refused_and_does_not_run(tmp_path):
    marker = "/tmp/a_pickle_ran"
    for number, save in enumerate((torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2)))):
        path = tmp_path / f"w{number}.pth"
        save({"state_dict": {"norm.weight": RunsAProgram()}}, path)
        message = refusal(path)
        assert "refused" in message and "safetensors" in message
    assert "posix.system" in refusal(tmp_path / "w0.pth") or "system" in refusal(tmp_path / "w0.pth")
    assert not os.path.exists(marker)


def test_an_npz_with_objects_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **{"embedding/kernel": np.array([RunsAProgram()], dtype=object)})
    assert "not a readable .npz" in refusal(path)
    assert not os.path.exists("/tmp/a_pickle_ran")


def jax_layout(model):
    """The weights of a small vision transformer as Google's programs store them."""
    w = {}
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    w["embedding/kernel"] = state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)
    w["embedding/bias"], w["cls"] = state["patch_embed.proj.bias"], state["cls_token"]
    w["Transformer/posembed_input/pos_embedding"] = state["pos_embed"]
    w["Transformer/encoder_norm/scale"], w["Transformer/encoder_norm/bias"] = state["norm.weight"], state["norm.bias"]
    for i in range(len(model.blocks)):
        to, at = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        for number, norm in ((0, "norm1"), (2, "norm2")):
            w[f"{to}LayerNorm_{number}/scale"] = state[f"{at}{norm}.weight"]
            w[f"{to}LayerNorm_{number}/bias"] = state[f"{at}{norm}.bias"]
        for n, name in enumerate(("query", "key", "value")):
            rows = slice(32 * n, 32 * n + 32)
            mha = f"{to}MultiHeadDotProductAttention_1/{name}/"
            w[f"{mha}kernel"] = state[f"{at}attn.qkv.weight"][rows].T.reshape(32, 4, 8)
            w[f"{mha}bias"] = state[f"{at}attn.qkv.bias"][rows].reshape(4, 8)
        w[f"{to}MultiHeadDotProductAttention_1/out/kernel"] = state[f"{at}attn.proj.weight"].T.reshape(4, 8, 32)
        w[f"{to}MultiHeadDotProductAttention_1/out/bias"] = state[f"{at}attn.proj.bias"]
        for n in (0, 1):
            w[f"{to}MlpBlock_3/Dense_{n}/kernel"] = state[f"{at}mlp.fc{n + 1}.weight"].T
            w[f"{to}MlpBlock_3/Dense_{n}/bias"] = state[f"{at}mlp.fc{n + 1}.bias"]
    return w


def test_the_layout_of_googles_programs_is_read(tmp_path, source):
    path = tmp_path / "w.npz"
    np.savez(path, **jax_layout(source))
    model = small_vit()
    load_weights(model, path)
    assert weights_digest(model) == weights_digest(source)


def test_an_npz_that_lacks_weights_or_has_more_blocks_is_refused(tmp_path, source):
    path = tmp_path / "w.npz"
    np.savez(path, **jax_layout(source))
    assert "ls1.gamma" in refusal(path, small_vit("layer_scale_reg", reg_tokens=0))
    assert "2 blocks, the model 1" in refusal(path, small_vit(depth=1))
    assert "cannot read .npz" in refusal(path, nn.Linear(2, 2))


def test_missing_left_over_and_misshapen_keys_are_named(tmp_path, source):
    path = tmp_path / "w.safetensors"
    state = source.state_dict()
    save_file({k: v for k, v in state.items() if k != "blocks.1.attn.proj.bias"}, path)
    assert "blocks.1.attn.proj.bias missing" in refusal(path)
    save_file(state | {"blocks.2.ls1.gamma": torch.zeros(1)}, path)
    assert "blocks.2.ls1.gamma left over" in refusal(path)
    save_file(state | {"norm.weight": torch.zeros(31)}, path)
    assert "norm.weight has the shape (31,), the model's is (32,)" in refusal(path)
    save_file({f"other.{k}": v for k, v in state.items()}, path)
    assert "missing" in refusal(path) and "left over" in refusal(path)


def test_a_refused_file_leaves_the_model_as_it_was(tmp_path, source):
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict() | {"norm.weight": torch.zeros(31)}, path)
    model = small_vit()
    before = weights_digest(model)
    refusal(path, model)
    assert weights_digest(model) == before


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.npz"])
def test_broken_files_are_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"not weights at all")
    message = refusal(path)
    assert message.startswith("backbone.weights=") and "\n" not in message


def test_unknown_suffixes_and_absent_files_are_refused(tmp_path):
    (tmp_path / "w.pkl").write_bytes(b"")
    assert "suffix" in refusal(tmp_path / "w.pkl")
    assert "no such file" in refusal(tmp_path / "w.pth")


def test_weights_without_finite_or_distinct_features_are_refused():
    broken, constant = small_vit(), small_vit()
    broken.norm.weight.data.fill_(float("nan"))
    constant.norm.weight.data.zero_()
    with pytest.raises(UserError, match="not finite"):
        smoke_check(broken, 32, "FILE")
    with pytest.raises(UserError, match="same features"):
        smoke_check(constant, 32, "FILE")
    smoke_check(small_vit(), 32, "FILE")


def test_the_card_of_the_packed_weights_names_the_file():
    import hashlib

    card = PACKED_WEIGHTS.with_suffix(".md").read_text()
    assert hashlib.sha256(PACKED_WEIGHTS.read_bytes()).hexdigest() in card
    assert f"{PACKED_WEIGHTS.stat().st_size:,} bytes" in card
