"""Uniform numbers as a pure function of a seed and a counter, so that a draw needs no generator whose place is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox(key: tuple[int, int], counter: tuple[NDArray[np.uint64], ...]) -> tuple[NDArray[np.uint64], ...]:
    """Philox 4x32 with ten rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

    Args:
        key: two 32-bit words.
        counter: four arrays (n,) of 32-bit words, each word in a ``uint64``.

    Returns:
        four arrays (n,) of 32-bit words, each in a ``uint64``.
    """
    first, second = key
    x0, x1, x2, x3 = counter
    for _ in range(10):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            (p1 >> _WORD) ^ x1 ^ np.uint64(first),
            p1 & _LOW,
            (p0 >> _WORD) ^ x3 ^ np.uint64(second),
            p0 & _LOW,
        )
        first, second = (first + _WEYL[0]) & 0xFFFFFFFF, (second + _WEYL[1]) & 0xFFFFFFFF
    return x0, x1, x2, x3


def counter_uniforms(seed: int, index: Any, major: Any = 0, minor: Any = 0) -> tuple[Floats, Floats]:
    """Two independent uniforms in [0, 1) for every counter, with 53 random bits each.

    The value depends on (seed, index, major, minor) alone: not on order, on chunks, or on what was drawn before.

    Args:
        seed: 0 <= seed < 2^64, as :func:`cl_platform.random_streams.stream_seed` gives it.
        index: (n,) whole numbers >= 0.
        major: (n,) or one whole number, taken modulo 2^32; a stream of its own for each value.
        minor: as ``major``.

    Returns:
        two float64 arrays (n,).
    """
    places = np.asarray(index, dtype=np.int64).astype(np.uint64)
    counter = (places & _LOW, places >> _WORD, _word(major, places.shape), _word(minor, places.shape))
    x0, x1, x2, x3 = philox((seed & 0xFFFFFFFF, seed >> 32), counter)
    return _unit(x0, x1), _unit(x2, x3)


def _word(value: Any, shape: tuple[int, ...]) -> NDArray[np.uint64]:
    return np.broadcast_to(np.asarray(value, dtype=np.int64).astype(np.uint64) & _LOW, shape)


def _unit(high: NDArray[np.uint64], low: NDArray[np.uint64]) -> Floats:
    bits = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))  # 27 + 26 bits
    return bits.astype(np.float64) * 2.0**-53
