"""What a slot of a buffer is made of, how many bytes it takes, and the rows that a draw gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cl_platform.batch import Batch
from cl_platform.errors import UserError

COLUMNS: dict[str, torch.dtype] = {
    "images": torch.uint8,
    "labels": torch.int32,
    "task_ids": torch.int16,
    "example_ids": torch.int64,
    "steps": torch.int64,
    "keys": torch.float64,
    "logits": torch.float32,
    "num_columns": torch.int16,
}
"""The tensors of a buffer, each with a row per slot; the last three only where they are needed."""

LARGEST_TASK_ID = torch.iinfo(torch.int16).max


def column_shapes(
    image_shape: tuple[int, int, int], keyed: bool = False, num_columns: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Shape of one slot's part of each column that is there."""
    shapes: dict[str, tuple[int, ...]] = {"images": tuple(image_shape)}
    shapes |= dict.fromkeys(("labels", "task_ids", "example_ids", "steps"), ())
    if keyed:
        shapes["keys"] = ()
    if num_columns is not None:
        shapes |= {"logits": (num_columns,), "num_columns": ()}
    return shapes


def bytes_per_slot(image_shape: tuple[int, int, int], keyed: bool = False, num_columns: int | None = None) -> int:
    """Bytes of one remembered example: image, label, task id, example id and step; key; logits and their number."""
    channels, height, width = image_shape
    logits = 0 if num_columns is None else 4 * num_columns + 2
    return channels * height * width + 4 + 2 + 8 + 8 + 8 * keyed + logits


def slots_for_bytes(
    total: int, image_shape: tuple[int, int, int], keyed: bool = False, num_columns: int | None = None
) -> int:
    """How many examples fit into ``total`` bytes, rounded down.

    Raises:
        UserError: not even one does.
    """
    each = bytes_per_slot(image_shape, keyed, num_columns)
    if total < each:
        raise UserError("buffer.bytes", total, f"one example takes {each} bytes", "Raise buffer.bytes")
    return total // each


@dataclass(frozen=True)
class Replay:
    """Rows of one draw, on the buffer's device but for ``slots``.

    Attributes:
        slots: (b,) int64 on the host.
        images: (b, 3, H, W) uint8.
        labels: (b,) int64 class ids.
        task_ids: (b,) int64.
        example_ids: (b,) int64.
        logits: (b, C) float32, zero beyond a row's own columns, or None.
        num_columns: (b,) int64, how many columns of ``logits`` were given at insertion, or None.
    """

    slots: Tensor
    images: Tensor
    labels: Tensor
    task_ids: Tensor
    example_ids: Tensor
    logits: Tensor | None = None
    num_columns: Tensor | None = None

    def __len__(self) -> int:
        return int(self.slots.shape[0])

    def batch(self) -> Batch:
        """The rows as a batch, every one marked as replay; logits and their numbers of columns stand in ``extra``."""
        extra = {}
        if self.logits is not None and self.num_columns is not None:
            extra = {"logits": self.logits, "num_columns": self.num_columns}
        marks = torch.ones_like(self.labels, dtype=torch.bool)
        return Batch(self.images, self.labels, self.example_ids, self.task_ids, marks, extra)
