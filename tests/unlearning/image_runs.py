"""Runs on folders of images that can be deleted or moved afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from shelf import SMALL

CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")
LEARN = (*(word for word in SMALL if not word.startswith(("scenario.", "evaluation"))), "evaluation=boundaries")


def images(root: Path, train: int = 6, test: int = 4) -> Path:
    """``root/{train,test}/<class>/<i>.png``: noise around a colour of the class's own."""
    for split, count in (("train", train), ("test", test)):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            draw = np.random.default_rng([number, count])
            colour = np.array([40 * number, 255 - 40 * number, 128])
            for i in range(count):
                pixels = (colour + draw.integers(-30, 31, (16, 16, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def words_for(root: Path, cache: Path, *more: str) -> tuple[str, ...]:
    """What a run on such a folder is started with: three tasks of two classes."""
    return (
        "scenario=image_folder", f"scenario.path={root}", "scenario.num_tasks=3", f"data.cache_dir={cache}", *LEARN,
        *more,
    )  # fmt: skip
