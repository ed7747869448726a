"""A scenario's stream with tasks of further data behind it: what a finished run goes on with."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

from cl_platform.errors import UserError
from cl_platform.scenarios.build import PLACE, build_stream
from cl_platform.scenarios.config import DataConfig, ScenarioConfig
from cl_platform.scenarios.datasets import pixels_of
from cl_platform.scenarios.domains import Permutation
from cl_platform.scenarios.image_set import DomainTransform, ImageSet
from cl_platform.scenarios.stream import Extended, Stream, Task

_SHOWN = 5  # classes named in a message


@dataclass(frozen=True)
class Extension:
    """Tasks added to a run: keys of ``scenario`` and ``data``, as in the run's own groups of these names."""

    scenario: ScenarioConfig
    data: DataConfig


@dataclass(frozen=True)
class _Part:
    """The stream of one scenario by itself.

    Attributes:
        stream: its tasks, under ids from 0.
        rows: images of the data's training and test splits, those of no task included.
    """

    stream: Stream
    rows: tuple[int, int]


def build_extended(
    scenario: ScenarioConfig,
    data: DataConfig,
    seed: int,
    extensions: Sequence[Extension],
    skipped: Collection[int] = (),
    given: Stream | None = None,
) -> Stream:
    """The stream of a scenario and of all that was added to it.

    Ids of tasks, of classes and of images go on where those of the data before ended, also where tasks in between are
    left out: nothing is ever numbered twice. Added images come in the size of the first ones. In a stream whose tasks
    share their classes the added ones are matched by name, else all added classes are new.

    Args:
        scenario: keys below ``scenario``.
        data: keys below ``data``.
        seed: of the run.
        extensions: what was added, in its order.
        skipped: ids of tasks that are left out.
        given: the scenario's stream, where it was given from Python.

    Raises:
        UserError: as :func:`~cl_platform.scenarios.build_stream`, or data that do not fit to those before.
    """
    if not extensions:
        return build_stream(replace(scenario, skip_tasks=tuple(sorted(skipped))), data, seed, given)
    first = scenario.num_tasks if given is None else given.total
    starts = list(accumulate([first, *(extension.scenario.num_tasks for extension in extensions)]))
    unknown = [task_id for task_id in skipped if not 0 <= task_id < starts[-1]]
    own = {task_id for task_id in skipped if task_id < first}
    part = _part(scenario, data, seed, {*own, *unknown}, first, given)
    stream, rows = part.stream, part.rows
    if stream.hidden:
        raise UserError(
            "scenario.boundaries", "hidden", "such a stream is a single training, which nothing can be added to",
            "Train a new run on all of the data",
        )  # fmt: skip
    stream = replace(stream, extended=Extended(stream.planned, (), ()))
    for number, (extension, start) in enumerate(zip(extensions, starts, strict=False)):
        gone = {task_id - start for task_id in skipped if start <= task_id < starts[number + 1]}
        part = _part(_like(extension.scenario, stream), extension.data, seed, gone, extension.scenario.num_tasks)
        stream = _appended(stream, part.stream, start, rows)
        rows = (rows[0] + part.rows[0], rows[1] + part.rows[1])
    return stream


def shares_classes(stream: Stream) -> bool:
    """Whether every task of a stream has the same classes, so that an added one has to bring them as well."""
    if stream.setting == "domain":
        return True
    return len(stream.tasks) > 1 and len({frozenset(task.classes) for task in stream.tasks}) == 1


def _like(scenario: ScenarioConfig, stream: Stream) -> ScenarioConfig:
    """Keys of an extension with what the stream decides: the size of images, and what a label is.

    Where the stream's labels are classes, and not places within a task, those of data that are split by class are too.
    """
    height, width = stream.image_shape[1:]
    if height == width:
        scenario = replace(scenario, image_size=height)
    if stream.setting == "domain" and not stream.class_names[0].startswith(PLACE):
        scenario = replace(scenario, setting="task")
    return scenario


def _part(
    scenario: ScenarioConfig,
    data: DataConfig,
    seed: int,
    gone: Collection[int],
    count: int,
    given: Stream | None = None,
) -> _Part:
    """One scenario by itself; also with all of its tasks left out, which a whole stream may not be."""
    nothing_left = set(range(count)) <= set(gone)
    kept_out = sorted(set(gone) - {0}) if nothing_left else sorted(gone)
    stream = build_stream(replace(scenario, skip_tasks=tuple(kept_out)), data, seed, given)
    rows = (_rows(stream.tasks[0].train), _rows(stream.tasks[0].test))
    if nothing_left:
        stream = replace(stream, tasks=(), left_out=tuple(sorted({*stream.left_out, *gone})))
    return _Part(stream, rows)


