"""A run opened for use: its newest checkpoint as a learner that answers, without the data it was trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cl_platform.building import build_learner, instructions_of, stream_of
from cl_platform.errors import UserError
from cl_platform.evaluation import EVALUATION_BATCH
from cl_platform.requests import configuration_of
from cl_platform.run_folder import checkpoints
from cl_platform.scenarios.datasets import pixels_of
from cl_platform.scenarios.decode import UnreadableImageError, decode, to_pixels
from cl_platform.scenarios.facts import FILE, stored_channels, stream_from
from cl_platform.trainer import build_trainer, quiet_libraries
from cl_platform.unlearning import forgotten, journal

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.reevaluation import Accuracies
    from cl_platform.run_config import RunConfig
    from cl_platform.run_folder import Checkpoint
    from cl_platform.scenarios import Stream
    from cl_platform.unlearning.forgotten import Record

LARGEST_FILE = 2**29
"""Bytes of a file that is still read as an image."""
WORKERS = 2


@dataclass(frozen=True)
class Answer:
    """What a learner says about one image.

    Attributes:
        path: of its file as it was given, ``None`` where pixels were given.
        classes: (name, probability among the seen classes) of the most probable ones, best first.
        task_id: the one task that has the best class; ``None`` where several tasks share it.
        error: why the image could not be read; there are no classes then.
    """

    path: str | None
    classes: tuple[tuple[str, float], ...] = ()
    task_id: int | None = None
    error: str | None = None


class Trained:
    """A trained learner and what there is to know to use it; made by :meth:`open`.

    Attributes:
        path: the run folder.
        config: the run's configuration.
        stream: the scenario's tasks; they hold images only where the data were needed to open the run.
        learner: in the state of the checkpoint, on its device.
        checkpoint: the newest one.
        record: what was forgotten by then.
        classes: ids of the classes it answers with, ascending: the columns of :meth:`logits`.
        class_names: their names, in the same order.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        stream: Stream,
        learner: ContinualLearner,
        found: Checkpoint,
        record: Record,
    ) -> None:
        self.path, self.config, self.stream, self.learner = path, config, stream, learner
        self.checkpoint, self.record = found, record
        with learner.answering():
            self.classes = list(learner.seen_classes())
        self.class_names = [stream.class_names[c] for c in self.classes]
        self._owners = _tasks_by_class(stream, record)
        self._channels = stored_channels(stream)

    @classmethod
    def open(cls, path: str | Path, device: str | None = None, stream: Stream | None = None) -> Self:
        """Open the newest checkpoint of a run folder.

        Args:
            path: the run folder.
            device: such as ``cpu`` or ``cuda``; ``None``: the run's own, or whatever there is.
            stream: the run's, where it was given from Python; only :meth:`evaluate` needs it.

        Raises:
            UserError: no run folder, no checkpoint in it, a task that is being forgotten, or another backbone.
        """
        quiet_libraries()
        path = Path(path)
        config = configuration_of(path, stream)
        _refuse_open_request(path)
        found = next(checkpoints(path), None)
        if found is None:
            raise UserError(
                "run", path, "no task of it was finished, so there is no checkpoint to open",
                f"Let it finish one: python train.py ... resume={path}",
            )  # fmt: skip
        record = forgotten.after(path, found.state)
        told = stream_without_images(path)
        if told is None:  # a run that wrote no facts
            told = stream_of(config, record, instructions_of(config, record))
        return cls(path, config, told, restored(config, told, found, path, device), found, record)

    @property
    def device(self) -> torch.device:
        """Where it answers."""
        return self.learner.device

    @property
    def kept_tasks(self) -> list[int]:
        """Ids of the tasks that were learnt, or passed, and not forgotten, in the order of the stream."""
        tasks = self.stream.tasks[: self.checkpoint.position + 1]
        return [task.task_id for task in tasks if task.task_id not in self.record.ids]

    def task_of(self, class_id: int) -> int | None:
        """Id of the one task that has a class; ``None`` where several share it."""
        return self._owners.get(class_id)

    def logits(self, images: Tensor) -> Tensor:
        """Logits (n, S) float32 on the CPU, a column for each of :attr:`classes`.

        Args:
            images: (n, 3, H, W) uint8 of the stream's size, see :meth:`prepared`.
        """
        parts = [self.learner.logits_of_images(part).cpu() for part in images.split(EVALUATION_BATCH)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classes))

    def prepared(self, image: Any) -> Tensor:
        """One image (3, H, W) uint8 as the scenario stores its own: the shorter side resized, the centre cut out.

        Args:
            image: the path of a file; a PIL image; or a tensor or array (1 or 3, H, W) or (H, W), uint8 or within 0..1.

        Raises:
            UnreadableImageError: a file that is no image.
            UserError: another type or shape.
        """
        height, width = self.stream.image_shape[1:]
        side = height if height == width else None
        if isinstance(image, (str, Path)):
            pixels = decode(_bytes_of(Path(image)), side, self._channels)
        else:
            pixels = _given(image, side)
        if len(pixels) > self._channels:  # coloured, and all images of the run were grey
            pixels = to_pixels(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), None, 1)
        if pixels.shape[1:] != (height, width):
            whole = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            pixels = to_pixels(ImageOps.fit(whole, (width, height), Image.Resampling.BICUBIC), None, len(pixels))
        return torch.from_numpy(np.array(pixels)).expand(3, -1, -1).contiguous()

    def answers(self, images: Iterable[Any], top_k: int = 1, batch_size: int = EVALUATION_BATCH) -> Iterator[Answer]:
        """Answers to images one by one, computed batch by batch: as many are in memory as a batch has.

        An image that cannot be read is answered by its :attr:`Answer.error`.

        Args:
            images: as :meth:`prepared` takes them.
            top_k: classes of an answer; all where there are fewer.
            batch_size: images of a forward pass.
        """
        rest = iter(images)
        with ThreadPoolExecutor(WORKERS) as pool:
            while chunk := list(islice(rest, batch_size)):
                read = list(pool.map(self._read, chunk))
                good = [image for image in read if isinstance(image, Tensor)]
                rows = iter(self.logits(torch.stack(good)) if good else ())
                for given, image in zip(chunk, read, strict=True):
                    path = str(given) if isinstance(given, (str, Path)) else None
                    if isinstance(image, Tensor):
                        yield self._answer(path, next(rows), top_k)
                    else:
                        yield Answer(path, error=image)

    def predict(self, images: Any, top_k: int = 1, batch_size: int = EVALUATION_BATCH) -> list[Answer]:
        """Answers to images; the task of an image is inferred.

        Args:
            images: one image or several, as :meth:`prepared` takes them; or an array (n, 1 or 3, H, W).
            top_k: classes of an answer.
            batch_size: images of a forward pass.

        Returns:
            one answer an image; of one that cannot be read :attr:`Answer.error` says why.
        """
        one = isinstance(images, (str, Path, Image.Image)) or getattr(images, "ndim", 4) < 4
        return list(self.answers([images] if one else images, top_k, batch_size))

    def evaluate(self, folder: str | Path | None = None) -> Accuracies:
        """Accuracies on the whole test sets of the tasks that it knows, or on a folder of images.

        Args:
            folder: with a sub-folder of images for each class; ``None``: the run's own data.

        Raises:
            UserError: data that cannot be had, or a folder without a known class.
        """
        from cl_platform.reevaluation import on_folder, on_own_data

        return on_own_data(self) if folder is None else on_folder(self, Path(folder))

    def _read(self, image: Any) -> Tensor | str:
        try:
            return self.prepared(image)
        except UnreadableImageError as error:
            return str(error)

    def _answer(self, path: str | None, logits: Tensor, top_k: int) -> Answer:
        sure, columns = logits.softmax(0).sort(descending=True, stable=True)  # of equal ones the lowest class id
        best = [(self.class_names[c], p) for c, p in zip(columns[:top_k].tolist(), sure[:top_k].tolist(), strict=True)]
        return Answer(path, tuple(best), self.task_of(self.classes[int(columns[0])]))


