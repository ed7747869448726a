"""From a scenario's configuration to a stream; the built-in scenarios by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from cl_platform.errors import UserError, unknown_name
from cl_platform.random_streams import RUN_LEVEL
from cl_platform.registry import scenarios
from cl_platform.scenarios import sources
from cl_platform.scenarios.config import DataConfig, ScenarioConfig
from cl_platform.scenarios.datasets import arrays_of
from cl_platform.scenarios.domains import Permutation, Rotation
from cl_platform.scenarios.given import as_configured, is_given
from cl_platform.scenarios.image_set import DomainTransform, image_set
from cl_platform.scenarios.sources import Source, in_memory
from cl_platform.scenarios.splits import RowPicker, class_chunks, class_order, hold_out, kept_tasks
from cl_platform.scenarios.stream import Recipe, Stream, Task, refuse_empty, stream_digest

PLACE = "place "
"""Beginning of the name of a class that is a place within its task."""


def build_stream(scenario: ScenarioConfig, data: DataConfig, seed: int, given: Stream | None = None) -> Stream:
    """The stream of a scenario.

    Args:
        scenario: keys below ``scenario``.
        data: keys below ``data``.
        seed: the run's seed; keys seeded subsets, validation draws and pixel permutations, but not the class order.
        given: the stream itself, where it was given from Python.

    Raises:
        UserError: an unknown scenario, data that cannot be had or read, or classes that do not divide into tasks.
    """
    if given is not None or is_given(scenario.kind):
        return as_configured(given, scenario)
    if scenario.kind not in scenarios:
        raise unknown_name("scenario", scenario.kind, scenarios.names())
    builder: Callable[[ScenarioConfig, DataConfig, int], Stream] = scenarios.get(scenario.kind)
    left_out = tuple(sorted(set(scenario.skip_tasks)))
    stream = replace(builder(scenario, data, seed), hidden=scenario.boundaries == "hidden", left_out=left_out)
    object.__setattr__(stream, "recipe", Recipe(scenario, data, seed))  # no argument, or copies would take it along
    return stream


def split_by_class(source: Source, scenario: ScenarioConfig, seed: int) -> Stream:
    """Every task holds a chunk of the class order; the images of a class belong to one task only.

    In the domain-incremental setting a label is the class's place within its task, so all tasks share label ids.
    """
    order = class_order(scenario.class_order, source.class_names)
    chunks = class_chunks(order, scenario.num_tasks)
    pick = _pickers(source, scenario, seed)
    shared_labels = scenario.setting == "domain"
    tasks = []
    for position, task_id in enumerate(kept_tasks(scenario.num_tasks, scenario.skip_tasks)):
        classes = chunks[task_id]
        train, validation = hold_out(pick["train"], classes, scenario.validation_share, seed, task_id)
        rows = {"train": train, "validation": validation, "test": pick["test"].of_all(classes)}
        place = {c: i for i, c in enumerate(classes)}
        parts = {}
        for name, chosen in rows.items():
            pixels = source.test if name == "test" else source.train
            labels = np.array([place[c] for c in pixels.labels[chosen].tolist()], dtype=np.int64)
            parts[name] = image_set(pixels, chosen, labels=labels if shared_labels else None)
        task_classes = tuple(range(len(classes))) if shared_labels else classes
        tasks.append(Task(task_id, position, task_classes, parts["train"], parts["validation"], parts["test"]))
    names = tuple(f"{PLACE}{i}" for i in range(len(chunks[0]))) if shared_labels else source.class_names
    return _finish(source, scenario, tasks, names, tuple(range(len(names))) if shared_labels else order)


def split_by_transform(
    source: Source, scenario: ScenarioConfig, seed: int, changes: Sequence[DomainTransform]
) -> Stream:
    """Every task holds all classes and all images under a change of its own."""
    _refuse_class_setting(scenario)
    order = class_order(scenario.class_order, source.class_names)
    pick = _pickers(source, scenario, seed)
    # one draw for all tasks: an image held out in one domain is trained on in none
    train, validation = hold_out(pick["train"], order, scenario.validation_share, seed, RUN_LEVEL)
    test = pick["test"].of_all(order)
    tasks = []
    for position, task_id in enumerate(kept_tasks(scenario.num_tasks, scenario.skip_tasks)):
        change = changes[task_id]
        parts = (image_set(source.train, train, change), image_set(source.train, validation, change))
        tasks.append(Task(task_id, position, order, *parts, image_set(source.test, test, change)))
    return _finish(source, scenario, tasks, source.class_names, order)


def split_by_session(source: Source, scenario: ScenarioConfig, seed: int) -> Stream:
    """Every task holds one domain of the data set's own; all share one test set."""
    _refuse_class_setting(scenario)
    count = len(source.domain_names)
    if scenario.num_tasks != count:
        raise UserError(
            "scenario.num_tasks",
            scenario.num_tasks,
            f"the data has {count} training sessions ({', '.join(source.domain_names)}), one a task",
            f"Set scenario.num_tasks={count}",
        )
    assert source.train.domains is not None
    order = class_order(scenario.class_order, source.class_names)
    test_picker = RowPicker(source.test.labels, scenario.test_per_class, scenario.subset, seed, "test")
    test = image_set(source.test, test_picker.of_all(order))
    tasks = []
    for position, task_id in enumerate(kept_tasks(count, scenario.skip_tasks)):
        among = np.flatnonzero(source.train.domains == task_id)
        labels = source.train.labels
        picker = RowPicker(labels, scenario.train_per_class, scenario.subset, seed, f"train.{task_id}", among)
        train, validation = hold_out(picker, order, scenario.validation_share, seed, task_id)
        tasks.append(
            Task(task_id, position, order, image_set(source.train, train), image_set(source.train, validation), test)
        )
    return _finish(source, scenario, tasks, source.class_names, order)


