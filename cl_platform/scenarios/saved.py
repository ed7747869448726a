"""Data sets saved by the library ``datasets``: arrow folders and parquet files, row by row as if each were a file."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from cl_platform.errors import UserError
from cl_platform.scenarios.columns import HELD_OUT, TRAIN, by_name, chosen_column, chosen_splits, class_ids, split_in
from cl_platform.scenarios.config import ScenarioConfig
from cl_platform.scenarios.listing import File, Listing, folders, shown

KEY = "scenario.path"
_OPEN_GROUPS = 3  # row groups that are kept: as many as two threads read at a time, and one


class Table(Protocol):
    """The rows of a split, or of a part of it, in one file.

    Attributes:
        name: what a row's path starts with.
        features: column -> its type, as the library names it.
        stamp: bytes of its files and their newest time, as a listing takes them.
    """

    name: str
    features: Mapping[str, Any]
    stamp: tuple[int, int]

    def labels(self, column: str) -> list[Any]:
        """Values of a column."""
        ...

    def image(self, column: str, row: int) -> Any:
        """What a row holds in a column of images: bytes, or a mapping with ``bytes`` and ``path``."""
        ...


def listing_of(root: Path, scenario: ScenarioConfig) -> Listing | None:
    """The rows of a saved data set as a listing; None where the folder holds none.

    Raises:
        UserError: the extra is not installed, a file is damaged, or columns or splits cannot be told.
    """
    arrow = [name for name in ("dataset_dict.json", "state.json") if (root / name).is_file()]
    files = [] if arrow else _parquet_files(root)
    if not arrow and not files:
        return None
    _refuse_without_library(root)
    with _damage_explained(root):
        splits = _parquet_splits(root, files) if files else _arrow_splits(root, arrow[0])
    train, test, note = chosen_splits(splits, scenario.test_share, KEY, shown(str(root)))
    parts = (splits[train], splits[train if test is None else test])
    image, label = _columns(root, parts, scenario)
    return _listed(root, parts, image, label, test is None, note)


def _columns(root: Path, parts: Sequence[Sequence[Table]], scenario: ScenarioConfig) -> tuple[str, str]:
    """The columns of images and of labels, the same in all tables."""
    first = parts[0][0]
    features = first.features
    image = chosen_column("scenario.image_column", scenario.image_column, _images(features), list(features), "images")
    if not _holds_images(features[image]):
        raise UserError("scenario.image_column", image, f"holds {features[image]}, no images", "Name another column")
    label = chosen_column("scenario.label_column", scenario.label_column, _labels(features), list(features), "labels")
    if not _holds_labels(features[label]):
        reason = f"holds {features[label]}, no class names or numbers"
        raise UserError("scenario.label_column", label, reason, "Name another column")
    for table in (table for part in parts for table in part):
        lacking = next((column for column in (image, label) if column not in table.features), None)
        if lacking is not None or _names(table, label) != _names(first, label):
            reason = f"has no column {lacking}" if lacking else f"has other classes in {label} than {first.name}"
            raise UserError(KEY, shown(str(root / table.name)), reason, "Save all parts with the same columns")
    return image, label


def _names(table: Table, label: str) -> list[str] | None:
    return getattr(table.features[label], "names", None)


def _listed(
    root: Path, parts: Sequence[Sequence[Table]], image: str, label: str, one_split: bool, note: str
) -> Listing:
    """Rows in the order of the tables, each as a file ``<table>#<row>``."""
    tables = {table.name: table for part in parts for table in part}
    labels: dict[str, list[Any]] = {}
    for name, table in tables.items():
        with _damage_explained(root / name):
            labels[name] = table.labels(label)
    paths = [[f"{table.name}#{row}" for table in part for row in range(len(labels[table.name]))] for part in parts]
    values = [[value for table in part for value in labels[table.name]] for part in parts]
    ids = class_ids(
        values[0], values[1], _names(parts[0][0], label), "scenario.label_column",
        lambda split, row: shown(str(root / paths[split != "train"][row])),
    )  # fmt: skip
    files = [
        tuple(File(path, *tables[path.rpartition("#")[0]].stamp, number) for path, number in zip(*part, strict=True))
        for part in zip(paths, ids[:2], strict=True)
    ]

    def reader(file: File) -> bytes:
        name, _, row = file.path.rpartition("#")
        with _damage_explained(root / name):
            held = tables[name].image(image, int(row))
        return _bytes(root, held, file)

    return Listing(root, ids[2], files[0], () if one_split else files[1], key=KEY, note=note, reader=reader)


def _bytes(root: Path, held: Any, file: File) -> bytes:
    """An image's bytes, from the row itself or the file that it names; none where there are none."""
    data = held.get("bytes") if isinstance(held, Mapping) else held
    path = held.get("path") if isinstance(held, Mapping) else None
    if data or not path:
        return bytes(data or b"")
    inside = os.path.realpath(root)
    named = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([inside, named]) != inside:
        raise UserError(
            KEY, shown(str(root / file.path)), f"the image lies outside of the folder, in {shown(str(path))}",
            "Save the data set with save_to_disk, which puts images into its files",
        )  # fmt: skip
    return Path(named).read_bytes() if os.path.isfile(named) else b""


