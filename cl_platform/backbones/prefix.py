"""A vision transformer of timm that takes prompt tokens, key/value prefixes and low-rank deltas, block by block.

No hooks, no changed classes, no wrapped submodules: the runner walks timm's own modules, so that ``state_dict`` keys
stay timm's, and a block without extras is timm's own call. The arithmetic repeats timm 1.0.31; the tests compare bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cl_platform.backbones.base import HALF, Backbone, Triple, weights_digest
from cl_platform.errors import UserError

Delta = Callable[[Tensor], Tensor]
Readout = Literal["pool", "token", "prompt", "token+prompt", "gap"]
DELTA_SITES = ("qkv", "proj", "fc1", "fc2")
AFTER_BLOCKS = ("norm.", "fc_norm.", "attn_pool.", "head.", "head_dist.")
NO_EXTRAS: Mapping[int, BlockExtras] = {}


@dataclass(frozen=True)
class BlockExtras:
    """What is added to one block; every part is optional.

    Attributes:
        tokens: (1 or B, P, D) prompt tokens that enter the sequence before the block and stay in it.
        kv: two tensors (1 or B, Lp, attention width), put in front of the keys and values of this block, after the
            projection and after the key norm, so never multiplied by the block's weights.
        delta: by site (``qkv``, ``proj``, ``fc1``, ``fc2``), a function of the site's input whose result is added
            to the site's output; for ``qkv`` the three thirds of the result are query, key and value.
    """

    tokens: Tensor | None = None
    kv: tuple[Tensor, Tensor] | None = None
    delta: Mapping[str, Delta] | None = None

    def changes_block(self) -> bool:
        """Whether the block itself differs from timm's call; a prefix of zero rows does not change it."""
        return bool(self.delta) or (self.kv is not None and self.kv[0].shape[1] > 0)


def supports_prompts(backbone: nn.Module) -> str | None:
    """Why ``backbone`` takes no prompts, naming the class in the way; ``None`` if it takes them.

    Exact types are compared, not names: other model families of timm define their own ``Block`` and ``Attention``.

    Args:
        backbone: a :class:`Backbone`, or the bare model.
    """
    from timm.layers import Attention
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer

    model = backbone.model if isinstance(backbone, Backbone) else backbone
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        return f"{type(model).__name__} is not timm's VisionTransformer or VisionTransformerDistilled"
    for block in cast(Any, model).blocks:
        if type(block) not in (Block, ResPostBlock):
            return f"{type(model).__name__} has blocks of the class {type(block).__name__}"
        if type(block.attn) is not Attention:
            return f"{type(model).__name__} has attention of the class {type(block.attn).__name__}"
    return None


def refuse_prompts(backbone: nn.Module, strategy_name: str) -> UserError:
    """The error for a strategy with prompts on a backbone that takes none; to be raised before data are read."""
    reason = supports_prompts(backbone) or f"{type(backbone).__name__} was not built as a PromptedViT"
    return UserError(
        "strategy",
        strategy_name,
        f"needs a vision transformer that takes prompts and adapters, but {reason}",
        "Use backbone=vit_nano, vit_small, vit_base or deit_tiny, or backbone=timm with a plain ViT, DeiT, DINO, "
        "DINOv2, CLIP or SigLIP tag",
    )


