"""``vit_nano``: a small vision transformer whose pretrained weights are packed with the platform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cl_platform.backbones.base import HALF, Backbone, BackboneConfig, input_range
from cl_platform.backbones.loading import load_weights, smoke_check
from cl_platform.backbones.prefix import PromptedViT
from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.registry import backbones

PACKED_WEIGHTS = Path(__file__).parent / "weights" / "vit_nano.safetensors"
INPUT_SIZE = 32
ARCHITECTURE = {"patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}


def nano_model(input_size: int = INPUT_SIZE, **changes: Any) -> nn.Module:
    """The bare network: patches of 8 pixels, 6 blocks of width 192 with 3 heads, 17 tokens at 32 pixels."""
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(img_size=input_size, num_classes=0, **{**ARCHITECTURE, **changes})
    return model


@backbones.register("vit_nano")
def build_vit_nano(config: BackboneConfig, seed: int) -> Backbone:
    """``backbone=vit_nano``: works at once, without a network; positions are resampled for other input sizes."""
    size = config.input_size or INPUT_SIZE
    if size % ARCHITECTURE["patch_size"]:
        raise UserError("backbone.input_size", size, "must be a multiple of 8, the patch size", "Change it")
    if config.kwargs:
        raise UserError("backbone.kwargs", config.kwargs, "vit_nano has one shape", "Use backbone=timm or custom")
    with seeded_globals(seed, RUN_LEVEL, "backbone_init"):
        model = nano_model(size)
    packed = config.wants_pretrained(available=True)
    source = PACKED_WEIGHTS if packed else config.weights
    if source is not None:
        load_weights(model, source, config.prefix, config.container)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    mean, std = input_range(config.input_norm, HALF, HALF)
    origin = "packed" if packed else str(config.weights or "random")
    backbone = PromptedViT(model, size, mean, std, "vit_nano", origin)
    if source is not None:
        smoke_check(backbone, size, source)
    return backbone
