"""Where the images of a named data set come from: a folder, what ships with a library, or a download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cl_platform.errors import UserError
from cl_platform.scenarios import downloads
from cl_platform.scenarios.cache import decoded
from cl_platform.scenarios.config import DataConfig, ScenarioConfig
from cl_platform.scenarios.image_set import Pixels
from cl_platform.scenarios.layouts import image_folder_listing
from cl_platform.scenarios.listing import (
    File,
    Listing,
    class_folder_listing,
    folders,
    held_out,
    image_files,
    refuse_few_classes,
    session_listing,
    shown,
)
from cl_platform.scenarios.splits import class_chunks, class_order

DIGITS_TEST_SHARE = 0.2
_DIGITS_SEED = 20_240_229  # a constant: the digits' test set is the same in every run


@dataclass(frozen=True)
class Source:
    """A data set's two splits with its class names.

    Attributes:
        train: training images.
        test: test images.
        class_names: one name per class id.
        sentence: where the data came from.
        skipped: unreadable images left out.
        domain_names: names of the training domains, if the data set has any.
    """

    train: Pixels
    test: Pixels
    class_names: tuple[str, ...]
    sentence: str
    skipped: int = 0
    domain_names: tuple[str, ...] = ()


def in_memory(images: np.ndarray, labels: np.ndarray) -> Pixels:
    """Pixels of arrays (N, C, H, W) uint8 and (N,) class ids."""
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    digest = hashlib.sha256(np.ascontiguousarray(images).data)
    digest.update(labels.tobytes())
    return Pixels(images, labels, digest.hexdigest())


def digits() -> Source:
    """The 1,797 handwritten digits that ship with scikit-learn, 8 x 8, grey.

    Values 0..16 become ``round(value * 255 / 16)``. The test set is a fixed fifth of each class, drawn once with a
    constant seed: it does not depend on the run's seed.
    """
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    images = np.round(values * 255.0 / 16.0).astype(np.uint8).reshape(-1, 1, 8, 8)
    draw = np.random.RandomState(_DIGITS_SEED)
    in_test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        in_test[draw.permutation(rows)[: round(DIGITS_TEST_SHARE * len(rows))]] = True
    return Source(
        in_memory(images[~in_test], labels[~in_test]),
        in_memory(images[in_test], labels[in_test]),
        tuple(str(d) for d in range(10)),
        "the digits of scikit-learn, fixed stratified split, one fifth for testing",
    )


def named_dataset(dataset: str, scenario: ScenarioConfig, data: DataConfig) -> Source:
    """A data set by its folder name: ``<root>/<dataset>/{train,test}/<class>/*`` when that exists, else a download."""
    root = data.root_folder() / dataset
    if (root / "train").is_dir() and (root / "test").is_dir():
        return _from_listing(class_folder_listing(root), scenario, data)
    found = downloads.fetch(dataset, data.root_folder(), data.download)
    if isinstance(found, Listing):
        return _from_listing(found, scenario, data)
    return Source(
        in_memory(*found.train),
        in_memory(*found.test),
        found.class_names,
        f"{found.origin}, under {data.root_folder()}",
    )


def image_folder(scenario: ScenarioConfig, data: DataConfig) -> Source:
    """The user's own images below ``scenario.path``, in any layout of :mod:`cl_platform.scenarios.layouts`."""
    if not scenario.path:
        raise UserError(
            "scenario.path", None, "image_folder needs a folder with {train,test}/<class>/*", "Set scenario.path=FOLDER"
        )
    root = Path(scenario.path).expanduser()
    if not root.is_dir():
        raise UserError("scenario.path", scenario.path, "there is no such folder", "Correct the path")
    listing = image_folder_listing(root, scenario)
    # before the images are decoded, which takes minutes where there are many
    class_chunks(class_order(scenario.class_order, [shown(n) for n in listing.class_names]), scenario.num_tasks)
    return _from_listing(listing, scenario, data)


def core50(scenario: ScenarioConfig, data: DataConfig) -> Source:
    """CORe50 from ``<root>/core50/{train,test}/<session>/<class>/*``."""
    root = data.root_folder() / "core50"
    if not (root / "train").is_dir():
        raise downloads.missing(
            "core50", data.root_folder(), "it cannot be downloaded automatically", "{train,test}/<session>/<class>/*"
        )
    return _from_listing(session_listing(root), scenario, data)


def imagenet_r(scenario: ScenarioConfig, data: DataConfig) -> Source:
    """ImageNet-R from ``<root>/imagenet_r/{train,test}/<class>/*``, or from ``<class>/*`` with a split of its own.

    The data set has no official split. Without train and test folders the test images are those of
    ``scenario.split_file`` (a line or list item each, ending in ``<class>/<file>``), else a fifth of each class, those
    whose SHA-256 of ``<class>/<file>`` is smallest: the same on every machine.
    """
    root = data.root_folder() / "imagenet_r"
    if (root / "train").is_dir() and (root / "test").is_dir():
        return _from_listing(class_folder_listing(root), scenario, data)
    if not root.is_dir():
        raise downloads.missing(
            "imagenet_r", data.root_folder(), "it cannot be downloaded automatically; unpack imagenet-r.tar there"
        )
    return _from_listing(single_folder_listing(root, scenario.split_file), scenario, data)


def single_folder_listing(root: Path, split_file: str | None) -> Listing:
    """List ``<root>/<class>/*`` and divide it; see :func:`imagenet_r`."""
    names = folders(root, root, "data.root")
    refuse_few_classes(root, names, "data.root")
    wanted = _test_names(split_file) if split_file else None
    train: list[File] = []
    test: list[File] = []
    for label, name in enumerate(names):
        files = image_files(root, root / name, label, "data.root")
        if wanted is None:
            in_test = held_out(files, 0.2)
        else:
            in_test = {f.path for f in files if f.path in wanted}
        if not in_test or len(in_test) == len(files):
            raise UserError(
                "scenario.split_file" if split_file else "data.root",
                split_file or shown(str(root)),
                f"class {shown(name)} has {len(files) - len(in_test)} training and {len(in_test)} test images",
                "Give every class both",
            )
        train += [f for f in files if f.path not in in_test]
        test += [f for f in files if f.path in in_test]
    note = f"split: {split_file}" if split_file else "split: own"
    return Listing(root, tuple(names), tuple(train), tuple(test), note=note)


def _test_names(split_file: str) -> set[str]:
    path = Path(split_file).expanduser()
    if not path.is_file():
        raise UserError("scenario.split_file", split_file, "there is no such file", "Correct the path")
    names = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        parts = line.strip().lstrip("-").strip().strip("'\"").replace("\\", "/").split("/")
        if len(parts) >= 2:
            names.add("/".join(parts[-2:]))
    return names


def _from_listing(listing: Listing, scenario: ScenarioConfig, data: DataConfig) -> Source:
    result = decoded(listing, data.cache_folder(), scenario.image_size, data.skip_corrupt)
    sentence = f"the folder {shown(str(listing.root))}" + (f", {listing.note}" if listing.note else "")
    return Source(
        result.train,
        result.test,
        tuple(shown(n) for n in listing.class_names),
        sentence,
        result.skipped,
        tuple(shown(n) for n in listing.domain_names),
    )
