"""Data sets that torchvision or Avalanche can download, and the message for one that is not there."""

from __future__ import annotations

import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_platform.errors import UserError
from cl_platform.scenarios.listing import Listing, listing_of_pairs

log = logging.getLogger(__name__)

Arrays = tuple[np.ndarray, np.ndarray]
REACHABLE_WITHIN = 8.0  # seconds to wait for a first answer of a download server


@dataclass(frozen=True)
class Fetched:
    """Images (N, C, H, W) uint8 and labels (N,) of both splits, class names, and who served them."""

    train: Arrays
    test: Arrays
    class_names: tuple[str, ...]
    origin: str


def fetch(dataset: str, root: Path, download: bool) -> Fetched | Listing:
    """A data set as its library stores it below ``root``, downloaded first when it is missing.

    Raises:
        UserError: it is not there and cannot be had; the message names the folder that would be read.
    """
    if dataset not in _FETCHERS:
        raise missing(dataset, root, "it cannot be downloaded automatically")
    load, folder, url = _FETCHERS[dataset]
    if (root / "downloads").is_dir():
        try:
            return load(folder, root / "downloads", False)
        except Exception as error:  # each library has its own way of saying that the files are not there
            log.debug("%s is not below %s: %s", dataset, root / "downloads", error)
    if not download:
        raise missing(dataset, root, "data.download=false forbids a download")
    refuse_unreachable(url, dataset, root)
    log.info("downloading %s to %s", dataset, root / "downloads")
    try:
        (root / "downloads").mkdir(parents=True, exist_ok=True)
        return load(folder, root / "downloads", True)
    except Exception as error:  # as above: network, disk and checksum failures differ by library
        raise missing(dataset, root, f"the download failed ({' '.join(str(error).split())[:160]})") from error


def missing(dataset: str, root: Path, reason: str, layout: str = "{train,test}/<class>/*") -> UserError:
    """The message for a data set that is neither on disk nor to be had."""
    return UserError(
        "data.root",
        root,
        f"{dataset} is missing: the folder {root / dataset} with {layout} would be read, and {reason}",
        f"Put the images there, or name the folder that holds {dataset}/ by data.root=FOLDER or $CL_DATA_ROOT, "
        "or use the embedded data with scenario=split_digits",
    )


def refuse_unreachable(url: str, dataset: str, root: Path) -> None:
    """A ``UserError`` within seconds when the server of a download does not answer."""
    outcome: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "Mozilla/5.0"})
            urllib.request.urlopen(request, timeout=REACHABLE_WITHIN / 2).close()
            outcome.append("")
        except urllib.error.HTTPError as error:
            # a server that refuses the question may still serve the file; a proxy that refuses everything will not
            outcome.append("" if error.code in (405, 501) else f"{url} answered {error.code}")
        except Exception as error:  # name resolution, refused connections, TLS: all mean that it cannot be reached
            outcome.append(f"{url} cannot be reached ({_cause(error)})")

    # in a thread, because name resolution has no time limit of its own
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACHABLE_WITHIN)
    reason = outcome[0] if outcome else f"{url} did not answer within {REACHABLE_WITHIN:g} s"
    if reason:
        raise missing(dataset, root, reason)


def _cause(error: Exception) -> str:
    """What went wrong on the way to a server, without the names of Python's classes."""
    reason = getattr(error, "reason", None) or error
    text = getattr(reason, "strerror", None) or str(reason)
    return " ".join(str(text).split())[:120] or "no answer"


def _mnist_like(name: str, root: Path, download: bool) -> Fetched:
    import torchvision.datasets as sets

    make = getattr(sets, name)
    train, test = (make(str(root), train=part, download=download) for part in (True, False))
    both = [(s.data.numpy()[:, None], s.targets.numpy()) for s in (train, test)]
    return Fetched(both[0], both[1], tuple(train.classes), f"torchvision's {name}")


def _cifar_like(name: str, root: Path, download: bool) -> Fetched:
    import torchvision.datasets as sets

    make = getattr(sets, name)
    train, test = (make(str(root), train=part, download=download) for part in (True, False))
    both = [(s.data.transpose(0, 3, 1, 2), np.asarray(s.targets)) for s in (train, test)]
    return Fetched(both[0], both[1], tuple(train.classes), f"torchvision's {name}")


def _tiny_imagenet(name: str, root: Path, download: bool) -> Listing:
    import avalanche.benchmarks.datasets as sets

    both = [sets.TinyImagenet(root=root / "tinyimagenet", train=part, download=download) for part in (True, False)]
    pairs = [list(zip(map(Path, s.data), map(int, s.targets), strict=True)) for s in both]
    names = [both[0].id2label[label] for label in sorted(both[0].id2label)]
    return listing_of_pairs(
        root / "tinyimagenet", names, pairs[0], pairs[1], note="downloaded by Avalanche, val as test"
    )


def _cub200(name: str, root: Path, download: bool) -> Listing:
    import avalanche.benchmarks.datasets as sets

    both = [sets.CUB200(root=root / "cub200", train=part, download=download) for part in (True, False)]
    images = root / "cub200" / sets.CUB200.images_folder
    pairs = [[(images / row[0], int(row[1])) for row in s._images] for s in both]
    folder_of = {label: path.parent.name for path, label in pairs[0]}
    names = [folder_of[label] for label in sorted(folder_of)]
    return listing_of_pairs(root / "cub200", names, pairs[0], pairs[1], note="downloaded by Avalanche, official split")


_FETCHERS: dict[str, tuple[Callable[[str, Path, bool], Fetched | Listing], str, str]] = {
    "mnist": (_mnist_like, "MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz"),
    "fmnist": (
        _mnist_like,
        "FashionMNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-images-idx3-ubyte.gz",
    ),
    "cifar10": (_cifar_like, "CIFAR10", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": (_cifar_like, "CIFAR100", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "tiny_imagenet": (_tiny_imagenet, "TinyImagenet", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"),
    "cub200": (
        _cub200,
        "CUB200",
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    ),
}


def download_url(dataset: str) -> str | None:
    """The address that a data set is downloaded from, or None if it is not known."""
    entry: Any = _FETCHERS.get(dataset)
    return entry[2] if entry else None
