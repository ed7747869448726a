"""Several image sets read as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cl_platform.scenarios.stream import ImageSet


@dataclass(frozen=True)
class StoredImages:
    """Images that are held beside the data set, such as those of a replay buffer, with the interface of an image set.

    Attributes:
        pixels: (n, 3, H, W) uint8 on the host.
        labels: (n,) int64 global class ids.
        example_ids: (n,) int64, the row in the data set's training split that each image came from.
        task_ids: (n,) int64, the task that each belongs to.
    """

    pixels: Tensor
    labels: Tensor
    example_ids: Tensor
    task_ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: Tensor | slice) -> Tensor:
        """Images (b, 3, H, W) uint8 of the given rows, in their order."""
        return self.pixels[rows]


class MixedImages:
    """The rows of several image sets one after the other, with the interface of one.

    Args:
        parts: the image sets.
        task_ids: (n,) int64, the task that each image belongs to, where these differ from the task in training.
    """

    def __init__(self, parts: Sequence[ImageSet | StoredImages], task_ids: Tensor | None = None) -> None:
        self._parts, self.task_ids = list(parts), task_ids
        self._starts = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        self.labels = torch.cat([part.labels for part in parts])
        self.example_ids = torch.cat([part.example_ids for part in parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def images(self, rows: Tensor | slice) -> Tensor:
        """Images (b, 3, H, W) uint8 of the given rows, in their order."""
        index = torch.arange(len(self))[rows] if isinstance(rows, slice) else rows
        owner = torch.searchsorted(self._starts, index, right=True) - 1
        found: Tensor | None = None
        for number in owner.unique().tolist():
            mask = owner == number
            images = self._parts[number].images(index[mask] - self._starts[number])
            if found is None:
                found = torch.empty((len(index), *images.shape[1:]), dtype=images.dtype)
            found[mask] = images
        assert found is not None, "no rows were asked for"
        return found


def concatenate(parts: Sequence[ImageSet]) -> ImageSet:
    """Several image sets as one; a single one is returned as it is."""
    return parts[0] if len(parts) == 1 else MixedImages(parts)  # type: ignore[return-value]


def rehearsal(own: ImageSet, task_id: int, stored: StoredImages) -> ImageSet:
    """The images of the task ``task_id``, then stored ones, each under its own task's id."""
    task_ids = torch.cat((torch.full((len(own),), task_id, dtype=torch.int64), stored.task_ids))
    return MixedImages([own, stored], task_ids)  # type: ignore[return-value]
