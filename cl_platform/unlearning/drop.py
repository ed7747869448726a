"""Forgetting by deletion: what a task owns is removed from a live learner, and what is left is looked at."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cl_platform.unlearning.choice import LEVELS, Option, Price, level_on
from cl_platform.unlearning.lineage import holders, remaining_leaks
from cl_platform.unlearning.pieces import Before, entries

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner

METHOD = "drop"


@dataclass(frozen=True)
class Outcome:
    """What a request has left of a task in a learner.

    Attributes:
        level: ``E-bit`` or ``E-law`` where no kept component lists the task, else ``approximate``.
        leaks: ids of the channels through which something of the task may remain.
        holders: names of the kept components that list it.
        components: entries of the certificate, one for each tensor.
    """

    level: str
    leaks: tuple[str, ...]
    holders: tuple[str, ...]
    components: list[dict[str, Any]]


def drop(learner: ContinualLearner, task_id: int, before: Before, lineage: str = "declared") -> Outcome:
    """Remove what a task owns; sums of per-task parts are then sums over the kept parts.

    Neither data nor the other tasks are needed, and the cost does not grow with the length of the stream.

    Args:
        learner: at a bound between tasks; it is changed.
        task_id: a task that it has learnt.
        before: the same learner, looked at before.
        lineage: ``violated`` where the owner records were found wrong, so that nothing is exact.
    """
    learner.drop_task(task_id)
    found = outcome(learner, task_id, before)
    return found if lineage != "violated" else replace(found, level=LEVELS[0])


def outcome(learner: ContinualLearner, task_id: int, before: Before, changed: str | None = None) -> Outcome:
    """What is left of a task in a learner.

    Args:
        learner: after the request.
        task_id: what was to be forgotten.
        before: the learner before it.
        changed: see :func:`~cl_platform.unlearning.pieces.entries`.
    """
    held = _names(learner, task_id)
    leaks = tuple(remaining_leaks(learner, task_id)) if held else ()
    level = level_on(learner.device.type, exact=not held)
    return Outcome(level, leaks, held, entries(before, learner, task_id, changed))


def tried(twin: ContinualLearner, task_id: int, lineage: str = "declared") -> Option:
    """What a drop would reach, tried on a copy of the learner, which is changed."""
    twin.drop_task(task_id)
    if lineage == "violated":
        return Option(METHOD, LEVELS[0], Price(), "the owner records were found wrong while the stream was learnt")
    held = _names(twin, task_id)
    level = level_on(twin.device.type, exact=not held)
    if not held:
        return Option(METHOD, level, Price(), "no kept component has seen the task")
    leaks = tuple(remaining_leaks(twin, task_id))
    shown = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
    why = f"{shown} learnt from it too" + (f" ({', '.join(leaks)})" if leaks else "")
    return Option(METHOD, level, Price(), why, leaks, held)


def _names(learner: ContinualLearner, task_id: int) -> tuple[str, ...]:
    return tuple(sorted(component.name for component in holders(learner, task_id)))
