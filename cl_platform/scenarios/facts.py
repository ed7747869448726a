"""What a learner is built from, of a stream, without its images: a file of the run folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from cl_platform.scenarios.image_set import ImageSet
from cl_platform.scenarios.stream import Extended, Stream, Task

FILE = "stream.json"
SCHEMA = "cl_platform/stream/1"


def facts_of(stream: Stream, forgotten: Collection[int] = ()) -> dict[str, Any]:
    """The facts of a stream as plain JSON.

    A class that only forgotten or left-out tasks have keeps its id, without its name.

    Args:
        stream: of a run.
        forgotten: ids of tasks that the run has forgotten and that kept their place in the stream.
    """
    named = {c for task in stream.tasks if task.task_id not in forgotten for c in task.classes}
    return {
        "schema": SCHEMA,
        "name": stream.name,
        "setting": stream.setting,
        "num_classes": stream.num_classes,
        "class_names": [name if c in named else None for c, name in enumerate(stream.class_names)],
        "class_order": list(stream.class_order),
        "image_shape": list(stream.image_shape),
        "channels": stored_channels(stream),
        "online": stream.online,
        "hidden": stream.hidden,
        "left_out": list(stream.left_out),
        "extended": None if stream.extended is None else asdict(stream.extended),
        "skipped": stream.skipped,
        "source": stream.source,
        "digest": stream.digest,
        "tasks": [
            {"task_id": task.task_id, "classes": list(task.classes), "forgotten": task.task_id in forgotten}
            for task in stream.tasks
        ],
    }


def stored_channels(stream: Stream) -> int:
    """Channels of a stream's images as stored: 1 where all are grey."""
    sources = (getattr(task.train, "source", None) for task in stream.tasks)
    return max(3 if source is None else int(source.shape[1]) for source in sources)


def stream_from(facts: Mapping[str, Any]) -> Stream:
    """The stream that :func:`facts_of` described; its tasks hold no images.

    Raises:
        KeyError: a fact is missing.
        ValueError: facts of another version, or that do not fit together.
    """
    if facts["schema"] != SCHEMA:
        raise ValueError(f"its schema is {facts['schema']}, not {SCHEMA}")
    height, width = facts["image_shape"][1:]
    rows = torch.empty(0, dtype=torch.int64)
    none = ImageSet(rows, rows, np.empty((0, facts["channels"], height, width), dtype=np.uint8))
    names = tuple(f"class {c}" if name is None else str(name) for c, name in enumerate(facts["class_names"]))
    tasks = [
        Task(int(entry["task_id"]), position, tuple(map(int, entry["classes"])), none, none, none)
        for position, entry in enumerate(facts["tasks"])
    ]
    if len(names) != facts["num_classes"] or any(c >= len(names) for task in tasks for c in task.classes):
        raise ValueError("there is not one name for each class")
    return Stream(
        name=facts["name"],
        tasks=tuple(tasks),
        setting=facts["setting"],
        num_classes=facts["num_classes"],
        class_names=names,
        class_order=tuple(facts["class_order"]),
        digest=facts["digest"],
        image_shape=(3, height, width),
        online=facts["online"],
        skipped=facts["skipped"],
        source=facts["source"],
        hidden=facts["hidden"],
        left_out=tuple(facts["left_out"]),
        extended=_extended(facts.get("extended")),
    )


def _extended(facts: Mapping[str, Any] | None) -> Extended | None:
    if facts is None:
        return None
    return Extended(int(facts["planned"]), tuple(facts["starts"]), tuple(facts["classes"]))
