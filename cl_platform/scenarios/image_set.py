"""The images of one task's split: rows of a memory map, read in batches."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class DomainTransform(Protocol):
    """A fixed change of all images of a domain, the same for every image and exact in uint8."""

    @property
    def name(self) -> str:
        """Text that identifies the change."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Map images (b, C, H, W) uint8 to images of the same shape and type."""
        ...


@dataclass(frozen=True)
class Pixels:
    """Decoded images of a data set's training or test split.

    Attributes:
        images: (N, C, H, W) uint8, C 1 or 3; an array or a memory map.
        labels: (N,) int64 class ids.
        digest: SHA-256 of pixels and labels.
        domains: (N,) int64 domain ids, or None when the data set has none.
    """

    images: np.ndarray
    labels: np.ndarray
    digest: str
    domains: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSet:
    """Images with labels, in a fixed order.

    Attributes:
        labels: (n,) int64 global class ids.
        example_ids: (n,) int64, the row in the data set's training or test split; one id is one source image.
        source: (N, C, H, W) uint8 array that ``example_ids`` points into.
        domain: the change applied to every image, or None.
        first_id: example id of the source's first image; above 0 where the data were added to other data.
    """

    labels: Tensor
    example_ids: Tensor
    source: np.ndarray = field(repr=False)
    domain: DomainTransform | None = None
    first_id: int = 0

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def images(self, rows: Tensor | slice) -> Tensor:
        """Images (b, 3, H, W) uint8 of the given rows, in their order; grey ones are repeated over three channels."""
        wanted = self.example_ids[rows].numpy() - self.first_id
        images = torch.from_numpy(np.ascontiguousarray(self.source[wanted]))  # (b, C, H, W)
        if self.domain is not None:
            images = self.domain(images)
        return images.expand(-1, 3, -1, -1).contiguous() if images.shape[1] == 1 else images

    def select(self, rows: Tensor) -> ImageSet:
        """The given rows (k,) int64 as an image set of their own."""
        return replace(self, labels=self.labels[rows], example_ids=self.example_ids[rows])


def image_set(
    pixels: Pixels, rows: np.ndarray, domain: DomainTransform | None = None, labels: np.ndarray | None = None
) -> ImageSet:
    """The given rows of a data set's split; ``labels`` (as long as ``rows``) replaces the stored ones."""
    chosen = pixels.labels[rows] if labels is None else labels
    return ImageSet(
        torch.from_numpy(np.asarray(chosen, dtype=np.int64).copy()),
        torch.from_numpy(np.asarray(rows, dtype=np.int64).copy()),
        pixels.images,
        domain,
    )