def _pickers(source: Source, scenario: ScenarioConfig, seed: int) -> dict[str, RowPicker]:
    return {
        "train": RowPicker(source.train.labels, scenario.train_per_class, scenario.subset, seed, "train"),
        "test": RowPicker(source.test.labels, scenario.test_per_class, scenario.subset, seed, "test"),
    }


def _refuse_class_setting(scenario: ScenarioConfig) -> None:
    if scenario.setting == "class":
        raise UserError(
            "scenario.setting",
            "class",
            f"every task of {scenario.kind} holds all classes; allowed are domain and task",
            "Set scenario.setting=domain",
        )


def _finish(
    source: Source, scenario: ScenarioConfig, tasks: list[Task], names: tuple[str, ...], order: tuple[int, ...]
) -> Stream:
    for task in tasks:
        refuse_empty(task)
    _, height, width = (int(side) for side in source.train.images.shape[1:])
    return Stream(
        name=scenario.kind,
        tasks=tuple(tasks),
        setting=scenario.setting,
        num_classes=len(names),
        class_names=names,
        class_order=order,
        digest=stream_digest(scenario.setting, tasks, (source.train.digest, source.test.digest)),
        image_shape=(3, height, width),
        online=scenario.online,
        skipped=source.skipped,
        source=source.sentence,
    )


def rotations(scenario: ScenarioConfig) -> list[DomainTransform]:
    """One rotation a task: ``scenario.domains`` in degrees, else equal steps through half a turn from 0."""
    count = scenario.num_tasks
    angles = scenario.domains if scenario.domains is not None else tuple(180.0 * t / count for t in range(count))
    if len(angles) != count:
        raise UserError(
            "scenario.domains", list(angles), f"must hold one angle for each of the {count} tasks", "Set it to null"
        )
    return [Rotation(float(angle)) for angle in angles]


def permutations(scenario: ScenarioConfig, seed: int) -> list[DomainTransform]:
    """One pixel permutation a task, keyed by the run's seed and the task id; task 0 keeps its pixels."""
    return [Permutation(seed, task_id) for task_id in range(scenario.num_tasks)]


