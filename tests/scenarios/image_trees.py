"""Small folders of images for the tests of this room."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_tree(
    root: Path,
    classes: tuple[str, ...] = ("ant", "bee", "cat", "dog"),
    train: int = 5,
    test: int = 3,
    size: tuple[int, int] = (8, 8),
    grey: bool = False,
) -> Path:
    """``root/{train,test}/<class>/img_<i>.png`` of noise that depends on the file's place only."""
    for split, count in (("train", train), ("test", test)):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                draw = np.random.RandomState(1000 * number + i + (500 if split == "test" else 0))
                shape = size[::-1] if grey else (*size[::-1], 3)
                Image.fromarray(draw.randint(0, 256, shape, dtype=np.uint8)).save(folder / f"img_{i:03d}.png")
    return root