def stream_without_images(path: Path) -> Stream | None:
    """The stream of a run folder from its facts; ``None`` where the run wrote none.

    Raises:
        UserError: they cannot be understood.
    """
    try:
        return stream_from(json.loads((path / FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"its {FILE} cannot be understood ({error})"
        raise UserError("run", path, why, "Restore the file, or delete it to read the data instead") from error


def restored(
    config: RunConfig, stream: Stream, found: Checkpoint, path: Path, device: str | None = None
) -> ContinualLearner:
    """A learner in the state of a checkpoint, with the run's precision, in evaluation mode.

    Args:
        config: of the run.
        stream: its tasks, with or without images.
        found: the checkpoint.
        path: of the run folder, for messages.
        device: where it shall answer; ``None``: the run's, or whatever there is.

    Raises:
        UserError: the backbone's weights are not the run's, or there is no such device.
    """
    trainer = replace(config.trainer, compile=False)
    learner = build_learner(replace(config, trainer=trainer), stream)
    state = found.state
    if state["backbone_frozen"] and state["backbone_sha256"] != learner.backbone.digest():
        raise UserError(
            "run", path, "the backbone's weights are not those that the run was trained on",
            "Bring back the weights that its environment.json names",
        )  # fmt: skip
    anywhere = replace(trainer, accelerator="auto", devices="auto")
    try:
        learner.trainer = build_trainer(trainer if device is None else anywhere, [])
    except UserError:
        learner.trainer = build_trainer(anywhere, [])  # the run's device is not here
    learner.to(learner.trainer.strategy.root_device if device is None else _device(device))
    learner.restore(found.tensors, state["learnt"], state["backbone_frozen"])
    return learner.eval()


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError("device", name, f"cannot be used ({reason})", "Leave it out, or write cpu") from error


def _refuse_open_request(path: Path) -> None:
    if all((path / journal.FOLDER / name).exists() for name in ("request.json", "salt")):
        raise UserError(
            "run", path, "a request to forget a task is open in it, so it may still know the task",
            f"Finish the request: python -m cl_platform unlearn {path}",
        )  # fmt: skip


def _tasks_by_class(stream: Stream, record: Record) -> dict[int, int]:
    """Class id -> id of its task, for classes that one task alone has."""
    found: dict[int, list[int]] = {}
    for task in stream.tasks:
        if task.task_id not in record.ids:
            for c in task.classes:
                found.setdefault(c, []).append(task.task_id)
    return {c: ids[0] for c, ids in found.items() if len(ids) == 1}


def _bytes_of(path: Path) -> bytes:
    try:
        if not path.exists():
            raise UnreadableImageError("there is no such file")
        if not path.is_file():
            raise UnreadableImageError("is no ordinary file")
        if path.stat().st_size > LARGEST_FILE:
            raise UnreadableImageError(f"more than {LARGEST_FILE:,} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from error


def _given(image: Any, side: int | None) -> np.ndarray:
    try:
        return pixels_of(image, side)
    except UserError as error:
        hint = "Give a path, a PIL image, or an array (3, H, W)"
        raise UserError("images", error.value, error.allowed, hint) from error
