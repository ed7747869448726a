"""Small folders of images whose files depend on their class alone, whichever folder it stands in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

ANIMALS = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen")


def animals(root: Path, classes: tuple[str, ...], train: int = 4, test: int = 2, side: int = 8) -> Path:
    """``root/{train,test}/<class>/<number>.png``: a colour and a stripe a class, and noise."""
    for name in classes:
        number = int(name) if name.isdigit() else ANIMALS.index(name)
        draws = np.random.default_rng(number)
        colour = draws.integers(40, 215, 3)
        for split, count in (("train", train), ("test", test)):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for place in range(count):
                pixels = colour + draws.integers(-40, 40, (side, side, 3))
                pixels[number % side] = 255
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{place}.png")
    return root
