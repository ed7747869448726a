"""A small folder of coloured pictures, and a run that was trained on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn

from cl_platform.cli.compose import compose
from cl_platform.run import run
from cl_platform.run_config import parse

NAMES = ("=SUM(A1)", "heron", "otter", "trout")
SIZE = (20, 14)
"""Width and height of the files: neither square nor the size in which a run stores them."""
SIDE = 16


class TinyNet(nn.Module):
    """Images (B, 3, 24, 24) to features (B, 64), in next to no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 6, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def picture_folder(root: Path, train: int = 6, test: int = 3) -> Path:
    """``root/{train,test}/<class>/<number>.png``, a colour and a pattern a class, and noise."""
    draws = np.random.default_rng(0)
    for label, name in enumerate(NAMES):
        colour = np.array([40 + 60 * label, 200 - 50 * label, 90 * (label % 2)])
        for split, count in (("train", train), ("test", test)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = draws.integers(-30, 30, (SIZE[1], SIZE[0], 3))
                pixels = (colour + noise).clip(0, 255).astype(np.uint8)
                pixels[:: label + 2] //= 2
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


CHEAP = (
    "backbone=custom", "backbone._target_=pictures.TinyNet", "backbone.input_size=24", "trainer.accelerator=cpu",
    "trainer.max_epochs=1", "trainer.progress=false", "report.html=false", "report.tensorboard_figures=false",
    "evaluation=boundaries", "logger=[]",
)  # fmt: skip


def run_on(pictures: Path, folder: Path, *words: str):
    """A finished run of two tasks in ``folder/run``; by default one in closed form."""
    made = [
        "scenario=image_folder", f"scenario.path={pictures}", "scenario.num_tasks=2", f"scenario.image_size={SIDE}",
        f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}", *CHEAP,
    ]  # fmt: skip
    strategy = [] if any(word.startswith("strategy=") for word in words) else ["strategy=nmc"]
    return run(parse(compose([*strategy, *made, *words])))
