"""Which input directions earlier tasks used: gradient projection memory and its dual form, in float64 on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ARBITRARY, NOISE = 1e-6, 1e-12
"""Singular vectors are arbitrary whose value is below this share of the largest, or of the moments' norm."""


@dataclass(frozen=True)
class Span:
    """A subspace by an orthonormal basis.

    Attributes:
        basis: (d, m).
        free: the basis spans what is still free, not what is used; whichever is smaller is kept.
    """

    basis: Tensor
    free: bool

    def allowed(self, matrix: Tensor) -> Tensor:
        """The part of ``matrix`` (d, k) that lies in the free directions."""
        inside = self.basis @ (self.basis.T @ matrix)
        return inside if self.free else matrix - inside


def design(moments: Tensor, span: Span | None, rank: int) -> Tensor:
    """Rows (rank, d) that read a task's inputs where earlier tasks have none.

    The leading left singular vectors of the allowed part of ``moments``, by 1/sqrt(3), the expected length of a row of
    a fresh adapter. Rows beyond the rank of that part are zero.

    Args:
        moments: (d, d), mean of x x^T.
        span: what earlier tasks used; ``None`` if there are none.
        rank: number of rows.
    """
    allowed = moments if span is None else span.allowed(moments)
    vectors, values = left_vectors(allowed)
    count = min(rank, len(values))
    rows = torch.zeros(rank, len(moments), dtype=moments.dtype)
    rows[:count] = vectors[:, :count].T / math.sqrt(3)
    rows[:count][values[:count] <= (ARBITRARY * values[0]).clamp_min(float(NOISE * moments.norm()))] = 0.0
    if span is not None:
        rows = span.allowed(rows.T).T  # rounding of the decomposition alone
    return rows


def extend_span(span: Span | None, moments: Tensor, share: float) -> Span:
    """The span after a task, so that it holds at least ``share`` of the squared singular values of ``moments``.

    The first task takes in one direction less than would reach the share, at least one, as the released code does.

    Args:
        span: what earlier tasks used.
        moments: (d, d), mean of x x^T over the task's inputs.
        share: e_t in [0, 1].
    """
    width = len(moments)
    energy = moments.square().sum()
    if span is None:
        vectors, values = left_vectors(moments)
        below = values.square().cumsum(0) / values.square().sum() < share
        count = max(1, int(below.sum()))
        if count < width / 2:
            return Span(vectors[:, :count], free=False)
        return Span(vectors[:, count:], free=True)
    inside = span.allowed(moments)  # what is not taken in yet
    vectors, values = left_vectors(inside)
    parts = values.square() / energy
    if span.free:
        return _shrunk(span, vectors, parts, share)
    held = 1.0 - inside.square().sum() / energy
    count = 0
    while held < share and count < len(parts):
        held, count = held + parts[count], count + 1
    if not count:
        return span
    basis = orthonormal(torch.cat([span.basis, vectors[:, :count]], dim=1)[:, :width])
    if basis.shape[1] > width / 2:
        return Span(complement(basis), free=True)
    return Span(basis, free=False)


def _shrunk(span: Span, vectors: Tensor, parts: Tensor, share: float) -> Span:
    outside, count = parts.sum(), 0
    while count < min(len(parts), span.basis.shape[1]) and outside >= 1 - share:
        outside, count = outside - parts[count], count + 1
    if not count:
        return span
    taken = vectors[:, :count]
    left, _ = left_vectors(span.basis - taken @ (taken.T @ span.basis))
    return Span(left[:, : span.basis.shape[1] - count], free=True)


def left_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors (d, min(d, k)), the largest entry of each positive, and the values, descending."""
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return _signed(vectors), values


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns (d, m), whose span and order it keeps."""
    basis, upper = torch.linalg.qr(columns)
    return basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)


def complement(basis: Tensor) -> Tensor:
    """An orthonormal basis (d, d - m) of the directions orthogonal to ``basis`` (d, m)."""
    vectors, _, _ = torch.linalg.svd(basis, full_matrices=True)
    return _signed(vectors[:, basis.shape[1] :])


def _signed(vectors: Tensor) -> Tensor:
    if not vectors.numel():
        return vectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
