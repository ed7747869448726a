"""What prompt strategies share: first values, selection by angle, checks of block numbers, the order of learning."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.slots import Slots
from cl_platform.strategies.base import Context

INIT_RANGE = 0.01
"""Prompts and keys of L2P and DualPrompt start uniform in [0, 0.01), the initialiser of the authors' framework."""


def uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """First values of prompts and keys, uniform in [0, 0.01)."""
    return (torch.rand(shape, generator=generator) * INIT_RANGE).to(device)


def cosines(query: Tensor, key: Tensor) -> Tensor:
    """Cosines (B, M) of queries (B, D) and keys (M, D) in fp32; no matrix product, so batch mates change no bit."""
    with torch.autocast(device_type=query.device.type, enabled=False):
        return F.cosine_similarity(query.float()[:, None], key.float()[None], dim=2)


def largest(values: Tensor, k: int) -> Tensor:
    """Columns (B, k) of the ``k`` largest values (B, M), descending; of equal ones the lower column first."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def learning_order(trained: Slots) -> list[int]:
    """Task ids in the order in which they were learnt, from a record of that order which outlives dropped tasks."""
    return sorted(trained.task_ids, key=lambda task_id: trained.numbers(task_id, "order"))


def check_layers(key: str, layers: list[int], context: Context) -> None:
    """Refuse block numbers that the trunk does not have, or that come twice.

    Raises:
        UserError: with the range of blocks.
    """
    depth = getattr(context.backbone, "depth", 0)
    wrong = [number for number in layers if not 0 <= number < depth]
    if wrong or len(set(layers)) != len(layers):
        raise UserError(key, layers, f"must be different block numbers from 0 to {depth - 1}", f"Change {key}")
