"""Approximate methods as a request uses them: which images they may read, and what becomes of the head rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cl_platform.unlearning.approximate import ApproximateRequest, build_method
from cl_platform.unlearning.choice import LEVELS, Option, Price
from cl_platform.unlearning.closing import Work
from cl_platform.unlearning.config import APPROXIMATE
from cl_platform.unlearning.drop import outcome
from cl_platform.unlearning.lineage import remaining_leaks

if TYPE_CHECKING:
    from cl_platform.unlearning.engine import Site, Wish
    from cl_platform.unlearning.pieces import Before


def approximate_option(site: Site, wish: Wish) -> Option:
    """The way of an approximate method; its keys are checked."""
    name = wish.method.removeprefix(APPROXIMATE)
    build_method(name, site.config.methods.get(name))
    leaks = tuple(remaining_leaks(site.learner, wish.task_id))
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
    task = site.stream.task(task_id)
    request = ApproximateRequest(
        task=task,
        forget=task.train,
        retain={t.task_id: t.train for t in kept},
        seed=learner.options.seed,
        device=learner.device,
        keep_rows=config.keep_rows,
        validation={t.task_id: t.validation for t in kept if len(t.validation)},
        min_retain_ratio=config.min_retain_ratio,
    )
    report = method.apply(learner, request)
    leaks = tuple(remaining_leaks(learner, task_id))
    if not config.keep_rows:
        learner.drop_task(task_id)
    found = replace(outcome(learner, task_id, before), level=LEVELS[0])
    found = replace(found, leaks=found.leaks or leaks)
    params = {**asdict(method.config), "checks": report.checks, "facts": report.facts, "source": "data set"}
    return Work(before, found, learner, _plain(params), report.images, report.steps)


def _plain(value: Any) -> Any:
    """Tuples as lists, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
