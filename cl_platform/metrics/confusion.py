"""Metrics 5.5: which class and which task the images of each class and task are taken for, as integer counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined

CONFUSION_DEFINITIONS: tuple[Definition, ...] = (
    Definition("5.5", "confusion", "Images of each true class (row) answered as each class (column).", "images", "up"),
    Definition("5.5", "task_confusion", "Confusion summed over the classes of each task.", "images", "up"),
    Definition("5.5", "task_inference_acc", "Images answered with a class of their own task.", "fraction", "up"),
    Definition("5.5", "recency_bias", "Images of old tasks answered with a newest-task class.", "fraction", "down"),
)
"""Both matrices are good where their diagonal is high."""

Counts = list[list[int]]


def class_ids(values: Tensor | Sequence[int], name: str) -> Tensor:
    """Class ids as an int64 tensor (N,) on the CPU.

    Raises:
        ValueError: numbers that are not integers, or more than one dimension.
    """
    found = torch.as_tensor(values)
    if found.numel() and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise ValueError(f"{name} are {found.dtype}, not integers")
    if found.dim() != 1:
        raise ValueError(f"{name} have shape {tuple(found.shape)}, not one dimension")
    return found.detach().to("cpu", torch.int64)


def confusion(predicted: Tensor | Sequence[int], labels: Tensor | Sequence[int], classes: Sequence[int]) -> Counts:
    """Entry ``[t][p]``: images of the t-th class that were answered with the p-th one.

    Args:
        predicted: predicted class ids (N,).
        labels: true class ids (N,).
        classes: all class ids that may occur; rows and columns are in ascending order of these.

    Raises:
        ValueError: lengths that differ, a class id twice, or an id that is none of ``classes``.
    """
    ids = class_ids(sorted(classes), "classes")
    answers, truth = class_ids(predicted, "predictions"), class_ids(labels, "labels")
    if len(answers) != len(truth):
        raise ValueError(f"{len(answers)} predictions for {len(truth)} labels")
    if len(set(classes)) != len(classes):
        raise ValueError(f"a class stands twice in {list(classes)}")
    rows, columns = _places(truth, ids, "label"), _places(answers, ids, "prediction")
    size = len(ids)
    flat = torch.bincount(rows * size + columns, minlength=size * size)  # (C * C,)
    return [[int(count) for count in row] for row in flat.reshape(size, size).tolist()]


def task_confusion(matrix: Sequence[Sequence[int]], tasks: Sequence[Sequence[int]]) -> Counts:
    """Entry ``[i][j]``: images of task i that were answered with a class of task j.

    Args:
        matrix: what :func:`confusion` counted over exactly the classes of ``tasks``.
        tasks: class ids of each task, in stream order.

    Raises:
        ValueError: a class in two tasks, or a matrix of another size.
    """
    ascending = sorted((c, task) for task, classes in enumerate(tasks) for c in classes)
    owners = [task for _, task in ascending]
    if len({c for c, _ in ascending}) != len(ascending):
        raise ValueError("a class stands in two tasks")
    if len(matrix) != len(owners) or any(len(row) != len(owners) for row in matrix):
        raise ValueError(f"the matrix is not {len(owners)} x {len(owners)}, the number of classes of all tasks")
    summed = [[0] * len(tasks) for _ in tasks]
    for i, row in zip(owners, matrix, strict=True):
        for j, count in zip(owners, row, strict=True):
            summed[i][j] += count
    return summed


def task_inference_acc(tasks: Sequence[Sequence[int]]) -> Outcome:
    """5.5, [0, 1]: share of the images answered with a class of their own task.

    Args:
        tasks: what :func:`task_confusion` summed.
    """
    total = sum(map(sum, tasks))
    return Result(_trace(tasks) / total) if total else Undefined("empty")


def recency_bias(tasks: Sequence[Sequence[int]]) -> Outcome:
    """5.5, [0, 1]: share of the old tasks' images answered with a class of the newest task.

    Args:
        tasks: what :func:`task_confusion` summed; the last row is the newest task.
    """
    total = sum(map(sum, tasks[:-1]))
    return Result(sum(row[-1] for row in tasks[:-1]) / total) if total else Undefined("needs_two_tasks")


def check_bound(right_cil: int, right_til: int, tasks: Sequence[Sequence[int]]) -> None:
    """An image answered right among all classes is right within its task, and its task is right.

    Args:
        right_cil: right answers among all seen classes.
        right_til: right answers to the same images among the classes of their task.
        tasks: what :func:`task_confusion` summed over the same images.

    Raises:
        ValueError: the counts contradict that: labels or masks are mixed up.
    """
    if right_cil > min(right_til, _trace(tasks)):
        raise ValueError(
            f"{right_cil} right answers without the task id, but {right_til} with it and {_trace(tasks)} in the right "
            "task: labels or masks are mixed up"
        )


def _trace(tasks: Sequence[Sequence[int]]) -> int:
    return sum(row[i] for i, row in enumerate(tasks))


def _places(values: Tensor, ids: Tensor, name: str) -> Tensor:
    """Index of each value in the ascending ids."""
    unknown = values[~torch.isin(values, ids)]
    if len(unknown):
        raise ValueError(f"{name} {int(unknown[0])} is none of the classes {ids.tolist()}")
    return torch.searchsorted(ids, values)
