"""What travels from the stream to the losses: one frozen batch, and what the learner computed from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def constant(values: Sequence[Any] | float, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on ``device``; the host does not wait for the copy."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """Images of one step; every way of changing it returns a new one.

    Attributes:
        images: (B, C, H, W); uint8 as stored, or float after the transforms.
        labels: (B,) int64 global class ids.
        example_ids: (B,) int64, the row of each image in the data set's training (or test) split.
        task_ids: (B,) int64, the task each image belongs to.
        is_replay: (B,) bool, true for rows that a buffer added.
        extra: further columns by name, each with B rows (stored logits, query features).
    """

    images: Tensor
    labels: Tensor
    example_ids: Tensor
    task_ids: Tensor
    is_replay: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def replace(self, **changes: Any) -> Batch:
        """A copy with some fields exchanged."""
        return dataclasses.replace(self, **changes)

    def with_extra(self, **columns: Tensor) -> Batch:
        """A copy with further columns in ``extra``."""
        return dataclasses.replace(self, extra={**self.extra, **columns})

    def select(self, rows: Tensor) -> Batch:
        """The rows at which ``rows`` (B,) bool is true, or that ``rows`` (k,) int64 names, of every column."""
        columns = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self) if f.name != "extra"}
        return Batch(**columns, extra={name: column[rows] for name, column in self.extra.items()})

    def joined(self, other: Batch) -> Batch:
        """Both batches one after the other; of ``extra`` the columns that both have."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "extra"]
        columns = {name: torch.cat((getattr(self, name), getattr(other, name))) for name in names}
        shared = [name for name in self.extra if name in other.extra]
        extra = {name: torch.cat((self.extra[name], other.extra[name])) for name in shared}
        return Batch(**columns, extra=extra)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy with every tensor on ``device``."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if f.name != "extra"
        }
        extra = {name: column.to(device, non_blocking=non_blocking) for name, column in self.extra.items()}
        return Batch(**moved, extra=extra)