# -- columns --------------------------------------------------------------------------------------------------------


def _images(features: Mapping[str, Any]) -> list[str]:
    certain = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    return certain or [name for name, kind in features.items() if _holds_images(kind)]


def _holds_images(kind: Any) -> bool:
    return type(kind).__name__ == "Image" or (isinstance(kind, Mapping) and "bytes" in kind) or _dtype(kind) in (
        "binary", "large_binary",
    )  # fmt: skip


def _labels(features: Mapping[str, Any]) -> list[str]:
    certain = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    return by_name(certain or [name for name, kind in features.items() if _holds_labels(kind)])


def _holds_labels(kind: Any) -> bool:
    if type(kind).__name__ == "ClassLabel":
        return True
    return type(kind).__name__ == "Value" and _dtype(kind).startswith(("int", "uint", "string", "large_string", "bool"))


def _dtype(kind: Any) -> str:
    return str(getattr(kind, "dtype", ""))


# -- arrow ----------------------------------------------------------------------------------------------------------


class _ArrowTable:
    """A split as ``save_to_disk`` writes it, mapped into memory."""

    def __init__(self, name: str, folder: Path, dataset: Any) -> None:
        self.name = name
        self.features: Mapping[str, Any] = dict(dataset.features)
        self._rows = dataset.with_format("arrow")
        stats = [file.stat() for file in sorted(folder.glob("*.arrow"))]
        self.stamp = (sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0))
        self._columns: dict[str, Any] = {}

    def labels(self, column: str) -> list[Any]:
        """Values of a column."""
        return self._only(column)[:].column(column).to_pylist()

    def image(self, column: str, row: int) -> Any:
        """What a row holds."""
        return self._only(column)[row].column(column)[0].as_py()

    def _only(self, column: str) -> Any:
        if column not in self._columns:
            self._columns[column] = self._rows.select_columns([column])
        return self._columns[column]


def _arrow_splits(root: Path, kind: str) -> dict[str, Sequence[Table]]:
    import datasets

    loaded = datasets.load_from_disk(str(root))
    if kind == "state.json":
        return {TRAIN[0]: [_ArrowTable(TRAIN[0], root, loaded)]}
    return {str(name): [_ArrowTable(str(name), root / str(name), split)] for name, split in loaded.items()}


# -- parquet --------------------------------------------------------------------------------------------------------


class _ParquetTable:
    """A parquet file. Rows are read by groups, the newest of which are kept."""

    def __init__(self, root: Path, path: Path) -> None:
        import datasets
        import pyarrow.parquet

        self.name = os.path.relpath(path, root)
        self._file = pyarrow.parquet.ParquetFile(path)
        self.features: Mapping[str, Any] = dict(datasets.Features.from_arrow_schema(self._file.schema_arrow))
        stat = path.stat()
        self.stamp = (stat.st_size, stat.st_mtime_ns)
        about = self._file.metadata
        self._sizes = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        self._groups: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def labels(self, column: str) -> list[Any]:
        """Values of a column."""
        return self._file.read(columns=[column]).column(column).to_pylist()

    def image(self, column: str, row: int) -> Any:
        """What a row holds."""
        number = 0
        while row >= self._sizes[number]:
            row -= self._sizes[number]
            number += 1
        with self._lock:
            group = self._groups.pop((column, number), None)
            if group is None:
                group = self._file.read_row_group(number, columns=[column]).column(column)
            self._groups[column, number] = group
            if len(self._groups) > _OPEN_GROUPS:
                self._groups.popitem(last=False)
        return group[row].as_py()


def _parquet_files(root: Path) -> list[Path]:
    """Parquet files of a folder: in it, in its folders, or in folders of splits inside these."""
    places = [root]
    for name in folders(root, root, KEY):
        places.append(root / name)
        if name not in TRAIN + HELD_OUT:  # class folders below a split may hold millions of images
            places += [root / name / split for split in TRAIN + HELD_OUT]
    found = [file for place in places if place.is_dir() for file in place.glob("*.parquet")]
    return sorted((file for file in found if file.stem != "metadata"), key=os.fsencode)


def _parquet_splits(root: Path, files: Sequence[Path]) -> dict[str, Sequence[Table]]:
    splits: dict[str, list[Table]] = {}
    for file in files:
        splits.setdefault(split_in(os.path.relpath(file, root).removesuffix(".parquet")), []).append(
            _ParquetTable(root, file)
        )
    return dict(splits)


# -- the library ----------------------------------------------------------------------------------------------------


def _refuse_without_library(root: Path) -> None:
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise UserError(
            KEY, shown(str(root)), "is a data set saved by the library datasets, which is not installed",
            "Run pip install 'cl-platform[hub]'",
        ) from error  # fmt: skip


@contextmanager
def _damage_explained(where: Path) -> Iterator[None]:
    """Turn what a library says about broken files into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's own are some of these
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise UserError(KEY, shown(str(where)), f"cannot be read ({reason})", "Save the data set again") from error
