"""Decoded images on disk: one uint8 memory map per split, found by the content of the files it was made from.

``entries/<content key>/`` holds the arrays. ``index/<listing key>.json`` leads from names, sizes and times to the
content key, so that an unchanged folder is recognised without reading it; a folder that was copied or touched is read
once, and its images are not decoded again. Both are written under a temporary name and renamed: two processes may
build the same entry, and the second one then uses the first one's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cl_platform.errors import UserError
from cl_platform.files import sync, write_atomically
from cl_platform.scenarios.decode import UnreadableImageError, decode, header
from cl_platform.scenarios.image_set import Pixels
from cl_platform.scenarios.listing import File, Listing, shown

log = logging.getLogger(__name__)

FORMAT = "cl_platform/decoded/1"
DEFAULT_SIDE = 256
_WORKERS = 2
_CHUNK = 256
_KEY = r"[0-9a-f]{40}"
_SAMPLE = 500  # files whose size is looked at before decoding


@dataclass(frozen=True)
class Decoded:
    """The two splits of a data set as memory maps, and the number of unreadable files left out."""

    train: Pixels
    test: Pixels
    skipped: int


def decoded(listing: Listing, cache: Path, image_size: int | None, skip_corrupt: bool) -> Decoded:
    """The images of a listing, decoded now or found in the cache.

    Args:
        listing: the files; their order gives the rows.
        cache: folder of the cache; made if missing.
        image_size: side of the stored images in pixels; None keeps the files' own size where they are square, equal
            (judged by files spread over the data set) and at most 256 pixels wide, and takes 256 otherwise.
        skip_corrupt: leave unreadable images out.

    Raises:
        UserError: an unreadable image, or a cache folder that cannot be written.
    """
    with _cache_errors(cache):
        index = cache / "index" / f"{_listing_key(listing, image_size, skip_corrupt)}.json"
        content = _read_index(index)
        if content is not None:
            found = _open(cache / "entries" / content)
            if found is not None:
                return found
        started = time.monotonic()
        (cache / "entries").mkdir(parents=True, exist_ok=True)
        (cache / "index").mkdir(parents=True, exist_ok=True)
        content = _content_key(listing, image_size, skip_corrupt)
        found = _open(cache / "entries" / content)
        if found is None:
            log.info("decoding %d images of %s", len(listing.train) + len(listing.test), shown(str(listing.root)))
            _build(listing, cache / "entries" / content, image_size, skip_corrupt)
            found = _open(cache / "entries" / content)
            log.info("decoded in %.1f s, kept in %s", time.monotonic() - started, cache)
        if found is None:
            raise UserError("data.cache_dir", cache, "a new entry cannot be read back", "Choose another data.cache_dir")
        write_atomically(index, json.dumps({"entry": content}))
        return found


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename if error.filename is not None else cache
        raise UserError(
            "data.cache_dir",
            cache,
            f"decoded images cannot be kept there ({error.strerror or error}: {where})",
            "Set data.cache_dir to a folder with space that can be written",
        ) from error


def _listing_key(listing: Listing, image_size: int | None, skip_corrupt: bool) -> str:
    key = hashlib.sha256(f"{FORMAT}|{image_size}|{skip_corrupt}".encode())
    for files in (listing.train, listing.test):
        key.update(b"\0split\0")
        key.update(b"\0".join(os.fsencode(f"{f.path}|{f.size}|{f.mtime_ns}|{f.label}|{f.domain}") for f in files))
    return key.hexdigest()[:40]


def _content_key(listing: Listing, image_size: int | None, skip_corrupt: bool) -> str:
    def digests(files: Sequence[File]) -> bytes:
        total = hashlib.sha256()
        for file in files:
            content = hashlib.sha256(_read(listing, file)).digest()
            total.update(os.fsencode(f"{file.path}|{file.label}|{file.domain}|") + content)
        return total.digest()

    key = hashlib.sha256(f"{FORMAT}|{image_size}|{skip_corrupt}".encode())
    with ThreadPoolExecutor(_WORKERS) as pool:
        for files in (listing.train, listing.test):
            key.update(b"\0split\0")
            for part in pool.map(digests, _chunks(files)):
                key.update(part)
    return key.hexdigest()[:40]


def _read(listing: Listing, file: File) -> bytes:
    if listing.reader is not None:
        return listing.reader(file)
    try:
        return (listing.root / file.path).read_bytes()
    except OSError as error:
        path = shown(str(listing.root / file.path))
        raise UserError(listing.key, path, f"the file cannot be read ({error.strerror})", "Check its rights") from error


def _chunks(files: Sequence[File]) -> Iterator[Sequence[File]]:
    for start in range(0, len(files), _CHUNK):
        yield files[start : start + _CHUNK]


def _stored_form(listing: Listing, image_size: int | None) -> tuple[int, int]:
    """Side in pixels and number of channels that the stored images get.

    The side is judged by files spread over the data set. Grey images are stored with one channel only if all are grey,
    so as long as no coloured one is found, all files are looked at.
    """
    files = (*listing.train, *listing.test)
    stride = max(1, len(files) // _SAMPLE)
    sides = set()
    grey = True
    for file in files[::stride]:
        form = _header(listing, file)
        if form is not None:
            sides.add(form[:2])
            grey = grey and form[2]
    grey = grey and bool(sides)
    if grey:
        grey = all(form[2] for form in (_header(listing, file) for file in files) if form is not None)
    channels = 1 if grey else 3
    if image_size is not None:
        return image_size, channels
    width, height = next(iter(sides)) if len(sides) == 1 else (0, 1)
    return (width if width == height and width <= DEFAULT_SIDE else DEFAULT_SIDE), channels


def _header(listing: Listing, file: File) -> tuple[int, int, bool] | None:
    try:
        return header(_read(listing, file))
    except UnreadableImageError:
        return None  # named when it is decoded


def _build(listing: Listing, entry: Path, image_size: int | None, skip_corrupt: bool) -> None:
    side, channels = _stored_form(listing, image_size)
    folder = Path(tempfile.mkdtemp(prefix=f"building-{os.getpid()}-", dir=entry.parent))
    try:
        about: dict[str, Any] = {"format": FORMAT, "skipped": 0}
        for split, files in (("train", listing.train), ("test", listing.test)):
            digest, skipped = _build_split(listing, split, files, folder, (channels, side), skip_corrupt)
            about[split] = digest
            about["skipped"] += skipped
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
        for path in sorted(folder.iterdir()):
            sync(path)
        sync(folder)
        try:
            os.rename(folder, entry)
        except OSError:
            if _open(entry) is None:  # not another process's finished entry, so the failure is ours to report
                raise
        else:
            sync(entry.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build_split(
    listing: Listing, split: str, files: Sequence[File], folder: Path, form: tuple[int, int], skip_corrupt: bool
) -> tuple[str, int]:
    """Decode one split into ``<split>.npy`` and ``<split>_labels.npy``; its digest and the number of skipped files."""
    channels, side = form

    def work(chunk: Sequence[File]) -> list[np.ndarray | str]:
        return [_decode_one(listing, file, side, channels) for file in chunk]

    shape = (len(files), channels, side, side)
    pixels = np.lib.format.open_memmap(folder / f"{split}.npy", mode="w+", dtype=np.uint8, shape=shape)
    total = hashlib.sha256()
    kept: list[File] = []
    next_note = time.monotonic() + 5.0
    with ThreadPoolExecutor(_WORKERS) as pool:
        for chunk, results in zip(_chunks(files), _bounded_map(pool, work, list(_chunks(files))), strict=True):
            for file, result in zip(chunk, results, strict=True):
                if isinstance(result, str):
                    _refuse_or_log(listing, file, result, skip_corrupt)
                    continue
                pixels[len(kept)] = result
                total.update(np.ascontiguousarray(result).data)
                kept.append(file)
            if time.monotonic() > next_note:
                log.info("%s: %d of %d images decoded", split, len(kept), len(files))
                next_note = time.monotonic() + 5.0
    pixels.flush()
    if len(kept) < len(files):
        np.save(folder / f"{split}_short.npy", pixels[: len(kept)])
        del pixels
        os.replace(folder / f"{split}_short.npy", folder / f"{split}.npy")
    labels = np.array([[f.label, f.domain] for f in kept], dtype=np.int64).reshape(-1, 2)
    np.save(folder / f"{split}_labels.npy", labels)
    total.update(labels.tobytes())
    return total.hexdigest(), len(files) - len(kept)


def _bounded_map(pool: ThreadPoolExecutor, work: Any, chunks: list[Sequence[File]]) -> Iterator[list[np.ndarray | str]]:
    """``pool.map`` that keeps only a few chunks of results waiting."""
    waiting = [pool.submit(work, chunk) for chunk in chunks[: 2 * _WORKERS]]
    for number in range(len(chunks)):
        yield waiting.pop(0).result()
        if number + 2 * _WORKERS < len(chunks):
            waiting.append(pool.submit(work, chunks[number + 2 * _WORKERS]))


def _decode_one(listing: Listing, file: File, side: int, channels: int) -> np.ndarray | str:
    try:
        return decode(_read(listing, file), side, channels)
    except UnreadableImageError as error:
        return str(error)


def _refuse_or_log(listing: Listing, file: File, reason: str, skip_corrupt: bool) -> None:
    path = shown(str(listing.root / file.path))
    if not skip_corrupt:
        raise UserError(
            listing.key,
            path,
            f"the image cannot be read ({reason})",
            "Replace or remove the file, or set data.skip_corrupt=true to leave such files out",
        )
    log.warning("left out unreadable image %s (%s)", path, reason)


def _open(entry: Path) -> Decoded | None:
    """The entry's memory maps, or None if it is missing or damaged (a damaged one is removed)."""
    if not entry.is_dir():
        return None
    try:
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        splits = {}
        for split in ("train", "test"):
            images = np.load(entry / f"{split}.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(entry / f"{split}_labels.npy", allow_pickle=False)
            if len(images) != len(labels) or images.dtype != np.uint8:
                raise ValueError("lengths differ")
            columns = np.ascontiguousarray(labels.T)
            splits[split] = Pixels(images, columns[0], str(about[split]), columns[1])
        return Decoded(splits["train"], splits["test"], int(about["skipped"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        log.warning("removing a damaged cache entry %s (%s)", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _read_index(path: Path) -> str | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["entry"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if isinstance(content, str) and content.isalnum() else None


# -- purge ------------------------------------------------------------------------------------------------------------


def kept_at(images: np.ndarray) -> list[Path]:
    """Where decoded images lie in a cache: what leads to their entry, and it; nothing for images from elsewhere.

    Args:
        images: of a data set's training or test split, or rows of it.
    """
    name = getattr(images, "filename", None)
    entry = None if name is None else Path(name).parent
    if entry is None or not is_kept(entry):
        return []
    index = sorted((entry.parent.parent / "index").glob("*.json"))
    return [*(path for path in index if _read_index(path) == entry.name), entry]


def is_kept(path: Path) -> bool:
    """Whether a path is an entry of a cache of decoded images, or leads to one."""
    if path.parent.name == "index":
        return re.fullmatch(_KEY + r"\.json", path.name) is not None and path.is_file()
    return path.parent.name == "entries" and re.fullmatch(_KEY, path.name) is not None and path.is_dir()


def remove(path: Path) -> None:
    """Delete what :func:`kept_at` named; whoever needs the images decodes them anew. Nothing else is ever touched.

    An entry that a crash leaves half deleted is no entry for those who look for it.
    """
    if is_kept(path):
        path.unlink() if path.is_file() else shutil.rmtree(path)
