"""Any two torch data sets of (image, label) as a stream."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cl_platform.errors import UserError
from cl_platform.scenarios.decode import GREY_MODES, to_pixels

_IN_MEMORY = 256 * 1024 * 1024  # bytes; larger arrays lie in an unnamed temporary file


def pixels_of(image: Any, side: int | None = None) -> np.ndarray:
    """One image as (C, H, W) uint8.

    Args:
        image: a PIL image; or a tensor or array (C, H, W) or (H, W), uint8 or floating point within 0..1.
        side: resize the shorter side to this and cut out the centre; None keeps the size.

    Raises:
        UserError: another type, or values outside 0..1, as a normalised tensor has.
    """
    if isinstance(image, Image.Image):
        return to_pixels(image, side, 1 if image.mode in GREY_MODES else 3)
    if not isinstance(image, (Tensor, np.ndarray)):
        raise _refused(type(image).__name__, "an image must be a PIL image, a tensor or an array")
    tensor = torch.as_tensor(image)
    if tensor.dim() == 2:
        tensor = tensor[None]
    if tensor.dim() != 3 or tensor.shape[0] not in (1, 3):
        raise _refused(tuple(tensor.shape), "a tensor image must have the shape (1 or 3, height, width)")
    if tensor.is_floating_point():
        if tensor.numel() and (tensor.min() < 0.0 or tensor.max() > 1.0):
            raise _refused("values outside 0..1", "a floating-point image must lie within 0..1, before normalisation")
        tensor = (tensor * 255.0).round()
    elif tensor.dtype != torch.uint8:
        raise _refused(str(tensor.dtype), "a tensor image must be uint8 or floating point")
    array = tensor.to(torch.uint8).numpy()
    if side is None or array.shape[1:] == (side, side):
        return array
    as_image = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    return to_pixels(as_image, side, len(array))


def _refused(value: object, allowed: str) -> UserError:
    return UserError("dataset", value, allowed, "Change the data set's transform")


def arrays_of(dataset: Any, side: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, C, H, W) uint8 and labels (N,) int64 of a data set with ``len`` and ``[i] -> (image, label, ...)``.

    Images of the first one's size stay as they are; with ``side`` None, others are a ``UserError``.
    """
    count = len(dataset)
    labels = np.zeros(count, dtype=np.int64)
    if count == 0:
        return np.zeros((0, 3, side or 1, side or 1), dtype=np.uint8), labels
    images: np.ndarray | None = None
    for row in range(count):
        item = dataset[row]
        image = pixels_of(item[0], side)
        if images is None:
            images = _allocate((count, *image.shape))
        if image.shape[1:] != images.shape[2:]:
            raise _refused(
                f"{image.shape[2]} x {image.shape[1]} pixels in row {row}",
                f"the first image has {images.shape[3]} x {images.shape[2]}; give image_size to bring all to one size",
            )
        if image.shape[0] > images.shape[1]:  # a coloured image after grey ones
            wider = _allocate((count, 3, *images.shape[2:]))
            wider[:row] = images[:row]
            images = wider
        images[row] = image  # a grey image is repeated over the channels
        labels[row] = int(item[1])
    assert images is not None
    return images, labels


def _allocate(shape: Sequence[int]) -> np.ndarray:
    if int(np.prod(shape)) <= _IN_MEMORY:
        return np.zeros(tuple(shape), dtype=np.uint8)
    with tempfile.TemporaryFile() as file:  # the map keeps the space until it is dropped
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=tuple(shape))
