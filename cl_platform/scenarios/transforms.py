"""From stored pixels to a network's input: batched, on the images' device, without a global generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_platform.scenarios.config import ScenarioConfig, TransformConfig

_RATIO = (3.0 / 4.0, 4.0 / 3.0)  # range of a crop's width / height
_CANDIDATES = 10  # crops drawn per image, of which the first that fits is taken


class Transforms:
    """Training and evaluation transforms of one scenario on one backbone.

    Args:
        config: which augmentation and which resizing.
        input_size: side of the network's input in pixels.
        mean: three channel means of the network's input, for pixels within 0..1.
        std: three standard deviations.

    Attributes:
        deterministic: whether ``train`` equals ``evaluate``.
        id: text that identifies the evaluation transform.
    """

    def __init__(self, config: TransformConfig, input_size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.config = config
        self.input_size = input_size
        self._mean = torch.tensor([float(m) for m in mean]).view(1, 3, 1, 1)
        self._std = torch.tensor([float(s) for s in std]).view(1, 3, 1, 1)
        self.deterministic = config.augment == "none"
        numbers = ",".join(f"{float(v):.9g}" for v in (*mean, *std))
        self.id = f"{config.test_transform}|{config.interpolation}|{input_size}|{numbers}"

    @staticmethod
    def from_scenario(
        scenario: ScenarioConfig, input_size: int, mean: Sequence[float], std: Sequence[float]
    ) -> Transforms:
        """The transforms that a scenario's keys describe."""
        config = TransformConfig(
            augment=scenario.augment,
            augment_scale=scenario.augment_scale,
            test_transform=scenario.test_transform,
            interpolation=scenario.interpolation,
        )
        return Transforms(config, input_size, mean, std)

    def evaluate(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 to (B, 3, S, S) float32, normalised.

        ``resize`` brings the image to S x S; ``resize_crop`` brings it to S * 256 / 224 and cuts out the centre. An
        image that has the size already keeps its exact values.
        """
        size = self.input_size
        if self.config.test_transform == "resize":
            return self._normalise(self._resize(images, size))
        side = round(size * 256 / 224)
        resized = self._resize(images, side)
        start = (side - size) // 2
        return self._normalise(resized[:, :, start : start + size, start : start + size])

    def train(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, 3, H, W) uint8 to (B, 3, S, S) float32, augmented and normalised.

        ``crop`` pads by S / 8 on each side (4 at 32 pixels) with black and cuts at a random place; ``crop_flip`` also
        mirrors half of the images; ``resized_crop`` takes a random area and aspect ratio, resizes it and mirrors half.

        Args:
            images: stored pixels, on any device.
            generator: a CPU generator; the numbers drawn depend on the batch size alone.
        """
        if self.deterministic:
            return self.evaluate(images)
        if self.config.augment == "resized_crop":
            return self._normalise(self._resized_crop(images, generator))
        flips = self.config.augment == "crop_flip"
        return self._normalise(self._shifted(self._resize(images, self.input_size), flips, generator))

    def _normalise(self, values: Tensor) -> Tensor:
        mean, std = (t.to(values.device, non_blocking=True) for t in (self._mean, self._std))
        return (values - mean) / std

    def _resize(self, images: Tensor, size: int) -> Tensor:
        """(B, 3, size, size) float32 within 0..1."""
        values = images.to(torch.float32) / 255.0
        if images.shape[-2:] == (size, size):
            return values
        mode = self.config.interpolation
        resized = F.interpolate(values, (size, size), mode=mode, antialias=True, align_corners=False)
        return resized.clamp(0.0, 1.0)  # bicubic overshoots at edges

    def _shifted(self, values: Tensor, flips: bool, generator: torch.Generator) -> Tensor:
        count, _, size, _ = values.shape
        padding = max(1, size // 8)
        offsets = torch.randint(0, 2 * padding + 1, (count, 2), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        offsets, mirrored = (t.to(values.device, non_blocking=True) for t in (offsets, mirrored))
        places = torch.arange(size, device=values.device)
        rows = offsets[:, :1] + places  # (B, S)
        columns = torch.where((mirrored & flips)[:, None], places.flip(0), places) + offsets[:, 1:]
        padded = F.pad(values, (padding,) * 4)
        each = torch.arange(count, device=values.device)[:, None, None]
        cut = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]  # (B, S, S, 3)
        return cut.permute(0, 3, 1, 2).contiguous()

    def _resized_crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        size = self.input_size
        values = images.to(torch.float32) / 255.0
        if min(images.shape[-2:]) > 2 * size:  # sampling from far larger images would skip pixels
            values = self._resize(images, 2 * size)
        theta = crop_matrices(images.shape[0], self.config.augment_scale, generator)
        theta = theta.to(values.device, non_blocking=True)
        grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
        mode = self.config.interpolation
        return F.grid_sample(values, grid, mode=mode, padding_mode="border", align_corners=False).clamp(0.0, 1.0)


def crop_matrices(count: int, scale: Sequence[float], generator: torch.Generator) -> Tensor:
    """Affine maps (count, 2, 3) float32 from the output square to a random crop, mirrored with probability one half.

    The crop's share of the area is uniform in ``scale`` and its aspect ratio log-uniform in 3/4..4/3; of ten drawn
    crops the first that fits into the image is taken, else the whole image.
    """
    drawn = torch.rand(count, 2 * _CANDIDATES + 3, generator=generator, dtype=torch.float64)
    area = scale[0] + (scale[1] - scale[0]) * drawn[:, :_CANDIDATES]
    low, high = math.log(_RATIO[0]), math.log(_RATIO[1])
    ratio = torch.exp(low + (high - low) * drawn[:, _CANDIDATES : 2 * _CANDIDATES])
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()  # in units of the image's side
    fits = (width <= 1.0) & (height <= 1.0)
    first = fits.to(torch.int64).argmax(1, keepdim=True)  # the first that fits; 0 if none does
    none = ~fits.any(1)
    width = width.gather(1, first)[:, 0].masked_fill(none, 1.0)
    height = height.gather(1, first)[:, 0].masked_fill(none, 1.0)
    left_right, up_down, mirror = drawn[:, -3], drawn[:, -2], drawn[:, -1] < 0.5
    theta = torch.zeros(count, 2, 3, dtype=torch.float64)
    theta[:, 0, 0] = torch.where(mirror, -width, width)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (2.0 * left_right - 1.0) * (1.0 - width)
    theta[:, 1, 2] = (2.0 * up_down - 1.0) * (1.0 - height)
    return theta.to(torch.float32)
