"""Which classes and which rows a task gets. Everything here is arithmetic on labels; no image is read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cl_platform.errors import UserError, nearest
from cl_platform.random_streams import RUN_LEVEL, stream

KEY = "scenario.class_order"
_ORDERS = "natural, a whole number, coda:<repeat>, pilot:<seed>, a list of all class names or ids, or a file of these"
_SHOWN = 5  # classes named in a message


def class_order(order: int | str | Sequence[int | str], class_names: Sequence[str]) -> tuple[int, ...]:
    """Class ids in the order in which tasks get them.

    Args:
        order: ``natural`` (ascending ids); an integer ``s``, with the meaning it has in Avalanche's ``SplitX(seed=s)``
            (a torch permutation); ``coda:<r>``, repeat r of the CODA-Prompt code (Python's shuffle, r = 0 natural);
            ``pilot:<s>``, the numpy permutation of the PILOT and PyCIL code; a list of names or ids; or a file with
            one class name or id a line. A text that is a class's name means that class, else digits mean an id.
        class_names: names by class id.

    Raises:
        UserError: none of these, a name that no class has (with the nearest), or not every class exactly once.
    """
    count = len(class_names)
    if isinstance(order, str):
        text = order.strip()
        if text == "natural":
            return tuple(range(count))
        if text.lstrip("-").isdigit():
            return class_order(int(text), class_names)
        family, _, number = text.partition(":")
        if family in ("coda", "pilot") and number.isdigit():
            return _coda_order(int(number), count) if family == "coda" else _pilot_order(int(number), count)
        return _checked(_order_from_file(text, class_names), class_names, order)
    if isinstance(order, int):
        generator = torch.Generator()
        generator.manual_seed(order)
        return tuple(torch.randperm(count, generator=generator).tolist())
    given = list(order)
    return _checked(_ids_of(given, class_names, given), class_names, given)


def _coda_order(repeat: int, count: int) -> tuple[int, ...]:
    ids = list(range(count))
    if repeat > 0:
        random.Random(repeat).shuffle(ids)
    return tuple(ids)


def _pilot_order(seed: int, count: int) -> tuple[int, ...]:
    if seed >= 2**32:
        raise UserError(KEY, f"pilot:{seed}", "the seed must be below 2**32", "Choose a smaller one")
    return tuple(int(c) for c in np.random.RandomState(seed).permutation(count))


def _order_from_file(text: str, class_names: Sequence[str]) -> list[int]:
    path = Path(text).expanduser()
    if not path.is_file():
        raise UserError(KEY, text, f"must be {_ORDERS}; there is no such file", f"Use {KEY}=natural")
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        word = line.strip().lstrip("-").strip().strip("'\"")
        if word and not word.startswith("#"):
            words.append(word)
    return _ids_of(words, class_names, text)


def _ids_of(words: Sequence[int | str], class_names: Sequence[str], given: object) -> list[int]:
    """Class ids of names and ids; a ``UserError`` with the nearest names for a text that is neither."""
    id_of = {name: number for number, name in enumerate(class_names)}
    ids = []
    for word in words:
        if isinstance(word, str) and word not in id_of and not word.isdigit():
            near = nearest(word, id_of)
            names = ", ".join(class_names[:_SHOWN]) + (", ..." if len(class_names) > _SHOWN else "")
            todo = f"Did you mean {' or '.join(near)}" if near else f"The data set's classes are {names}"
            raise UserError(KEY, given, f"{word} is no class of this data set", todo)
        ids.append(id_of[word] if isinstance(word, str) and word in id_of else int(word))
    return ids


def _checked(ids: list[int], class_names: Sequence[str], given: object) -> tuple[int, ...]:
    count = len(class_names)
    if sorted(ids) != list(range(count)):
        wrong = [f"{c} is no class id" for c in ids if not 0 <= c < count]
        wrong += [f"{class_names[c]} is missing" for c in range(count) if c not in ids]
        wrong += [f"{class_names[c]} stands {ids.count(c)} times" for c in range(count) if ids.count(c) > 1]
        shown = ", ".join(wrong[:_SHOWN]) + (", ..." if len(wrong) > _SHOWN else "")
        raise UserError(
            KEY, given,
            f"must hold each of the {count} classes exactly once, by name or by id 0..{count - 1}; {shown}",
            f"Correct the list, or use {KEY}=natural",
        )  # fmt: skip
    return tuple(ids)


def class_chunks(order: Sequence[int], num_tasks: int) -> list[tuple[int, ...]]:
    """The order cut into ``num_tasks`` equal chunks, one a task; a ``UserError`` if it does not divide."""
    count = len(order)
    if num_tasks > count or count % num_tasks:
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        near = min(divisors[1:] or divisors, key=lambda d: (abs(d - num_tasks), d))  # a single task is no stream
        raise UserError(
            "scenario.num_tasks",
            num_tasks,
            f"{count} classes do not divide into {num_tasks} tasks",
            f"Set scenario.num_tasks={near}; the numbers that divide {count} are {', '.join(map(str, divisors))}",
        )
    size = count // num_tasks
    return [tuple(order[i * size : (i + 1) * size]) for i in range(num_tasks)]


def kept_tasks(num_tasks: int, skip: Sequence[int]) -> list[int]:
    """Ids of the tasks that are not left out; a ``UserError`` for an id that does not exist or if none is left."""
    wrong = [t for t in skip if not 0 <= t < num_tasks]
    if wrong:
        raise UserError(
            "scenario.skip_tasks", list(skip), f"task ids run from 0 to {num_tasks - 1}", f"Remove {wrong[0]} from it"
        )
    kept = [t for t in range(num_tasks) if t not in set(skip)]
    if not kept:
        raise UserError("scenario.skip_tasks", list(skip), "at least one task must be left", "Remove one task from it")
    return kept


class RowPicker:
    """Rows of a data set's split by class, optionally only the first, or some drawn, of each class.

    Args:
        labels: (N,) int64 class ids.
        per_class: rows kept per class, or None for all; a class with fewer keeps all it has.
        subset: ``first`` keeps the first rows in the data set's order (sorted file names for a folder), which makes a
            smaller number a prefix of a larger one; ``seeded`` draws them per class.
        seed: the run's seed.
        split: ``train`` or ``test``, part of the draw's key.
        among: rows to choose from, or None for all.
    """

    def __init__(
        self,
        labels: np.ndarray,
        per_class: int | None,
        subset: str,
        seed: int,
        split: str,
        among: np.ndarray | None = None,
    ) -> None:
        candidates = np.arange(len(labels)) if among is None else among
        by_label = np.argsort(labels[candidates], kind="stable")
        sorted_rows = candidates[by_label]
        classes, starts = np.unique(labels[sorted_rows], return_index=True)
        self._rows: dict[int, np.ndarray] = {}
        for label, rows in zip(classes.tolist(), np.split(sorted_rows, starts[1:]), strict=True):
            if per_class is not None and subset == "seeded" and len(rows) > per_class:
                draw = torch.randperm(len(rows), generator=stream(seed, RUN_LEVEL, f"subset.{split}", label)).numpy()
                rows = np.sort(rows[draw[:per_class]])
            self._rows[label] = rows if per_class is None else rows[:per_class]

    def of(self, class_id: int) -> np.ndarray:
        """Ascending rows of one class; empty if it has none."""
        return self._rows.get(class_id, np.empty(0, dtype=np.int64))

    def of_all(self, classes: Sequence[int]) -> np.ndarray:
        """Ascending rows of several classes."""
        return np.sort(np.concatenate([self.of(c) for c in classes])).astype(np.int64)


def hold_out(
    picker: RowPicker, classes: Sequence[int], share: float, seed: int, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation rows of some classes, both ascending.

    Of each class ``round(share * n)`` rows are held out, at least one where the share is above zero and the class has
    two or more; the draw is keyed by ``key`` (a task id) and the class.
    """
    train, validation = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for label in classes:
        rows = picker.of(label)
        count = min(max(round(share * len(rows)), 1), len(rows) - 1) if share > 0.0 and len(rows) > 1 else 0
        draw = torch.randperm(len(rows), generator=stream(seed, key, "val.split", label)).numpy() if count else None
        held = rows[draw[:count]] if draw is not None else rows[:0]
        validation.append(held)
        train.append(np.setdiff1d(rows, held))
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(validation))
