"""A stream that was given from Python: no file says how to make it, so a run names it by its content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cl_platform.errors import UserError
from cl_platform.scenarios.config import ScenarioConfig
from cl_platform.scenarios.stream import Stream, stream_digest

_START = "given-"
_DIGITS = 12


def kind_of(stream: Stream) -> str:
    """What stands as ``scenario.kind`` for a given stream: equal for streams of equal images, labels and tasks."""
    content = stream_digest(stream.setting, stream.tasks, (stream.digest,))
    return _START + content[:_DIGITS]


def is_given(kind: str) -> bool:
    """Whether a ``scenario.kind`` stands for a stream that was given from Python."""
    return kind.startswith(_START)


def as_configured(given: Stream | None, scenario: ScenarioConfig) -> Stream:
    """A given stream as a run's keys want it: without skipped tasks, its bounds shown or hidden, one pass or several.

    Raises:
        UserError: it is not there, it is another one than the run's, or a task is skipped that it does not have.
    """
    again = "Give the stream again from Python: cl_platform.Run.open(RUN, stream=STREAM)"
    if given is None:
        raise UserError(
            "scenario.kind", scenario.kind,
            "the images and tasks of this run were given from Python, no file holds them", again,
        )  # fmt: skip
    if not is_given(scenario.kind):
        raise UserError("stream", given.name, "the run's configuration says how its stream is made", "Leave it out")
    if kind_of(given) != scenario.kind:
        raise UserError(
            "stream", given.name, "holds other images, labels or tasks than the stream that the run was started with",
            "Give the same stream again",
        )  # fmt: skip
    kept = _without(given, scenario.skip_tasks)
    return replace(kept, hidden=scenario.boundaries == "hidden", online=scenario.online)


def _without(stream: Stream, skipped: Sequence[int]) -> Stream:
    """The stream without some tasks; the others keep their ids and move up."""
    gone = set(skipped) - set(stream.left_out)
    if not gone:
        return stream
    ids = [task.task_id for task in stream.tasks]
    wrong = sorted(gone - set(ids))
    if wrong:
        listed = ", ".join(map(str, ids))
        raise UserError(
            "scenario.skip_tasks", sorted(skipped), f"the given stream has the tasks {listed}",
            f"Remove {wrong[0]} from it",
        )  # fmt: skip
    kept = [task for task in stream.tasks if task.task_id not in gone]
    if not kept:
        raise UserError(
            "scenario.skip_tasks", sorted(skipped), "at least one task must be left", "Remove one task from it"
        )
    tasks = tuple(replace(task, position=place) for place, task in enumerate(kept))
    left_out = tuple(sorted({*stream.left_out, *gone}))
    return replace(
        stream, tasks=tasks, left_out=left_out, digest=stream_digest(stream.setting, tasks, (stream.digest,))
    )
