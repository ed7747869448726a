"""Low-rank adapters (LoRA, Hu et al. 2022) of a vision transformer: where they sit, how they act, merging them.

An adapter of a linear layer ``y = x W^T + b`` adds ``s (x A^T) B^T`` with ``A`` (r, d_in) and ``B`` (d_out, r). timm
holds query, key and value in one layer, whose three thirds are three targets here. The model itself stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.backbones.prefix import BlockExtras, PromptedViT
from cl_platform.errors import UserError
from cl_platform.random_streams import stream

TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")
THIRDS = ("q", "k", "v")
GATHER_BYTES = 64 * 2**20
"""Bound on the adapter rows that are gathered at once; larger batches are taken in parts."""


@dataclass(frozen=True)
class LoRALayout:
    """Which layers of which blocks have an adapter, of which rank.

    The factors of one adapter are ``A_<target>`` (blocks, r, d_in) and ``B_<target>`` (blocks, d_out, r).

    Attributes:
        vit: the transformer, which stays as it is.
        targets: of :data:`TARGETS`, in their order.
        blocks: block numbers, ascending.
        rank: r.
        scale: s.
    """

    vit: PromptedViT
    targets: tuple[str, ...]
    blocks: tuple[int, ...]
    rank: int
    scale: float = 1.0

    def layer(self, block: int, target: str) -> nn.Linear:
        """timm's own layer that ``target`` belongs to."""
        parts = self.vit.vit.blocks[block]
        if target in THIRDS:
            return parts.attn.qkv  # type: ignore[no-any-return]
        return parts.attn.proj if target == "proj" else getattr(parts.mlp, target)  # type: ignore[no-any-return]

    def widths(self, target: str) -> tuple[int, int]:
        """Input and output width of a target."""
        layer = self.layer(self.blocks[0], target)
        return layer.in_features, layer.out_features // (3 if target in THIRDS else 1)

    @property
    def numbers(self) -> int:
        """Numbers in one adapter."""
        return len(self.blocks) * self.rank * sum(sum(self.widths(target)) for target in self.targets)

    def share(self, trained: int) -> float:
        """Trained numbers in units of the transformer's own."""
        return trained / sum(p.numel() for p in self.vit.parameters())

    def first(self, seed: int, task_id: int, *index: int) -> dict[str, Tensor]:
        """First factors: ``A`` uniform in +-1/sqrt(d_in), ``B`` zero, so that nothing changes yet.

        The draw is keyed by (seed, task id, ``lora/<block>/<target>``, index), whichever strategy asks.
        """
        device = next(self.vit.parameters()).device
        found = {}
        for target in self.targets:
            fan_in, fan_out = self.widths(target)
            drawn = [
                torch.rand(self.rank, fan_in, generator=stream(seed, task_id, f"lora/{block}/{target}", *index))
                for block in self.blocks
            ]
            found[f"A_{target}"] = ((2 * torch.stack(drawn) - 1) / math.sqrt(fan_in)).to(device)
            found[f"B_{target}"] = torch.zeros(len(self.blocks), fan_out, self.rank, device=device)
        return found

    def extras(
        self, factors: Mapping[str, Tensor], rows: Tensor | None = None, dense: Mapping[str, Tensor] | None = None
    ) -> dict[int, BlockExtras]:
        """What the blocks need to run with adapters.

        Args:
            factors: by name as above; with ``rows`` of several adapters, (T, blocks, ...).
            rows: (B, k) int64, the adapters whose sum each image gets; without, one adapter for all.
            dense: by target (blocks, d_out, d_in), added to the layer's weight for all images.
        """
        found = {}
        for index, block in enumerate(self.blocks):
            at: Any = index if rows is None else (slice(None), index)
            sites = {}
            for site in dict.fromkeys("qkv" if target in THIRDS else target for target in self.targets):
                group = [t for t in self.targets if t == site or (site == "qkv" and t in THIRDS)]
                down = torch.cat([factors[f"A_{t}"][at] for t in group], dim=-2)
                ups = [factors[f"B_{t}"][at] for t in group]
                whole = None if dense is None else {t: dense[t][index] for t in group}
                sites[site] = partial(self._delta, site, group, down, ups, rows, whole)
            found[block] = BlockExtras(delta=sites)
        return found

    def _delta(
        self,
        site: str,
        group: Sequence[str],
        down: Tensor,
        ups: Sequence[Tensor],
        rows: Tensor | None,
        dense: Mapping[str, Tensor] | None,
        x: Tensor,
    ) -> Tensor:
        parts = dict(zip(group, low_rank(x, down, ups, self.scale, rows), strict=True))
        if dense is not None:
            parts = {target: part + F.linear(x, dense[target]) for target, part in parts.items()}
        if site != "qkv":
            return parts[site]
        like = next(iter(parts.values()))
        return torch.cat([parts[t] if t in parts else torch.zeros_like(like) for t in THIRDS], dim=2)


