"""Fixed changes of images that make a domain: rotation and pixel permutation, both exact in integers.

Integer arithmetic makes the result of an image independent of its batch and of the machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cl_platform.random_streams import stream

_ONE = 1 << 16  # fixed-point one of the bilinear weights


@dataclass(frozen=True)
class Rotation:
    """Rotation about the centre by ``angle`` degrees counter-clockwise, bilinear, black outside."""

    angle: float

    @property
    def name(self) -> str:
        """Text that identifies the change."""
        return f"rotation:{self.angle:g}"

    def __call__(self, images: Tensor) -> Tensor:
        """Rotate images (b, C, H, W) uint8."""
        if self.angle % 360 == 0:
            return images
        height, width = images.shape[-2:]
        index, weight = _bilinear_table(self.angle, height, width)
        flat = images.flatten(2).to(torch.int32)  # (b, C, H * W)
        total = torch.full_like(flat, _ONE // 2)
        for corner in range(4):
            total += flat[:, :, index[corner]] * weight[corner]
        return (total >> 16).clamp_(0, 255).to(torch.uint8).view_as(images)


def _bilinear_table(angle: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Source pixels and fixed-point weights, (4, H * W) each; weight 0 where the source lies outside."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    # the output pixel looks back along the inverse rotation; rounding hides the last bits of sin and cos
    source_y = np.round(y * cosine + x * sine + (height - 1) / 2, 6)
    source_x = np.round(x * cosine - y * sine + (width - 1) / 2, 6)
    top, left = np.floor(source_y).astype(np.int64), np.floor(source_x).astype(np.int64)
    indices, weights = [], []
    for down in (0, 1):
        for right in (0, 1):
            r, c = top + down, left + right
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            share = (1 - np.abs(source_y - r)) * (1 - np.abs(source_x - c))
            indices.append((np.clip(r, 0, height - 1) * width + np.clip(c, 0, width - 1)).ravel())
            weights.append(np.where(inside, np.round(share * _ONE), 0).astype(np.int32).ravel())
    return torch.from_numpy(np.stack(indices)), torch.from_numpy(np.stack(weights))


@dataclass(frozen=True)
class Permutation:
    """A permutation of pixel positions at native resolution, the same in all channels; task 0 keeps its pixels."""

    seed: int
    task_id: int

    @property
    def name(self) -> str:
        """Text that identifies the change."""
        return "identity" if self.task_id == 0 else f"permutation:{self.seed}:{self.task_id}"

    def __call__(self, images: Tensor) -> Tensor:
        """Permute images (b, C, H, W) uint8."""
        if self.task_id == 0:
            return images
        pixels = images.shape[-2] * images.shape[-1]
        order = torch.randperm(pixels, generator=stream(self.seed, self.task_id, "pixel_permutation"))
        return images.flatten(2)[:, :, order].view_as(images)
