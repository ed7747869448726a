"""Tasks in their order, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cl_platform.errors import UserError
from cl_platform.scenarios.image_set import ImageSet


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        task_id: its identity, kept when other tasks are left out.
        position: its place in the stream, from 0.
        classes: its class ids in the order of the scenario.
        train: images to learn from.
        validation: images held out of training; may be empty.
        test: images to evaluate on.
        parts: the tasks that it is a union of; empty for a task of the scenario itself.
    """

    task_id: int
    position: int
    classes: tuple[int, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    parts: tuple[Task, ...] = ()


@dataclass(frozen=True)
class Stream:
    """The ordered tasks of a scenario.

    Attributes:
        name: the scenario's name.
        tasks: in the order of learning.
        setting: ``class``, ``domain`` or ``task``.
        num_classes: number of global class ids, whether or not a task holds them.
        class_names: one name per class id.
        class_order: class ids in the order in which the scenario deals them out.
        digest: SHA-256 of pixels, labels and the split: equal digests mean comparable results.
        image_shape: (channels, height, width) of the images as read.
        online: whether every task is passed over once.
        skipped: number of unreadable images left out.
        source: a sentence that says where the data came from.
        hidden: the bounds between tasks are for evaluation alone; see :func:`~cl_platform.scenarios.hidden.as_told`.
        left_out: ids of the scenario's tasks that are not among ``tasks``; they count in what is divided by tasks.
    """

    name: str
    tasks: tuple[Task, ...]
    setting: str
    num_classes: int
    class_names: tuple[str, ...]
    class_order: tuple[int, ...]
    digest: str
    image_shape: tuple[int, int, int]
    online: bool
    skipped: int
    source: str
    hidden: bool = False
    left_out: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def planned(self) -> int:
        """Tasks of the scenario, those left out included: what shares are divided by, so that none shifts."""
        return len(self.tasks) + len(self.left_out)

    def task(self, task_id: int) -> Task:
        """The task of the given id; a KeyError if the stream has none."""
        for task in self.tasks:
            if task.task_id == task_id:
                return task
        raise KeyError(task_id)


def stream_digest(setting: str, tasks: Sequence[Task], pixel_digests: Sequence[str]) -> str:
    """SHA-256 over the pixel digests and, per task, its id, classes, domain, labels and rows of each split."""
    total = hashlib.sha256(b"cl_platform/stream/1\0" + setting.encode())
    for digest in pixel_digests:
        total.update(digest.encode())
    for task in tasks:
        total.update(f"{task.task_id}:{task.classes}".encode())
        for part in (task.train, task.validation, task.test):
            total.update(b"\0" + (part.domain.name if part.domain else "").encode() + b"\0")
            total.update(part.example_ids.numpy().tobytes() + part.labels.numpy().tobytes())
    return total.hexdigest()


def refuse_empty(task: Task) -> None:
    """A ``UserError`` when the task has nothing to learn from or nothing to be tested on."""
    for name, part in (("training", task.train), ("test", task.test)):
        if len(part) == 0:
            raise UserError(
                "scenario",
                f"task {task.task_id}",
                f"the task has no {name} images (classes {list(task.classes)})",
                "Give every class images, keep more of them per class, or leave the task out with scenario.skip_tasks",
            )
