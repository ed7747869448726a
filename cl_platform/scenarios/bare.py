"""A run's stream where its images cannot be had: enough to remove what was learnt, not to learn anything."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from cl_platform.errors import UserError
from cl_platform.scenarios.stream import Stream, stream_digest


@dataclass(frozen=True)
class Bare:
    """What is left of a stream whose data are gone.

    Attributes:
        stream: its tasks, without images.
        missing: why the images cannot be had; raised where they are needed.
    """

    stream: Stream
    missing: UserError

    def without(self, task_ids: Collection[int]) -> Stream:
        """The stream without some tasks; the others keep their ids and move up."""
        kept = [task for task in self.stream.tasks if task.task_id not in task_ids]
        if len(kept) == len(self.stream.tasks):
            return self.stream
        tasks = tuple(replace(task, position=place) for place, task in enumerate(kept))
        gone = {task.task_id for task in self.stream.tasks} - {task.task_id for task in kept}
        left_out = tuple(sorted({*self.stream.left_out, *gone}))
        digest = stream_digest(self.stream.setting, tasks, (self.stream.digest,))
        return replace(self.stream, tasks=tasks, left_out=left_out, digest=digest)
