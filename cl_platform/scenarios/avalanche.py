"""Avalanche's benchmarks as streams. Avalanche takes seconds to import, so it is imported inside the functions only."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_platform.errors import UserError, unknown_name
from cl_platform.scenarios import downloads
from cl_platform.scenarios.config import DataConfig, ScenarioConfig
from cl_platform.scenarios.datasets import arrays_of
from cl_platform.scenarios.image_set import Pixels, image_set
from cl_platform.scenarios.sources import in_memory
from cl_platform.scenarios.splits import RowPicker, hold_out, kept_tasks
from cl_platform.scenarios.stream import Stream, Task, refuse_empty, stream_digest

CLASSIC = {
    "SplitMNIST": "mnist",
    "PermutedMNIST": "mnist",
    "RotatedMNIST": "mnist",
    "SplitFMNIST": "fmnist",
    "SplitCIFAR10": "cifar10",
    "SplitCIFAR100": "cifar100",
    "SplitTinyImageNet": "tiny_imagenet",
    "SplitCUB200": "cub200",
}
"""Names that ``scenario.benchmark`` may have, and the data set that each downloads."""


def stream_from_avalanche(
    benchmark: Any,
    *,
    name: str = "avalanche",
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    options: ScenarioConfig | None = None,
    seed: int = 0,
) -> Stream:
    """Any Avalanche classification benchmark as a stream, one task an element of its training stream.

    Its training and evaluation transforms are left out, its fixed ones stay. A lone test element serves all tasks.

    Args:
        benchmark: an object with ``train_stream`` and ``test_stream``.
        name: the stream's name.
        image_size: bring images to this side in pixels; None needs all of one size.
        class_names: one per class id; None names them by their numbers.
        options: subsets, validation share, skipped tasks, setting, online; None keeps all and reads the setting off.
        seed: keys the draws of ``options``.

    Raises:
        UserError: images that are no uint8 or 0..1 values, or streams whose lengths do not match.
    """
    train_parts, test_parts = list(benchmark.train_stream), list(benchmark.test_stream)
    if len(test_parts) not in (1, len(train_parts)):
        raise UserError(
            "scenario.benchmark",
            name,
            f"{len(train_parts)} training and {len(test_parts)} test elements do not match",
            "Give the benchmark one test element, or as many as training ones",
        )
    train, train_rows = _stacked(train_parts, image_size)
    test, test_rows = _stacked(test_parts, image_size)
    found = [_classes(train, rows) for rows in train_rows]
    if options is None:
        options = ScenarioConfig(kind=name, num_tasks=len(train_parts), setting=_setting(train_parts, found))
    elif options.setting == "class" and _setting(train_parts, found) == "domain":
        raise UserError(
            "scenario.setting",
            "class",
            f"tasks of {name} share classes; allowed are domain and task",
            "Set scenario.setting=domain",
        )
    tasks = _tasks((train, train_rows), (test, test_rows), options, seed)
    count = int(max(train.labels.max(), test.labels.max())) + 1
    names = tuple(class_names) if class_names is not None else tuple(str(c) for c in range(count))
    return Stream(
        name=name,
        tasks=tuple(tasks),
        setting=options.setting,
        num_classes=len(names),
        class_names=names,
        class_order=tuple(dict.fromkeys(c for classes in found for c in classes)),
        digest=stream_digest(options.setting, tasks, (train.digest, test.digest)),
        image_shape=(3, int(train.images.shape[2]), int(train.images.shape[3])),
        online=options.online,
        skipped=0,
        source=f"the Avalanche benchmark {name}",
        left_out=tuple(sorted(set(options.skip_tasks))),
    )


def classic_stream(scenario: ScenarioConfig, data: DataConfig, seed: int) -> Stream:
    """A classic Avalanche benchmark by ``scenario.benchmark``, as Avalanche itself splits it.

    ``scenario.class_order`` is ``natural`` or a seed and goes to Avalanche; data lie under ``<root>/downloads``.
    """
    if scenario.benchmark is None:
        raise UserError(
            "scenario.benchmark", None, f"must be one of {', '.join(CLASSIC)}", "Set scenario.benchmark=SplitMNIST"
        )
    if scenario.benchmark not in CLASSIC:
        raise unknown_name("scenario.benchmark", scenario.benchmark, CLASSIC)
    order = scenario.class_order
    if not (order == "natural" or isinstance(order, int)):
        raise UserError(
            "scenario.class_order", order, "an Avalanche benchmark takes natural or a seed", "Use a whole number"
        )
    root, dataset = data.root_folder(), CLASSIC[scenario.benchmark]
    folder = root / "downloads" / "avalanche" / dataset
    if not folder.is_dir() or not any(folder.iterdir()):
        if not data.download:
            raise downloads.missing(dataset, root, f"data.download=false forbids a download to {folder}")
        url = downloads.download_url(dataset)
        if url is not None:
            downloads.refuse_unreachable(url, dataset, root)
    benchmark = _make_classic(scenario, order if isinstance(order, int) else None, folder)
    size = scenario.image_size or (256 if dataset == "cub200" else None)
    return stream_from_avalanche(benchmark, name=scenario.benchmark, image_size=size, options=scenario, seed=seed)


Rows = tuple[Pixels, list[np.ndarray]]


def _tasks(train: Rows, test: Rows, options: ScenarioConfig, seed: int) -> list[Task]:
    """One task per element of the training stream; a test stream of one element serves them all."""
    (train_pixels, train_rows), (test_pixels, test_rows) = train, test
    tasks = []
    for position, task_id in enumerate(kept_tasks(len(train_rows), options.skip_tasks)):
        classes = _classes(train_pixels, train_rows[task_id])
        picker = _picker(train_pixels, train_rows[task_id], options.train_per_class, options, seed, f"train.{task_id}")
        kept, held = hold_out(picker, classes, options.validation_share, seed, task_id)
        wanted = test_rows[task_id if len(test_rows) > 1 else 0]
        tested = _picker(test_pixels, wanted, options.test_per_class, options, seed, f"test.{task_id}")
        test_set = image_set(test_pixels, tested.of_all(_classes(test_pixels, wanted)))
        parts = (image_set(train_pixels, kept), image_set(train_pixels, held), test_set)
        tasks.append(Task(task_id, position, classes, *parts))
        refuse_empty(tasks[-1])
    return tasks


def _classes(pixels: Pixels, rows: np.ndarray) -> tuple[int, ...]:
    return tuple(sorted(set(pixels.labels[rows].tolist())))


def _make_classic(scenario: ScenarioConfig, order: int | None, folder: Path) -> Any:
    from avalanche.benchmarks import classic

    make = getattr(classic, str(scenario.benchmark))
    wanted = {
        "n_experiences": scenario.num_tasks,
        "seed": 0 if order is None else order,
        "shuffle": order is not None,
        "classes_first_batch": None,
        "train_transform": None,
        "eval_transform": None,
        "dataset_root": folder,
    }
    known = inspect.signature(make).parameters
    try:
        return make(**{key: value for key, value in wanted.items() if key in known})
    except Exception as error:  # Avalanche checks by assertions; downloads fail in many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            "scenario.benchmark",
            scenario.benchmark,
            f"Avalanche could not build it with {scenario.num_tasks} tasks under {folder} ({reason})",
            "Check scenario.num_tasks and the data, or use the embedded data with scenario=split_digits",
        ) from error


def _stacked(parts: Sequence[Any], image_size: int | None) -> tuple[Pixels, list[np.ndarray]]:
    """The images of all elements as one array, and the rows that belong to each element."""
    arrays = [arrays_of(_without_transforms(part.dataset), image_size) for part in parts]
    channels = max(images.shape[1] for images, _ in arrays)
    wide = [np.broadcast_to(i, (len(i), channels, *i.shape[2:])) for i, _ in arrays]
    ends = np.cumsum([len(labels) for _, labels in arrays])
    rows = np.split(np.arange(ends[-1]), ends[:-1])
    return in_memory(np.concatenate(wide), np.concatenate([labels for _, labels in arrays])), rows


def _without_transforms(dataset: Any) -> Any:
    remove = getattr(dataset, "replace_current_transform_group", None)
    return remove(None) if remove is not None else dataset


def _picker(
    pixels: Pixels, rows: np.ndarray, per_class: int | None, options: ScenarioConfig, seed: int, split: str
) -> RowPicker:
    return RowPicker(pixels.labels, per_class, options.subset, seed, split, rows)


def _setting(parts: Sequence[Any], classes: Sequence[Sequence[int]]) -> str:
    """``task`` if elements carry different task labels, ``class`` if they share no class, else ``domain``."""
    labels = [getattr(part, "task_labels", [0]) for part in parts]
    if len({tuple(each) for each in labels}) == len(parts) > 1:
        return "task"
    total = sum(len(each) for each in classes)
    return "class" if total == len({c for each in classes for c in each}) else "domain"
