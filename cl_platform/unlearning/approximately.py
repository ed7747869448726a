"""Approximate methods as a request uses them: which images they may read, and what becomes of the head rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cl_platform.errors import UserError
from cl_platform.scenarios.mixture import StoredImages
from cl_platform.unlearning.approximate import ApproximateRequest, build_method
from cl_platform.unlearning.choice import LEVELS, Option, Price, typed
from cl_platform.unlearning.closing import Work
from cl_platform.unlearning.config import APPROXIMATE
from cl_platform.unlearning.drop import outcome
from cl_platform.unlearning.lineage import remaining_leaks

if TYPE_CHECKING:
    from cl_platform.scenarios import ImageSet
    from cl_platform.unlearning.engine import Site, Wish
    from cl_platform.unlearning.pieces import Before

METHOD_KEY = "unlearning.method"
"""What methods call themselves by in messages."""


def approximate_option(site: Site, wish: Wish) -> Option:
    """The way of an approximate method; its keys are checked."""
    name = wish.method.removeprefix(APPROXIMATE)
    build_method(name, site.config.methods.get(name))
    leaks = tuple(remaining_leaks(site.learner, wish.task_id))
    if not len(images_of(site, wish.task_id)[0]):
        why = "no image of the task can be had: its data are gone, and no replay buffer holds any"
        return Option(wish.method, None, Price(), why, leaks)
    why = "what was learnt is changed until the task seems forgotten, which proves nothing"
    return Option(wish.method, LEVELS[0], Price(seconds=None), why, leaks)


def approximated(site: Site, facts: Mapping[str, Any], before: Before) -> Work:
    """Apply a method to the live learner, then remove what the task owns.

    Raises:
        UserError: images are missing (exit code 2), or a check of the method failed (exit code 3); the learner is as
            it was then.
    """
    config, learner, task_id = site.config, site.learner, facts["task_id"]
    name = facts["method"].removeprefix(APPROXIMATE)
    method = build_method(name, config.methods.get(name))
    kept = [t for t in site.stream.tasks[: site.passed] if t.task_id not in (*site.record.ids, task_id)]
    forget, source = images_of(site, task_id)
    request = ApproximateRequest(
        task=site.stream.task(task_id),
        forget=forget,
        retain={t.task_id: images_of(site, t.task_id)[0] for t in kept},
        seed=learner.options.seed,
        device=learner.device,
        keep_rows=config.keep_rows,
        validation={t.task_id: t.validation for t in kept if len(t.validation)},
        min_retain_ratio=config.min_retain_ratio,
    )
    with _named_as_typed(facts.get("method_key", METHOD_KEY)):
        report = method.apply(learner, request)
    leaks = tuple(remaining_leaks(learner, task_id))
    if not config.keep_rows:
        learner.drop_task(task_id)
    found = replace(outcome(learner, task_id, before), level=LEVELS[0])
    found = replace(found, leaks=found.leaks or leaks)
    params = {**asdict(method.config), "checks": report.checks, "facts": report.facts, "source": source}
    return Work(before, found, learner, _plain(params), report.images, report.steps)


def images_of(site: Site, task_id: int) -> tuple[ImageSet, str]:
    """Training images of a task, and where they are from: ``data set``, or ``buffer`` where the data are gone."""
    found, buffer = site.stream.task(task_id).train, site.learner.context.buffer
    pixels = None if buffer is None else buffer.images
    if len(found) or pixels is None:
        return found, "data set"
    held = buffer.contents
    rows = np.flatnonzero(held.task_ids == task_id)
    columns = (torch.from_numpy(column[rows].copy()) for column in (held.labels, held.example_ids, held.task_ids))
    return StoredImages(pixels[torch.from_numpy(rows)].cpu(), *columns), "buffer"  # type: ignore[return-value]


@contextmanager
def _named_as_typed(key: str) -> Iterator[None]:
    """Refusals of a method name the way as it was typed, be it in a configuration or on the command line."""
    try:
        yield
    except UserError as error:
        if error.key != METHOD_KEY or key == METHOD_KEY:
            raise
        todo = error.what_to_do.replace(f"{METHOD_KEY}=", typed(key, ""))
        raise UserError(key, error.value, error.allowed, todo, error.exit_code) from error


def _plain(value: Any) -> Any:
    """Tuples as lists, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