def _rows(images: ImageSet) -> int:
    """Images of the split that a set is taken from."""
    source = getattr(images, "source", None)
    return int(images.example_ids.max()) + 1 if source is None else len(source)


def _appended(stream: Stream, part: Stream, start: int, rows: tuple[int, int]) -> Stream:
    """A stream with the tasks of another one behind its own.

    Args:
        stream: the one.
        part: the other, under ids from 0.
        start: id of its first task.
        rows: images of the data before, training and test.
    """
    shared = shares_classes(stream)
    first = stream.num_classes
    if shared:
        _refuse_parts_of_classes(part)
    ids = _matched(stream, part) if shared else [first + c for c in range(part.num_classes)]
    pixels: dict[int, np.ndarray] = {}
    tasks = [*stream.tasks]
    for task in part.tasks:
        train, validation, test = (
            _moved(images, ids, shift, stream, start + task.task_id, pixels)
            for images, shift in ((task.train, rows[0]), (task.validation, rows[0]), (task.test, rows[1]))
        )
        classes = tuple(ids[c] for c in task.classes)
        tasks.append(Task(start + task.task_id, len(tasks), classes, train, validation, test))
    assert stream.extended is not None
    before = stream.extended
    return replace(
        stream,
        tasks=tuple(tasks),
        num_classes=first if shared else first + part.num_classes,
        class_names=stream.class_names if shared else (*stream.class_names, *part.class_names),
        class_order=stream.class_order if shared else (*stream.class_order, *(ids[c] for c in part.class_order)),
        digest=hashlib.sha256(f"cl_platform/extended/1\0{stream.digest}\0{part.digest}".encode()).hexdigest(),
        skipped=stream.skipped + part.skipped,
        source=f"{stream.source}; then {part.source}",
        left_out=(*stream.left_out, *(start + task_id for task_id in part.left_out)),
        extended=Extended(before.planned, (*before.starts, start), (*before.classes, first)),
    )


def _matched(stream: Stream, part: Stream) -> list[int]:
    """The stream's class id of each class of a part, by their names.

    Raises:
        UserError: a class that only one of both has.
    """
    id_of = {name: c for c, name in enumerate(stream.class_names)}
    new = [name for name in part.class_names if name not in id_of]
    missing = [name for name in stream.class_names if name not in part.class_names]
    if new or missing:
        said = [f"{_some(new)} {'is' if len(new) == 1 else 'are'} new to the run"] if new else []
        said += [f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing"] if missing else []
        raise UserError(
            "scenario", part.name,
            f"all tasks of the run have the same classes, and those of the new ones are others: {' and '.join(said)}",
            "Give the new tasks the same classes, or train a new run",
        )  # fmt: skip
    return [id_of[name] for name in part.class_names]


def _refuse_parts_of_classes(part: Stream) -> None:
    task = next((task for task in part.tasks if len(task.classes) < part.num_classes), None)
    if task is not None:
        raise UserError(
            "scenario.num_tasks", part.total,
            f"all tasks of the run have the same classes, and a new one would have {len(task.classes)} of the "
            f"{part.num_classes}", "Set scenario.num_tasks=1",
        )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _moved(
    images: ImageSet, ids: Sequence[int], shift: int, stream: Stream, task_id: int, pixels: dict[int, np.ndarray]
) -> ImageSet:
    """The images of a part under the stream's class ids, behind its example ids and in its size."""
    key = id(images.source)
    if key not in pixels:  # the tasks of a part share their source
        pixels[key] = _resized(images.source, stream)
    return replace(
        images,
        labels=torch.tensor(ids, dtype=torch.int64)[images.labels],
        example_ids=images.example_ids + shift,
        source=pixels[key],
        domain=_own(images.domain, task_id),
        first_id=images.first_id + shift,
    )


def _own(domain: DomainTransform | None, task_id: int) -> DomainTransform | None:
    """A change of images that is drawn by the task's id, for another id."""
    return replace(domain, task_id=task_id) if isinstance(domain, Permutation) else domain


def _resized(source: np.ndarray, stream: Stream) -> np.ndarray:
    """Images (N, C, h, w) uint8 in the size of a stream's."""
    height, width = stream.image_shape[1:]
    if source.shape[2:] == (height, width):
        return source
    if height != width:
        raise UserError(
            "scenario", stream.name, f"the run's images are {width} x {height} pixels and the new ones "
            f"{source.shape[3]} x {source.shape[2]}; images are brought to another size as squares only",
            "Bring the new images to the run's size first",
        )  # fmt: skip
    resized = np.empty((*source.shape[:2], height, width), dtype=np.uint8)
    for row, image in enumerate(source):
        resized[row] = pixels_of(np.asarray(image), height)
    return resized
