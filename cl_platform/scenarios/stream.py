"""Tasks in their order, and what identifies them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from cl_platform.errors import UserError
from cl_platform.scenarios.config import DataConfig, ScenarioConfig
from cl_platform.scenarios.image_set import ImageSet


@dataclass(frozen=True)
class Recipe:
    """From what a stream was built, so that it can be built again: keys of ``scenario`` and ``data``, and a seed."""

    scenario: ScenarioConfig
    data: DataConfig
    seed: int


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
class Extended:
    """What a stream was before tasks were added to it: what was divided then stays as it is.

    Attributes:
        planned: tasks that the run began with, those left out included.
        starts: id of the first task of each extension, ascending.
        classes: number of class ids before each extension.
    """

    planned: int
    starts: tuple[int, ...]
    classes: tuple[int, ...]


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
        extended: how far it went before tasks were added to it; ``None`` for a scenario's own stream.
        recipe: from what it was built; ``None`` where no configuration says so. A changed copy of a stream has none.
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
    extended: Extended | None = None
    recipe: Recipe | None = field(default=None, init=False, repr=False, compare=False)  # init=False: no copy takes it

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def planned(self) -> int:
        """Tasks of the scenario, those left out included: what shares are divided by, so that none shifts.

        Tasks that were added later do not count: they get shares of the same size.
        """
        return self.total if self.extended is None else self.extended.planned

    @property
    def total(self) -> int:
        """All tasks, those left out and those added later included."""
        return len(self.tasks) + len(self.left_out)

    @property
    def declared(self) -> tuple[int, ...]:
        """Number of class ids of the scenario itself, then after each extension."""
        return (*(() if self.extended is None else self.extended.classes), self.num_classes)

    @property
    def ends(self) -> tuple[int, ...]:
        """Position of the last task of the scenario, and of each extension that has a task."""
        starts = () if self.extended is None else self.extended.starts
        return tuple({bisect_right(starts, task.task_id): place for place, task in enumerate(self.tasks)}.values())

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
