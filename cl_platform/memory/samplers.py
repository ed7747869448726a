"""Which rows of a buffer a draw takes: on the host, without replacement, from the caller's generator."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from cl_platform.errors import unknown_name
from cl_platform.memory.grouping import occurrence, shares
from cl_platform.memory.policies import Contents
from cl_platform.memory.uniforms import Ints

Sampler = Literal["uniform", "task_weighted", "class_balanced"]
SAMPLERS: tuple[Sampler, ...] = ("uniform", "task_weighted", "class_balanced")


def draw(
    contents: Contents,
    count: int,
    generator: torch.Generator,
    sampler: str = "uniform",
    exclude_task: int | None = None,
) -> Ints:
    """Slots of one draw, in random order.

    Args:
        contents: what the buffer holds.
        count: rows wanted; fewer come if there are fewer.
        generator: on the host; the draw is a function of its state and of ``contents``.
        sampler: ``uniform``: every set of rows is equally likely. ``task_weighted``: rows are picked one by one, each
            task's rows together being as likely as another task's. ``class_balanced``: the same number of rows of
            every class, as far as the class has them; who gets the remainder is drawn.
        exclude_task: leave this task's rows out.

    Returns:
        (min(count, rows),) int64, no slot twice.

    Raises:
        UserError: an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise unknown_name("replay.sampler", sampler, SAMPLERS)
    rows = np.arange(len(contents))
    if exclude_task is not None:
        rows = np.flatnonzero(contents.task_ids != exclude_task)
    if sampler == "task_weighted":
        return rows[_by_weight(contents.task_ids[rows], generator)[:count]]
    shuffled: Ints = rows[torch.randperm(len(rows), generator=generator).numpy()]
    if sampler == "uniform":
        return shuffled[:count]
    classes, group, sizes = np.unique(contents.labels[shuffled], return_inverse=True, return_counts=True)
    turn = torch.randperm(len(classes), generator=generator).numpy()
    given = np.empty(len(classes), dtype=np.int64)
    given[turn] = shares(sizes[turn], count)
    return shuffled[occurrence(group) < given[group]]


def _by_weight(task_ids: Ints, generator: torch.Generator) -> Ints:
    """All rows in an order of weighted draws without replacement (Efraimidis and Spirakis 2006)."""
    _, group, sizes = np.unique(task_ids, return_inverse=True, return_counts=True)
    uniforms = torch.rand(len(task_ids), generator=generator, dtype=torch.float64).numpy()
    waits = -np.log1p(-uniforms) * sizes[group]  # exponential with rate 1 / rows of the task
    return np.argsort(waits, kind="stable")