def low_rank(x: Tensor, down: Tensor, ups: Sequence[Tensor], scale: float, rows: Tensor | None = None) -> list[Tensor]:
    """``s (x A^T) B^T`` for several ``B`` whose ``A`` stand below one another: one product down, one up for each.

    Args:
        x: (B, N, d_in).
        down: (R, d_in), R the sum of all ranks; with ``rows`` (T, R, d_in).
        ups: (d_out, r) each; with ``rows`` (T, d_out, r).
        scale: s.
        rows: (B, k) int64: each image gets the sum over its own k adapters. No bit of an image's result depends on
            its batch mates.

    Returns:
        (B, N, d_out) for each of ``ups``.
    """
    ranks = [up.shape[-1] for up in ups]
    if rows is None:
        low = F.linear(x, down) if scale == 1 else F.linear(x, down) * scale  # (B, N, R)
        return [F.linear(part, up) for part, up in zip(low.split(ranks, dim=2), ups, strict=True)]
    numbers = rows.shape[1] * (down[0].numel() + sum(up[0].numel() for up in ups))
    size = max(1, GATHER_BYTES // (numbers * down.element_size()))
    if not torch.compiler.is_exporting() and len(x) > size:
        pieces = [low_rank(a, down, ups, scale, b) for a, b in zip(x.split(size), rows.split(size), strict=True)]
        return [torch.cat(column) for column in zip(*pieces, strict=True)]
    k = rows.shape[1]
    low = torch.bmm(x, down[rows].flatten(1, 2).transpose(1, 2))  # (B, N, k R)
    low = (low if scale == 1 else low * scale).unflatten(2, (k, -1))
    found = []
    for part, up in zip(low.split(ranks, dim=3), ups, strict=True):
        chosen = up[rows].transpose(2, 3).flatten(1, 2)  # (B, k r, d_out)
        found.append(torch.bmm(part.flatten(2), chosen))
    return found


def layout_of(
    vit: PromptedViT, targets: Sequence[str], blocks: str | Sequence[int], rank: int, scale: float, key: str
) -> LoRALayout:
    """A checked layout.

    Args:
        vit: the transformer.
        targets: of :data:`TARGETS`.
        blocks: ``all``, or block numbers.
        rank: r.
        scale: s.
        key: where the values stand in the configuration, for messages.

    Raises:
        UserError: an unknown target or block, one named twice, none, or an MLP that takes no adapters.
    """
    from timm.layers import Mlp

    if not targets or set(targets) - set(TARGETS) or len(set(targets)) != len(targets):
        allowed = f"must be different names among {', '.join(TARGETS)}"
        raise UserError(f"{key}.targets", list(targets), allowed, f"Write {key}.targets=[q,v]")
    chosen = range(vit.depth) if isinstance(blocks, str) else sorted(blocks)
    wrong = blocks != "all" if isinstance(blocks, str) else any(not 0 <= number < vit.depth for number in chosen)
    if wrong or not len(chosen) or len(set(chosen)) != len(chosen):
        allowed = f"must be all, or different block numbers from 0 to {vit.depth - 1}"
        raise UserError(f"{key}.blocks", blocks, allowed, f"Write {key}.blocks=all")
    odd = next((type(b.mlp).__name__ for b in vit.vit.blocks if type(b.mlp) is not Mlp), None)
    if odd and {"fc1", "fc2"} & set(targets):
        raise UserError(f"{key}.targets", list(targets), f"{odd} takes no adapters", "Use only q, k, v, proj")
    return LoRALayout(vit, tuple(t for t in TARGETS if t in targets), tuple(chosen), rank, scale)


# -- merging ----------------------------------------------------------------------------------------------------------


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``W + s B A`` as a new tensor, summed in float64 and rounded once to the weight's type."""
    return (weight.double() + scale * (up.double() @ down.double())).to(weight.dtype)


class Merge:
    """An adapter folded into the transformer's weights, which costs nothing in a forward pass; undone exactly.

    The original weights are kept and put back, not subtracted from: that would not give their bits back. Use it as a
    context manager, or call :meth:`undo`.

    Args:
        layout: where the adapter sits.
        factors: of one adapter.
        dense: as in :meth:`LoRALayout.extras`.
        force: merge into half-precision weights as well, whose rounding is coarser than most adapters.

    Raises:
        UserError: half-precision weights without ``force``.
    """

    def __init__(
        self,
        layout: LoRALayout,
        factors: Mapping[str, Tensor],
        dense: Mapping[str, Tensor] | None = None,
        force: bool = False,
    ) -> None:
        self._kept: list[tuple[nn.Linear, Any]] = []  # the layers and their own weights
        for index, block in enumerate(layout.blocks):
            for target in layout.targets:
                layer = layout.layer(block, target)
                if layer.weight.dtype not in (torch.float32, torch.float64) and not force:
                    self.undo()
                    kind = str(layer.weight.dtype).removeprefix("torch.")
                    raise UserError("merge", kind, "the weights are too coarse to merge into", "Use float32 weights")
                if not any(layer is other for other, _ in self._kept):
                    self._kept.append((layer, layer.weight))
                    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
                down, up = factors[f"A_{target}"][index].detach(), factors[f"B_{target}"][index].detach()
                width = up.shape[0]
                start = THIRDS.index(target) * width if target in THIRDS else 0
                rows = layer.weight.data[start : start + width]
                if dense is not None:
                    rows.copy_(rows.double() + dense[target][index].double())
                rows.copy_(merged_weight(rows, down, up, layout.scale))

    def undo(self) -> None:
        """Put the original weights back: the same tensors, bit for bit."""
        while self._kept:
            layer, weight = self._kept.pop()
            layer.weight = weight

    def __enter__(self) -> Merge:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
