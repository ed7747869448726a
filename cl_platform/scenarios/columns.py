"""Which columns and splits of a saved data set hold the images, their classes and the test images."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from cl_platform.errors import UserError, unknown_name

TRAIN = ("train", "training")
HELD_OUT = ("test", "testing", "validation", "valid", "val", "dev")
"""Names of splits that can serve as test set, the best one first."""
COMMON = ("label", "labels")
"""Names of label columns that win over other columns of numbers or texts."""


def split_in(path: str) -> str:
    """The split that a file's path below the data set names by one of its words; ``train`` where none does.

    ``data/train-00000-of-00001.parquet``, ``test.parquet`` and ``default/validation/0000.parquet`` name one each.
    """
    words = re.split(r"[^a-z0-9]+", path.lower())
    return next((word for word in reversed(words) if word in TRAIN + HELD_OUT), TRAIN[0])


def chosen_splits(present: Iterable[str], share: float | None, key: str, where: str) -> tuple[str, str | None, str]:
    """Names of the training and test splits, and a note about them; no test split where a share is to be held out.

    Raises:
        UserError: no training split, nothing to test on, or a share to hold out although there is a test split.
    """
    names = list(present)
    train = next((name for name in TRAIN if name in names), names[0] if len(names) == 1 else None)
    if train is None:
        listed = ", ".join(names) or "none"
        raise UserError(key, where, f"has no split train; its splits are {listed}", "Save it with one named train")
    test = next((name for name in HELD_OUT if name in names and name != train), None)
    if test is not None and share is not None:
        raise UserError("scenario.test_share", share, f"the data have the split {test} to test on", "Leave it out")
    if test is None and share is None:
        raise UserError(
            key, where, f"has the split {train} and nothing to test on",
            "Set scenario.test_share=0.2 to test on a fifth of each class",
        )  # fmt: skip
    if test is None:
        return train, None, f"{share:g} of each class of {train} for testing"
    unused = [name for name in names if name not in (train, test)]
    serving = "" if test == "test" else f"split {test} serves as test set"
    left = f"not used: {', '.join(unused)}" if unused else ""
    return train, test, ", ".join(filter(None, [serving, left]))


def chosen_column(key: str, wished: str | None, certain: Sequence[str], columns: Sequence[str], what: str) -> str:
    """A column: the wished one, or the only one that it can be.

    Args:
        key: under which it is wished for.
        wished: its name, or None.
        certain: those that it could be.
        columns: all columns.
        what: it holds, for messages.

    Raises:
        UserError: no such column, none that it could be, or several.
    """
    if wished is not None:
        if wished not in columns:
            raise unknown_name(key, wished, columns)
        return wished
    if len(certain) == 1:
        return certain[0]
    if certain:
        raise UserError(
            key, None, f"several columns could hold the {what}: {', '.join(certain)}", f"Set {key}={certain[0]}"
        )
    raise UserError(
        key, None, f"no column is known to hold the {what}; the columns are {', '.join(columns)}", f"Set {key}=COLUMN"
    )


def by_name(candidates: Sequence[str]) -> list[str]:
    """The candidate that is called as label columns are, if there is one; else all."""
    return [name for name in COMMON if name in candidates][:1] or list(candidates)


def class_ids(
    train: Sequence[Any], test: Sequence[Any], names: Sequence[str] | None, key: str, where: Callable[[str, int], str]
) -> tuple[list[int], list[int], tuple[str, ...]]:
    """Class ids of labels, and the classes' names.

    With ``names`` a label is a number that points into them, and names that no image has are left out. Else classes are
    the labels that occur, numbers in their order and texts bytewise.

    Args:
        train: labels of the training images, by row.
        test: labels of the test images.
        names: of the classes, where the data set says them.
        key: the label column's, for messages.
        where: a row of a split in words.

    Raises:
        UserError: a row without a label, a label that is no class, or a class without training or test images.
    """
    for split, labels in (("train", train), ("test", test)):
        for row, label in enumerate(labels):
            if label is None or (names is not None and not 0 <= label < len(names)):
                said = "has no label" if label is None else f"has the label {label}, which no class has"
                raise UserError(key, where(split, row), said, "Remove such rows, or name another column")
    present = set(train) | set(test)
    order: list[Hashable] = sorted(present, key=_rank)
    id_of: Mapping[Hashable, int] = {label: number for number, label in enumerate(order)}
    called = tuple(str(label) if names is None else names[label] for label in order)  # type: ignore[call-overload]
    for split, those in (("training", set(train)), ("test", set(test))):
        lacking = next((called[id_of[label]] for label in order if label not in those), None)
        if lacking is not None:
            raise UserError(key, lacking, f"the class has no {split} images", "Add some, or remove the class")
    if len(order) < 2:
        raise UserError(key, list(called), "at least two classes are needed", "Name another column")
    return [id_of[label] for label in train], [id_of[label] for label in test], called


def _rank(label: Any) -> tuple[int, Any]:
    if isinstance(label, str) and not label.lstrip("-").isdigit():
        return 1, os.fsencode(label)
    return 0, int(label)