class PromptedViT(Backbone):
    """A timm vision transformer whose blocks accept :class:`BlockExtras`.

    Attributes:
        depth: number of blocks.
        num_heads: heads of a block's attention.
        width: width of the tokens, D.
        attention_width: heads times head width: the width of key and value prefixes; usually D.
        num_prefix_tokens: tokens before the patches (class, distillation, registers); prompts go in behind them.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: int,
        mean: Triple = HALF,
        std: Triple = HALF,
        tag: str = "",
        weights_from: str = "random",
    ) -> None:
        reason = supports_prompts(model)
        if reason:
            raise TypeError(reason)
        vit = cast(Any, model)
        super().__init__(model, "vit", vit.num_features, input_size, mean, std, tag, weights_from)
        self.depth = len(vit.blocks)
        self.num_heads: int = vit.blocks[0].attn.num_heads
        self.width: int = vit.embed_dim
        self.attention_width: int = vit.blocks[0].attn.attn_dim
        self.num_prefix_tokens: int = vit.num_prefix_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of an image without prompts."""
        return int(self.vit.patch_embed.num_patches) + self.num_prefix_tokens

    @property
    def vit(self) -> Any:
        """The untouched timm model."""
        return self.model

    def forward(self, images: Tensor) -> Tensor:
        """The features of the unprompted model; see :meth:`features`."""
        return self.features(images)

    def features(self, images: Tensor) -> Tensor:
        """(B, feature_dim) pooled features before the classifier, of the model as timm runs it without prompts."""
        features: Tensor = self.vit.forward_head(self.vit.forward_features(images), pre_logits=True)
        return features

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) to the tokens (B, N, D) that enter block 0."""
        vit = self.vit
        tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        return tokens

    def run(
        self,
        tokens: Tensor,
        start: int = 0,
        stop: int | None = None,
        extras: Mapping[int, BlockExtras] | None = None,
        n_prompt: int = 0,
    ) -> Tensor:
        """Tokens through the blocks ``start`` to ``stop - 1``.

        Args:
            tokens: (B, N, D).
            start: first block.
            stop: block before which to end; ``None`` for the last block's end.
            extras: what each block gets, by its index; prompt tokens go in behind those of earlier blocks.
            n_prompt: prompt tokens that ``tokens`` already holds.

        Returns:
            (B, N + P, D), with P the prompt tokens inserted on the way.
        """
        extras = NO_EXTRAS if extras is None else extras
        blocks = self.vit.blocks
        stop = len(blocks) if stop is None else stop
        for index in range(start, stop):
            extra = extras.get(index)
            if extra is not None and extra.tokens is not None and extra.tokens.shape[1] > 0:
                tokens = insert_tokens(tokens, extra.tokens, self.num_prefix_tokens + n_prompt)
                n_prompt += extra.tokens.shape[1]
            if self.vit.grad_checkpointing and torch.is_grad_enabled():
                tokens = cast(Tensor, checkpoint(run_block, blocks[index], tokens, extra, use_reentrant=False))
            else:
                tokens = run_block(blocks[index], tokens, extra)
        return tokens

    def finish(self, tokens: Tensor) -> Tensor:
        """(B, N, D) after the last block to (B, N, D) after the final norm."""
        normed: Tensor = self.vit.norm(tokens)
        return normed

    def readout(self, tokens: Tensor, n_prompt: int = 0, kind: Readout = "pool") -> Tensor:
        """Tokens after :meth:`finish` to features.

        Args:
            tokens: (B, N, D), of which ``n_prompt`` stand behind the prefix tokens.
            n_prompt: number of prompt tokens in the sequence.
            kind: ``pool``: timm's own pooling with the prompt tokens cut out; ``prompt``: mean of the prompt tokens;
                ``token``: the class token; ``token+prompt``: mean of the class token and the prompt tokens;
                ``gap``: mean of the patch tokens. All but ``pool`` go through the model's ``fc_norm``.

        Returns:
            (B, feature_dim).
        """
        first, last = self.num_prefix_tokens, self.num_prefix_tokens + n_prompt
        if kind == "pool":
            kept = torch.cat((tokens[:, :first], tokens[:, last:]), dim=1) if n_prompt else tokens
            return cast(Tensor, self.vit.forward_head(kept, pre_logits=True))
        if "token" in kind and self.vit.cls_token is None:
            raise ValueError(f"readout {kind}: the model has no class token")
        if "prompt" in kind and n_prompt == 0:
            raise ValueError(f"readout {kind}: there are no prompt tokens")
        chosen = {
            "prompt": lambda: tokens[:, first:last].mean(dim=1),
            "token": lambda: tokens[:, 0],
            "token+prompt": lambda: torch.cat((tokens[:, :1], tokens[:, first:last]), dim=1).mean(dim=1),
            "gap": lambda: tokens[:, last:].mean(dim=1),
        }
        if kind not in chosen:
            raise ValueError(f"readout {kind}: choose pool or one of {', '.join(chosen)}")
        return cast(Tensor, self.vit.head_drop(self.vit.fc_norm(chosen[kind]())))

    def frozen_blocks(self) -> int:
        """Leading blocks that nothing trains; 0 if the embedding before them is trained."""
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        behind = tuple(f"blocks.{index}." for index in range(self.depth)) + AFTER_BLOCKS
        if any(not name.startswith(behind) for name in trained):
            return 0
        return min((int(name.split(".")[1]) for name in trained if name.startswith("blocks.")), default=self.depth)

    def prefix_digest(self, stop: int) -> str:
        """SHA-256 of the weights that :meth:`embed` and the blocks before ``stop`` use: the key of a token cache."""
        later = tuple(f"blocks.{index}." for index in range(stop, self.depth))
        unused = (*later, *AFTER_BLOCKS)
        state = self.model.state_dict()
        return weights_digest({name: tensor for name, tensor in state.items() if not name.startswith(unused)})


def insert_tokens(tokens: Tensor, prompts: Tensor, at: int) -> Tensor:
    """Put ``prompts`` (1 or B, P, D) into ``tokens`` (B, N, D) at index ``at``: (B, N + P, D)."""
    prompts = prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
    return torch.cat((tokens[:, :at], prompts, tokens[:, at:]), dim=1)


def run_block(block: Any, tokens: Tensor, extra: BlockExtras | None = None) -> Tensor:
    """One block on tokens (B, N, D); exactly timm's call unless ``extra`` has prefix rows or deltas."""
    from timm.models.vision_transformer import ResPostBlock

    if extra is None or not extra.changes_block():
        return cast(Tensor, block(tokens))
    delta = extra.delta or {}
    unknown = set(delta) - set(DELTA_SITES)
    if unknown:
        raise ValueError(f"unknown sites {sorted(unknown)}; known are {', '.join(DELTA_SITES)}")
    if type(block) is ResPostBlock:
        tokens = tokens + block.drop_path1(block.norm1(attend(block.attn, tokens, extra.kv, delta)))
        return cast(Tensor, tokens + block.drop_path2(block.norm2(feed_forward(block.mlp, tokens, delta))))
    tokens = tokens + block.drop_path1(block.ls1(attend(block.attn, block.norm1(tokens), extra.kv, delta)))
    return cast(Tensor, tokens + block.drop_path2(block.ls2(feed_forward(block.mlp, block.norm2(tokens), delta))))


