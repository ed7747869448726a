"""What a user can say about the data: the keys below ``data`` and ``scenario``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cl_platform.config import setting as key
from cl_platform.errors import UserError

AUGMENTATIONS = ("none", "crop", "crop_flip", "resized_crop")
SETTINGS = ("class", "domain", "task")
_FOLDER = ("kind", ("image_folder",))


def user_cache() -> Path:
    """The user's cache folder: ``XDG_CACHE_HOME``, else ``~/.cache``.

    Raises:
        UserError: there is neither, as in a container without a home folder.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise UserError(
            "data.cache_dir",
            None,
            "a folder is needed, because this user has no home folder",
            "Set data.cache_dir=FOLDER",
        ) from error


@dataclass(frozen=True)
class DataConfig:
    """Keys under ``data``: where images come from and where decoded ones are kept."""

    root: str | None = key(None, doc="folder of data sets; null: CL_DATA_ROOT, else <user cache>/cl_platform/data")
    skip_corrupt: bool = key(False, doc="leave unreadable images out (counted) instead of stopping")
    cache_dir: str | None = key(None, doc="folder of decoded images; null: <user cache>/cl_platform/decoded")
    download: bool = key(True, doc="whether a data set that is not on disk may be downloaded")

    def __post_init__(self) -> None:
        for name in ("root", "cache_dir"):
            if getattr(self, name) == "":  # as of a shell variable that is not set
                raise UserError(f"data.{name}=", "", "is empty", f"Write data.{name}=FOLDER, or leave it out")

    def root_folder(self) -> Path:
        """The folder that holds one folder per data set."""
        named = self.root or os.environ.get("CL_DATA_ROOT")
        return Path(named).expanduser() if named else user_cache() / "cl_platform" / "data"

    def cache_folder(self) -> Path:
        """The folder of decoded images."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else user_cache() / "cl_platform" / "decoded"


@dataclass(frozen=True)
class ScenarioConfig:
    """Keys under ``scenario``: how a data set becomes tasks."""

    kind: str = key(doc="registered name, for example split_digits")
    num_tasks: int = key(5, min=1, doc="number of tasks; for class splits it divides the number of classes")
    setting: str = key("class", choices=SETTINGS, doc="class-, domain- or task-incremental")
    class_order: int | str | tuple[int | str, ...] = key(
        "natural", doc="natural | seed | coda:<repeat> | pilot:<seed> | list of class names or ids | file of these"
    )
    train_per_class: int | None = key(None, min=1, doc="training images kept per class (and domain); null: all")
    test_per_class: int | None = key(None, min=1, doc="test images kept per class (and domain); null: all")
    subset: str = key("first", choices=("first", "seeded"), doc="which ones: the first in file order, or a draw")
    online: bool = key(False, doc="single pass: one epoch per task")
    validation_share: float = key(0.0, min=0.0, max=0.9, doc="share of each class held out of training")
    skip_tasks: tuple[int, ...] = key(factory=tuple, doc="task ids left out; the others keep id, classes and order")
    image_size: int | None = key(None, min=1, doc="side in the cache, px; null: as stored if all are equal, else 256")
    domains: tuple[float, ...] | None = key(None, doc="rotated_*: one angle per task in degrees; null: equal steps")
    split_file: str | None = key(None, doc="split_imagenet_r: file that lists the test images of root/<class>/*")
    path: str | None = key(None, doc="image_folder: {train,test}/<class>/*, or a folder saved by datasets")
    image_column: str | None = key(
        None, doc="image_folder: column of a saved data set that holds the images", only_with=_FOLDER
    )
    label_column: str | None = key(
        None, doc="image_folder: column of a saved data set or of metadata.csv that holds the labels", only_with=_FOLDER
    )
    test_share: float | None = key(
        None,
        above=0.0,
        max=0.9,
        doc="image_folder: share of each class for testing, without a test split",
        only_with=_FOLDER,
    )
    benchmark: str | None = key(None, doc="avalanche: name of a classic benchmark, for example SplitMNIST")
    augment: str = key("none", choices=AUGMENTATIONS, doc="training augmentation")
    augment_scale: tuple[float, ...] = key((0.05, 1.0), doc="resized_crop: smallest and largest share of the area")
    test_transform: str = key("resize", choices=("resize", "resize_crop"), doc="resize, or resize and centre crop")
    interpolation: str = key("bicubic", choices=("bicubic", "bilinear"), doc="how images are resized")
    boundaries: str = key("shown", choices=("shown", "hidden"), doc="whether strategies are told of a new task")

    def __post_init__(self) -> None:
        low_high = self.augment_scale
        if len(low_high) != 2 or not 0.0 < low_high[0] <= low_high[1] <= 1.0:
            raise UserError(
                "scenario.augment_scale",
                list(low_high),
                "must be two numbers, 0 < smallest <= largest <= 1",
                "Write scenario.augment_scale=[0.05,1.0]",
            )


@dataclass(frozen=True)
class TransformConfig:
    """The part of a scenario that says how an image becomes a network's input; meanings as in ScenarioConfig."""

    augment: str = key("none", choices=AUGMENTATIONS)
    augment_scale: tuple[float, ...] = key((0.05, 1.0))
    test_transform: str = key("resize", choices=("resize", "resize_crop"))
    interpolation: str = key("bicubic", choices=("bicubic", "bilinear"))
