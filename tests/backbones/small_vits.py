"""Small vision transformers of every variant that prompts support."""

import torch


def small_vit(variant="plain", fused=True, double=False, seed=0, **changes):
    """A timm vision transformer of width 32 and depth 2, in eval mode, with random weights that differ from zero."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
    options |= {
        "plain": {},
        "qk_norm": {"qk_norm": True},
        "layer_scale_reg": {"init_values": 0.1, "reg_tokens": 4},
        "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
        "avg_pool": {"global_pool": "avg", "class_token": False},
        "map_pool": {"global_pool": "map", "class_token": False},
        "dynamic_img_size": {"dynamic_img_size": True},
        "pre_norm": {"pre_norm": True},
        "scale_attn_norm": {"scale_attn_norm": True},
        "res_post": {"block_fn": ResPostBlock, "init_values": 0.1},
        "dropouts": {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
        "distilled": {},
    }[variant]
    options |= changes
    cls = VisionTransformerDistilled if variant == "distilled" else VisionTransformer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**options)
        for parameter in model.parameters():  # zero biases and tiny tokens would hide an error
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    for block in model.blocks:
        block.attn.fused_attn = fused
    return (model.double() if double else model).eval()


VARIANTS = [
    "plain", "qk_norm", "layer_scale_reg", "no_embed_class", "avg_pool", "map_pool", "dynamic_img_size", "pre_norm",
    "scale_attn_norm", "res_post", "dropouts", "distilled",
]  # fmt: skip


def draw(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
