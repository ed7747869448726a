"""One image file to uint8 pixels, whatever its colour mode."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 100_000_000
GREY_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I;16N", "I")


class UnreadableImageError(Exception):
    """The bytes are no image that can be decoded; the message says why."""


def header(data: bytes) -> tuple[int, int, bool]:
    """Width and height after the EXIF orientation, and whether the image is grey, from a file's first bytes."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (height, width, image.mode in GREY_MODES) if turned else (width, height, image.mode in GREY_MODES)
    except Exception as error:  # whatever a decoder raises on broken bytes means the same
        raise UnreadableImageError(_reason(error)) from error


def decode(data: bytes, size: int | None, channels: int) -> np.ndarray:
    """Decode an image file.

    The EXIF orientation is applied; of an animation the first frame is taken; transparent pixels lie on black; 16-bit
    grey is scaled to 8 bits. With ``size`` the shorter side is resized (bicubic) to it and the centre is cut out; an
    image that has that size already is left alone.

    Args:
        data: the file's bytes.
        size: side of the square result in pixels, or None for the image's own size.
        channels: 1 (grey) or 3 (RGB).

    Returns:
        (channels, H, W) uint8.

    Raises:
        UnreadableImageError: broken bytes, or more than ``MAX_PIXELS`` pixels.
    """
    if not data:
        raise UnreadableImageError("it is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableImageError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}")
            image.load()
            upright = ImageOps.exif_transpose(image) if image.getexif() else image
            return to_pixels(upright, size, channels)
    except UnreadableImageError:
        raise
    except Exception as error:  # whatever a decoder raises on broken bytes means the same
        raise UnreadableImageError(_reason(error)) from error


def to_pixels(image: Image.Image, size: int | None, channels: int) -> np.ndarray:
    """A PIL image as (channels, H, W) uint8; see :func:`decode`."""
    image = _eight_bit(image, channels)
    if size is not None and image.size != (size, size):
        image = _square(image, size)
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _eight_bit(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        black = Image.new("RGBA", over.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, over)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _square(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # the same as resizing the shorter side and cutting out the centre, in one step and without rounding the longer side
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known image format"
    return text[:200] or type(error).__name__