def stream_from_datasets(
    train: Any,
    test: Any,
    num_tasks: int,
    *,
    setting: str = "class",
    class_order: int | str | Sequence[int | str] = "natural",
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    validation_share: float = 0.0,
    skip_tasks: Sequence[int] = (),
    online: bool = False,
    name: str = "custom",
) -> Stream:
    """A class-split stream of any two torch data sets of (PIL image or tensor, label).

    Args:
        train: data set to learn from, with ``len`` and ``[i] -> (image, label, ...)``; images without augmentation,
            uint8 or within 0..1.
        test: data set to evaluate on.
        num_tasks: divides the number of classes.
        setting: ``class``, ``domain`` or ``task``.
        class_order: as ``scenario.class_order``.
        seed: keys the validation draw.
        class_names: one per class id 0..C-1; None names them by their numbers.
        image_size: bring images to this side in pixels; None needs all of one size.
        train_per_class: training images kept per class, the first in order.
        test_per_class: the same for test images.
        validation_share: share of each class held out of training.
        skip_tasks: task ids left out.
        online: whether every task is passed over once.
        name: the stream's name.
    """
    train_pixels, test_pixels = in_memory(*arrays_of(train, image_size)), in_memory(*arrays_of(test, image_size))
    labels = np.concatenate([train_pixels.labels, test_pixels.labels])
    count = int(labels.max(initial=-1)) + 1 if class_names is None else len(class_names)
    if labels.size and (labels.min() < 0 or labels.max() >= count):
        raise UserError("dataset", int(labels.max()), f"labels must be class ids 0..{count - 1}", "Renumber the labels")
    names = tuple(str(c) for c in range(count)) if class_names is None else tuple(class_names)
    source = Source(train_pixels, test_pixels, names, "two torch data sets given from Python")
    scenario = ScenarioConfig(
        kind=name,
        num_tasks=num_tasks,
        setting=setting,
        class_order=class_order if isinstance(class_order, (int, str)) else tuple(class_order),
        train_per_class=train_per_class,
        test_per_class=test_per_class,
        validation_share=validation_share,
        skip_tasks=tuple(skip_tasks),
        online=online,
    )
    return split_by_class(source, scenario, seed)


def _class_split(dataset: str, scenario: ScenarioConfig, data: DataConfig, seed: int) -> Stream:
    return split_by_class(_source(dataset, scenario, data), scenario, seed)


def _rotated(dataset: str, scenario: ScenarioConfig, data: DataConfig, seed: int) -> Stream:
    return split_by_transform(_source(dataset, scenario, data), scenario, seed, rotations(scenario))


def _permuted(dataset: str, scenario: ScenarioConfig, data: DataConfig, seed: int) -> Stream:
    return split_by_transform(_source(dataset, scenario, data), scenario, seed, permutations(scenario, seed))


def _core50(scenario: ScenarioConfig, data: DataConfig, seed: int) -> Stream:
    return split_by_session(sources.core50(scenario, data), scenario, seed)


def _avalanche(scenario: ScenarioConfig, data: DataConfig, seed: int) -> Stream:
    from cl_platform.scenarios.avalanche import classic_stream

    return classic_stream(scenario, data, seed)


def _source(dataset: str, scenario: ScenarioConfig, data: DataConfig) -> Source:
    if dataset == "digits":
        return sources.digits()
    if dataset == "imagenet_r":
        return sources.imagenet_r(scenario, data)
    if dataset == "image_folder":
        return sources.image_folder(scenario, data)
    return sources.named_dataset(dataset, scenario, data)


def _register_built_in() -> None:
    class_splits = ("digits", "mnist", "fmnist", "cifar10", "cifar100", "tiny_imagenet", "imagenet_r", "cub200")
    for dataset in class_splits:
        scenarios.register(f"split_{dataset}")(partial(_class_split, dataset))
    for dataset in ("digits", "mnist"):
        scenarios.register(f"rotated_{dataset}")(partial(_rotated, dataset))
        scenarios.register(f"permuted_{dataset}")(partial(_permuted, dataset))
    scenarios.register("image_folder")(partial(_class_split, "image_folder"))
    scenarios.register("core50")(_core50)
    scenarios.register("avalanche")(_avalanche)


_register_built_in()
