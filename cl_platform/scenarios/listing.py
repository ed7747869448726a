"""Which image files a data set has: ``<root>/{train,test}/<class>/*`` and its relatives."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cl_platform.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class File:
    """One image file: where it lies below the data set's folder, how large and how old it is, and its class."""

    path: str
    size: int
    mtime_ns: int
    label: int
    domain: int = 0


@dataclass(frozen=True)
class Listing:
    """The files of a data set by split, in the order that gives each image its row.

    Attributes:
        root: the data set's folder.
        class_names: sorted bytewise; the index is the class id.
        train: training files, by class and then by name, bytewise.
        test: test files in the same order.
        domain_names: names of the training domains; empty without domains.
        key: the configuration key that named the folder, for messages.
        note: what else to say about the split.
        reader: gives a file's bytes, where it is no file but a row of one.
    """

    root: Path
    class_names: tuple[str, ...]
    train: tuple[File, ...]
    test: tuple[File, ...]
    domain_names: tuple[str, ...] = ()
    key: str = "data.root"
    note: str = field(default="")
    reader: Callable[[File], bytes] | None = field(default=None, repr=False, compare=False)


def shown(name: str) -> str:
    """A file's name as printable text; bytes that are not UTF-8 are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")


def folders(root: Path, where: Path, key: str) -> list[str]:
    """Names of the visible folders in ``where``, sorted bytewise; links must stay below ``root``."""
    names = []
    try:
        with os.scandir(where) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_dir():
                    if entry.is_symlink():
                        refuse_escape(root, Path(entry.path), key)
                    names.append(entry.name)
    except OSError as error:
        raise UserError(
            key, where, f"the folder cannot be read ({error.strerror})", "Check its path and rights"
        ) from error
    return sorted(names, key=os.fsencode)


def image_files(root: Path, where: Path, label: int, key: str, domain: int = 0) -> list[File]:
    """The image files directly in ``where``, sorted bytewise by name; other files are passed over."""
    found = []
    prefix = os.path.relpath(where, root)
    with os.scandir(where) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.lower().endswith(SUFFIXES):
                continue
            if entry.is_symlink():
                refuse_escape(root, Path(entry.path), key)
            if entry.is_file():
                stat = entry.stat()
                found.append(File(os.path.join(prefix, entry.name), stat.st_size, stat.st_mtime_ns, label, domain))
    return sorted(found, key=lambda f: os.fsencode(f.path))


def refuse_escape(root: Path, link: Path, key: str) -> None:
    """A ``UserError`` when a link leads out of the data set's folder."""
    inside = os.path.realpath(root)
    if os.path.commonpath([inside, os.path.realpath(link)]) != inside:
        raise UserError(
            key,
            shown(str(link)),
            f"the link leads out of {shown(str(root))}",
            "Replace the link by the file it points to",
        )


def class_folder_listing(root: Path, key: str = "data.root", test: str = "test") -> Listing:
    """List ``<root>/{train,test}/<class>/*``.

    Args:
        root: the data set's folder.
        key: the configuration key that named it.
        test: name of the folder of test images.

    Raises:
        UserError: a missing or empty folder, fewer than two classes, a test class that is not in the training folder,
            or a link that leads out of the folder.
    """
    for split in ("train", test):
        if not (root / split).is_dir():
            raise UserError(
                key,
                shown(str(root)),
                f"there is no folder {shown(str(root / split))}",
                "Lay images out as {train,test}/<class>/*",
            )
        if (root / split).is_symlink():
            refuse_escape(root, root / split, key)
    names = folders(root, root / "train", key)
    test_names = folders(root, root / test, key)
    refuse_few_classes(root / "train", names, key)
    extra = sorted(set(test_names) - set(names))
    if extra:
        raise UserError(
            key,
            shown(str(root)),
            f"{test}/{shown(extra[0])} is no class of the training folder",
            "Make the class folders of both equal",
        )
    files: dict[str, list[File]] = {"train": [], test: []}
    for label, name in enumerate(names):
        for split, present in (("train", names), (test, test_names)):
            here = image_files(root, root / split / name, label, key) if name in present else []
            if not here:
                raise UserError(
                    key,
                    shown(str(root / split / name)),
                    f"the class has no images (files ending in {', '.join(SUFFIXES)})",
                    "Add images, or remove the class from both train and test",
                )
            files[split] += here
    return Listing(root, tuple(names), tuple(files["train"]), tuple(files[test]), key=key)


def held_out(files: Sequence[File], share: float) -> set[str]:
    """Paths of a share of a class's files: those whose SHA-256 of the path is smallest, the same on every machine."""
    ranked = sorted(files, key=lambda f: hashlib.sha256(f.path.encode("utf-8", "surrogateescape")).digest())
    return {file.path for file in ranked[: round(share * len(files))]}


def refuse_few_classes(where: Path, names: Sequence[str], key: str) -> None:
    """A ``UserError`` when a folder holds no class, or only one."""
    if len(names) < 2:
        found = "no class folder" if not names else f"only one class folder, {shown(names[0])}"
        raise UserError(
            key,
            shown(str(where)),
            f"it holds {found}; at least two are needed",
            "Lay images out as {train,test}/<class>/*",
        )


def session_listing(root: Path, key: str = "data.root") -> Listing:
    """List ``<root>/{train,test}/<session>/<class>/*``: one domain per training session, all test sessions together."""
    sessions = {split: folders(root, root / split, key) for split in ("train", "test") if (root / split).is_dir()}
    if not sessions.get("train") or not sessions.get("test"):
        raise UserError(
            key,
            shown(str(root)),
            "train and test must both hold sessions",
            "Lay images out as {train,test}/<session>/<class>/*",
        )
    names = sorted({n for s in sessions["train"] for n in folders(root, root / "train" / s, key)}, key=os.fsencode)
    refuse_few_classes(root / "train" / sessions["train"][0], names, key)
    files: dict[str, list[File]] = {"train": [], "test": []}
    for split in ("train", "test"):
        for domain, session in enumerate(sessions[split]):
            for name in folders(root, root / split / session, key):
                if name not in names:
                    raise UserError(key, f"{split}/{session}/{name}", "is no class of a training session", "Remove it")
                files[split] += image_files(root, root / split / session / name, names.index(name), key, domain)
    return Listing(root, tuple(names), tuple(files["train"]), tuple(files["test"]), tuple(sessions["train"]), key)


def listing_of_pairs(
    root: Path, names: Sequence[str], train: Sequence[tuple[Path, int]], test: Sequence[tuple[Path, int]], note: str
) -> Listing:
    """List files given as (path below ``root``, index into ``names``), in the order that class folders would have."""
    ordered = sorted(names, key=os.fsencode)
    label_of = {index: ordered.index(name) for index, name in enumerate(names)}

    def files(pairs: Sequence[tuple[Path, int]]) -> tuple[File, ...]:
        found = []
        for path, index in pairs:
            stat = path.stat()
            found.append(File(os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns, label_of[index]))
        return tuple(sorted(found, key=lambda f: (f.label, os.fsencode(f.path))))

    return Listing(root, tuple(ordered), files(train), files(test), note=note)
