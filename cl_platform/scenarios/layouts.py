"""The layouts of ``image_folder``: class folders, metadata files beside images, and saved data sets."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError
from cl_platform.scenarios import saved
from cl_platform.scenarios.columns import (
    COMMON,
    HELD_OUT,
    TRAIN,
    by_name,
    chosen_column,
    chosen_splits,
    class_ids,
    split_in,
)
from cl_platform.scenarios.config import ScenarioConfig
from cl_platform.scenarios.listing import (
    File,
    Listing,
    class_folder_listing,
    folders,
    held_out,
    image_files,
    refuse_escape,
    refuse_few_classes,
    shown,
)

KEY = "scenario.path"
METADATA = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"


def image_folder_listing(root: Path, scenario: ScenarioConfig) -> Listing:
    """The images of a folder, whatever its layout.

    Raises:
        UserError: no layout that is known, classes or splits that cannot be told, or images that are not there.
    """
    found = saved.listing_of(root, scenario) or _metadata_listing(root, scenario)
    if found is None and scenario.image_column is not None:
        raise UserError(
            "scenario.image_column", scenario.image_column, "the folder is no saved data set, it has no columns",
            "Leave it out",
        )  # fmt: skip
    if found is None and scenario.label_column is not None:
        raise UserError(
            "scenario.label_column", scenario.label_column,
            f"there is neither a saved data set nor a {METADATA[0]} with columns", "Leave it out",
        )  # fmt: skip
    found = found or _class_folders(root, scenario.test_share)
    if found.test or scenario.test_share is None:
        return found
    return divided(found, scenario.test_share)


def divided(listing: Listing, share: float) -> Listing:
    """A listing whose training files are divided: a share of each class is for testing.

    Raises:
        UserError: a class would be left without training or test images.
    """
    tested: set[str] = set()
    by_class: dict[int, list[File]] = {}
    for file in listing.train:
        by_class.setdefault(file.label, []).append(file)
    for label, files in by_class.items():
        chosen = held_out(files, share)
        if not 0 < len(chosen) < len(files):
            raise UserError(
                "scenario.test_share", share,
                f"class {shown(listing.class_names[label])} has {len(files)} images, of which {len(chosen)} would be "
                "for testing",
                "Choose another share, so that every class has both",
            )  # fmt: skip
        tested |= chosen
    train = tuple(file for file in listing.train if file.path not in tested)
    return replace(listing, train=train, test=tuple(file for file in listing.train if file.path in tested))


def _class_folders(root: Path, share: float | None) -> Listing:
    """``{train,test}/<class>/*``, or with another test folder, or without any where a share is held out."""
    train = root / TRAIN[0]
    if not train.is_dir() and share is None:
        return class_folder_listing(root, KEY)  # says what is missing
    if not train.is_dir():
        return _one_split(root, root, f"{share:g} of each class for testing")
    present = [TRAIN[0], *(name for name in HELD_OUT if (root / name).is_dir())]
    if len(present) == 1 and share is None:
        raise UserError(
            KEY, shown(str(root)), f"there is no folder {shown(str(root / HELD_OUT[0]))}",
            "Lay images out as {train,test}/<class>/*, or set scenario.test_share=0.2 to test on a fifth of each class",
        )  # fmt: skip
    _, test, note = chosen_splits(present, share, KEY, shown(str(root)))
    listed = _one_split(root, train, note) if test is None else class_folder_listing(root, KEY, test)
    return replace(listed, note=note)


def _one_split(root: Path, where: Path, note: str) -> Listing:
    names = folders(root, where, KEY)
    refuse_few_classes(where, names, KEY)
    files = [file for label, name in enumerate(names) for file in image_files(root, where / name, label, KEY)]
    return Listing(root, tuple(names), tuple(files), (), key=KEY, note=note)


# -- metadata beside images -----------------------------------------------------------------------------------------


def _metadata_listing(root: Path, scenario: ScenarioConfig) -> Listing | None:
    """Images named by ``metadata.csv`` or ``.jsonl`` files with their labels; None where no such file tells labels."""
    splits = {name: root / name for name in (*TRAIN, *HELD_OUT) if (root / name).is_dir()}
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for folder in (root, *splits.values()):
        rows = _rows(folder)
        if rows and _tells_labels(rows, folder, scenario.label_column):
            tables[str(folder)] = rows
    if not tables:
        return None
    by_split: dict[str, list[tuple[str, Any]]] = {}
    for folder_name, rows in tables.items():
        others = [name for name in rows[0] if name != FILE_NAME]
        column = chosen_column("scenario.label_column", scenario.label_column, by_name(others), others, "labels")
        for row in rows:
            path = os.path.normpath(os.path.relpath(Path(folder_name) / str(row[FILE_NAME]), root))
            label = row.get(column)
            by_split.setdefault(split_in(os.path.dirname(path)), []).append((path, None if label == "" else label))
    train, test, note = chosen_splits(by_split, scenario.test_share, KEY, shown(str(root)))
    pairs = (by_split[train], by_split[test] if test else by_split[train])
    trained, tested = ([label for _, label in part] for part in pairs)
    ids = class_ids(
        trained, tested, None, "scenario.label_column", lambda split, row: pairs[split != "train"][row][0]
    )  # fmt: skip
    files = [_files(root, part, numbers) for part, numbers in zip(pairs, ids[:2], strict=True)]
    return Listing(root, ids[2], files[0], files[1] if test else (), key=KEY, note=note)


def _rows(folder: Path) -> list[Mapping[str, Any]]:
    """Rows of a folder's metadata file, each with its ``file_name``; empty where there is none about files."""
    file = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if file is None:
        return []
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # a file's name may be any bytes
        if file.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not rows or not isinstance(rows[0], Mapping) or FILE_NAME not in rows[0]:
            return []
        wrong = next((k for k, row in enumerate(rows) if not isinstance(row, Mapping) or not row.get(FILE_NAME)), None)
        if wrong is not None:
            raise ValueError(f"row {wrong} has no {FILE_NAME}")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            KEY, shown(str(file)), f"cannot be understood ({error})", f"Give each row a {FILE_NAME} and a label"
        ) from error
    return rows


def _tells_labels(rows: Sequence[Mapping[str, Any]], folder: Path, wished: str | None) -> bool:
    """Whether a metadata file is about classes; beside class folders it may as well hold captions."""
    if wished is not None or any(name in rows[0] for name in COMMON):
        return True
    splits = [folder / name for name in (*TRAIN, *HELD_OUT) if (folder / name).is_dir()]
    inside = {name for place in (folder, *splits) for name in folders(folder, place, KEY)}
    return len(rows[0]) > 1 and inside <= {*TRAIN, *HELD_OUT}


def _files(root: Path, pairs: Sequence[tuple[str, Any]], labels: Sequence[int]) -> tuple[File, ...]:
    """The named files in the order that class folders would have."""
    found = []
    for (path, _), label in zip(pairs, labels, strict=True):
        refuse_escape(root, root / path, KEY)
        try:
            stat = (root / path).stat()
        except OSError as error:
            raise UserError(
                KEY, shown(str(root / path)), f"is named by the metadata and cannot be read ({error.strerror})",
                "Put the file there, or remove its row",
            ) from error  # fmt: skip
        found.append(File(path, stat.st_size, stat.st_mtime_ns, label))
    return tuple(sorted(found, key=lambda f: (f.label, os.fsencode(f.path))))
