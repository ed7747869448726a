"""What learners in closed form share: exact sums on an integer grid, solved systems, values worked out once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from cl_platform.errors import UserError
from cl_platform.slots import Slots

GRID_BITS = 18
"""Values are kept as integers of at most 2^18, so that sums and products in float64 are exact in any order."""

EXACT_BELOW = 2.0**53
"""Every partial sum of integers stays exact in float64 while it is below."""

RETRIES = 16
T = TypeVar("T")


def grid_scale(bound: float) -> float:
    """Grid steps per unit for values of at most ``bound``; a power of two."""
    return 2.0 ** (GRID_BITS - math.ceil(math.log2(bound)))


def on_grid(values: Tensor, bound: float, key: str) -> Tensor:
    """Values (n, d) as integers in float64; divide sums by :func:`grid_scale`, products by its square.

    Raises:
        UserError: a value beyond the bound, or none; clipping it would be silent, a bound from the data would leak.
    """
    largest = float(values.abs().max()) if values.numel() else 0.0
    if not largest <= bound:  # a NaN is refused as well
        raise UserError(key, bound, f"a feature value of {largest:.4g} lies beyond it", "Raise it")
    return (values.double() * grid_scale(bound)).round()


def class_sums(grid: Tensor, labels: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
    """Sums (C, d), counts (C,) and ascending ids (C,) of the classes of rows (n, d)."""
    order = torch.tensor(sorted(classes), device=labels.device)
    index = torch.searchsorted(order, labels)
    total = grid.new_zeros(len(order), grid.shape[1]).index_add_(0, index, grid)
    return {"sum": total, "count": torch.bincount(index, minlength=len(order)), "classes": order}


def gram(grid: Tensor, bound: float, key: str) -> Tensor:
    """``sum x x^T`` (d, d) of rows (n, d) on the grid, exact.

    Raises:
        UserError: so many or so large rows that a sum would be rounded; the diagonal bounds every partial sum.
    """
    product = grid.T @ grid
    refuse_rounding(product, len(grid), bound, key)
    return product


def refuse_rounding(product: Tensor, count: int, bound: float, key: str) -> None:
    """A ``UserError`` where a sum of products (d, d) over ``count`` images has left the exact integers."""
    if product.numel() and float(product.diagonal().max()) >= EXACT_BELOW:
        raise UserError(key, bound, f"{count} images of such size add up to more than is exact", "Raise it")


def counted(stats: Slots) -> list[int]:
    """Classes with at least one image in the tasks' records, ascending."""
    found = [ids[count > 0] for ids, count in zip(stats.all("classes"), stats.all("count"), strict=True)]
    return torch.cat(found).unique().tolist() if found else []


def pooled(
    labels: Sequence[Tensor], sums: Sequence[Tensor], counts: Sequence[Tensor]
) -> tuple[list[int], Tensor, Tensor]:
    """Classes with an image, ascending, their summed rows (S, d) and counts (S,), over the tasks' records.

    Sums of integers: neither the order of the tasks nor their number changes a bit.
    """
    ids, total, count = torch.cat(list(labels)), torch.cat(list(sums)), torch.cat(list(counts))
    classes, place = ids[count > 0].unique(return_inverse=True)
    rows = total.new_zeros(len(classes), total.shape[1]).index_add_(0, place, total[count > 0])
    return classes.tolist(), rows, count.new_zeros(len(classes)).index_add_(0, place, count[count > 0])


def solve_positive(matrix: Tensor, right: Tensor, ridge: float) -> tuple[Tensor, float]:
    """``(matrix + ridge I)^-1 right`` by Cholesky in float64, and the ridge that it took.

    Where rounding leaves the matrix indefinite the ridge grows tenfold until the factor exists.

    Args:
        matrix: (d, d), symmetric, positive semidefinite.
        right: (d, k).
        ridge: at least 0.
    """
    floor = float(matrix.diagonal().mean()) * 1e-16
    for _ in range(RETRIES):
        damped = matrix.clone()
        damped.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_solve(right, factor), ridge
        ridge = 10 * max(ridge, floor)
    raise RuntimeError("the matrix is not positive semidefinite")


class Derived(Generic[T]):
    """A value worked out from tensors, kept until one of them is exchanged or written to. No part of any state."""

    def __init__(self) -> None:
        self._sources: list[Tensor] = []
        self._versions: list[int] = []
        self._value: T | None = None

    def get(self, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        """The kept value, or that of ``make()`` where ``sources`` are not as they were."""
        versions = [tensor._version for tensor in sources]
        same = len(sources) == len(self._sources) and all(a is b for a, b in zip(sources, self._sources, strict=True))
        if self._value is None or not same or versions != self._versions:
            self._value, self._sources, self._versions = make(), list(sources), versions
        return self._value

    def clear(self) -> None:
        """Let go of the value and of the tensors that it came from."""
        self._value, self._sources, self._versions = None, [], []