def attend(
    attn: Any, x: Tensor, kv: tuple[Tensor, Tensor] | None = None, delta: Mapping[str, Delta] | None = None
) -> Tensor:
    """timm's ``Attention.forward`` with a key/value prefix and additive deltas.

    Args:
        attn: a ``timm.layers.Attention``.
        x: (B, N, D).
        kv: prefix of keys and of values, each (1 or B, Lp, attention width); every query sees all rows.
        delta: functions for the sites ``qkv`` and ``proj``.

    Returns:
        (B, N, D).
    """
    delta = delta or {}
    batch, length, _ = x.shape
    gate = attn.gate(x).sigmoid() if attn.gate is not None else None
    qkv = attn.qkv(x)
    if "qkv" in delta:
        qkv = qkv + delta["qkv"](x)
    qkv = qkv.reshape(batch, length, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)  # each (B, heads, N, head width)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if kv is not None and kv[0].shape[1] > 0:
        k = torch.cat((_heads(kv[0], attn, k), k), dim=2)  # (B, heads, Lp + N, head width)
        v = torch.cat((_heads(kv[1], attn, v), v), dim=2)
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        x = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    else:
        weights = (q * attn.scale) @ k.transpose(-2, -1)
        x = attn.attn_drop(weights.softmax(dim=-1)) @ v
    x = attn.norm(x.transpose(1, 2).reshape(batch, length, attn.attn_dim))
    if gate is not None:
        x = x * gate
    out = attn.proj(x)
    if "proj" in delta:
        out = out + delta["proj"](x)
    return cast(Tensor, attn.proj_drop(out))


def _heads(rows: Tensor, attn: Any, like: Tensor) -> Tensor:
    """(1 or B, Lp, attention width) to (B, heads, Lp, head width).

    The cast matters under autocast, where keys are bfloat16 and a float32 prefix would promote the concatenation.
    """
    rows = rows.reshape(rows.shape[0], rows.shape[1], attn.num_heads, attn.head_dim).transpose(1, 2)
    return rows.to(like.dtype).expand(like.shape[0], -1, -1, -1)


def feed_forward(mlp: Any, x: Tensor, delta: Mapping[str, Delta]) -> Tensor:
    """A block's MLP on (B, N, D), with deltas at ``fc1`` and ``fc2``; only ``timm.layers.Mlp`` takes these."""
    from timm.layers import Mlp

    if "fc1" not in delta and "fc2" not in delta:
        return cast(Tensor, mlp(x))
    if type(mlp) is not Mlp:
        raise UserError(
            "strategy", "deltas at fc1, fc2", f"{type(mlp).__name__} is not timm's Mlp", "Use only the sites qkv, proj"
        )
    hidden = mlp.fc1(x)
    if "fc1" in delta:
        hidden = hidden + delta["fc1"](x)
    hidden = mlp.norm(mlp.drop1(mlp.act(hidden)))
    out = mlp.fc2(hidden)
    if "fc2" in delta:
        out = out + delta["fc2"](hidden)
    return cast(Tensor, mlp.drop2(out))
