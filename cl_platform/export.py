"""A trained learner as one file for use elsewhere, held against the live one before it is written.

``torch_export`` and ``onnx`` hold a function: uint8 RGB images (batch, 3, H, W) of the size in which the run stores its
own -> logits (batch, S) float32 over the seen classes, ascending class id. Resizing to the network's input and the
normalisation are inside. ``safetensors`` holds all that was learnt, for this package to load. Metadata in each say what
the columns are.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_platform.environment import package_version
from cl_platform.errors import UserError, unknown_name
from cl_platform.files import write_atomically
from cl_platform.random_streams import RUN_LEVEL
from cl_platform.random_streams import stream as random_stream

if TYPE_CHECKING:
    from cl_platform.trained import Trained

SCHEMA = "cl_platform/export/1"
FORMATS = ("torch_export", "onnx", "safetensors")
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
BATCHES = (1, 2, 5)
"""Images of the batches that are compared."""
TOLERANCE = 1e-4
"""Largest difference of a logit, times one plus the largest logit of the image."""
SURE = 0.01
"""Largest difference of a probability, where logits of other tasks lie far below and say nothing of the rest."""
CHECK_FAILED = 3

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        form: one of :data:`FORMATS`.
        size: of the file in bytes.
        difference: largest difference of a logit from the live learner's.
        images: remembered training images that are in the file.
    """

    path: Path
    form: str
    size: int
    difference: float
    images: int = 0


def check_request(run: Path, form: str, output: Path, force: bool = False) -> None:
    """Refuse what cannot be exported, before anything is loaded.

    Raises:
        UserError: an unknown format, a missing package, a file that is there, or a place that is none for it.
    """
    if form not in FORMATS:
        raise unknown_name("--format", form, FORMATS)
    missing = [name for name in PACKAGES.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            "--format", form, f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            f"Run pip install 'cl-platform[{form}]'",
        )  # fmt: skip
    if output.is_dir():
        raise UserError("--output", output, "is a folder", "Name a file in it")
    if output.exists() and not force:
        raise UserError("--output", output, "is there already", "Add --force to replace it, or name another file")
    if not output.absolute().parent.is_dir():
        raise UserError("--output", output, "its folder is not there", "Make the folder first")
    if run.resolve() in output.resolve().parents:
        raise UserError(
            "--output", output, "lies in the run folder, where forgetting a task would have to find it",
            "Name a file elsewhere",
        )  # fmt: skip


def export(trained: Trained, form: str, output: Path, force: bool = False) -> Exported:
    """Write a trained learner into a file.

    Args:
        trained: see :meth:`Trained.open`.
        form: one of :data:`FORMATS`.
        output: the file.
        force: replace a file that is there.

    Raises:
        UserError: see :func:`check_request`; an answer that the format cannot say; with exit code 3 where the file
            would answer other than the live learner. Nothing is written then.
    """
    check_request(trained.path, form, output, force)
    with _alone(trained):
        blob, function, images = MAKERS[form](trained)
        difference = _difference(trained, form, function)
    try:
        write_atomically(output, blob)
    except OSError as error:
        raise UserError("--output", output, f"cannot be written ({error.strerror})", "Name another file") from error
    return Exported(output, form, len(blob), difference, images)


def metadata(trained: Trained, form: str) -> dict[str, Any]:
    """What a user of the file has to know, as plain JSON."""
    learner, stream = trained.learner, trained.stream
    backbone = learner.backbone
    _, height, width = stream.image_shape
    return {
        "schema": SCHEMA,
        "format": form,
        "version": package_version(),
        "torch": str(torch.__version__),
        "strategy": list(trained.config.strategy),
        "scenario": stream.name,
        "setting": stream.setting,
        "tasks": trained.kept_tasks,
        "input": {"name": "images", "dtype": "uint8", "shape": ["batch", 3, height, width], "channels": "RGB"},
        "inside": {
            "resize_to": backbone.input_size,
            "transform": learner.transforms.id,
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", len(trained.classes)]},
        "computed_in": "float32",
        "classes": [
            {"column": column, "class_id": c, "name": name, "task_id": trained.task_of(c)}
            for column, (c, name) in enumerate(zip(trained.classes, trained.class_names, strict=True))
        ],
        "backbone": {"tag": backbone.tag, "weights_sha256": trained.checkpoint.state["backbone_sha256"]},
    }


Made = tuple[bytes, Function, int]
"""Content of the file, what answers when it is read back, and the training images that are in it."""


def _torch_export(trained: Trained) -> Made:
    from cl_platform.tracing import silence, traced

    program = traced(trained.learner, _images(trained, 2))
    file, facts = io.BytesIO(), json.dumps(metadata(trained, "torch_export"), ensure_ascii=False)
    with silence():
        torch.export.save(program, file, extra_files={"metadata.json": facts})
        read_back = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), read_back, 0


def _onnx(trained: Trained) -> Made:
    import onnxruntime

    from cl_platform.tracing import as_onnx, traced

    program = traced(trained.learner, _images(trained, 2), portable=True)
    facts = {name: json.dumps(value, ensure_ascii=False) for name, value in metadata(trained, "onnx").items()}
    blob = as_onnx(program, facts, trained.learner)
    session = onnxruntime.InferenceSession(blob, providers=["CPUExecutionProvider"])
    return blob, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), 0


def _safetensors(trained: Trained) -> Made:
    from safetensors.torch import load, save

    from cl_platform.scenarios.facts import facts_of
    from cl_platform.trained import restored

    state = trained.checkpoint.state
    rest = {name: state[name] for name in ("learnt", "backbone_frozen", "backbone_sha256")}
    facts = metadata(trained, "safetensors") | {
        "state": rest,
        "stream": facts_of(trained.stream, trained.record.ids),
        "config": trained.config.raw,
    }
    texts = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in facts.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in trained.learner.learnt_state().items()}
    blob = save(tensors, texts)
    found = type(trained.checkpoint)(trained.checkpoint.position, load(blob), state)
    learner = restored(trained.config, trained.stream, found, trained.path, "cpu")
    learner.trainer = None  # type: ignore[assignment]  # in float32, as the live one
    buffer = trained.learner.context.buffer
    return blob, learner.logits_of_images, 0 if buffer is None else len(buffer)


MAKERS: Mapping[str, Callable[[Any], Made]] = {
    "torch_export": _torch_export,
    "onnx": _onnx,
    "safetensors": _safetensors,
}


@contextmanager
def _alone(trained: Trained) -> Iterator[None]:
    """The learner on the CPU and in float32, so that the file depends on no device."""
    learner = trained.learner
    trainer, device = learner._trainer, learner.device
    learner.trainer = None  # type: ignore[assignment]
    learner.to("cpu")
    try:
        yield
    finally:
        learner.to(device)
        learner.trainer = trainer  # type: ignore[assignment]


def _images(trained: Trained, count: int) -> Tensor:
    """Random images (count, 3, H, W) uint8 of the stream's size, the same for every export of a run."""
    draws = random_stream(trained.config.seed, RUN_LEVEL, "export", count)
    return torch.randint(0, 256, (count, *trained.stream.image_shape), generator=draws, dtype=torch.uint8)


def _difference(trained: Trained, form: str, function: Function) -> float:
    """Largest difference of a logit from the live learner's.

    Raises:
        UserError: with exit code 3, where it is larger than rounding makes it.
    """
    largest = 0.0
    for count in BATCHES:
        images = _images(trained, count)
        live = trained.learner.logits_of_images(images)
        try:
            other = function(images)
        except Exception as error:  # whatever a runtime raises
            raise _failed(form, f"cannot answer {count} images ({_line(error)})") from error
        if other.shape != live.shape:
            raise _failed(
                form, f"answers {tuple(other.shape)} numbers where the live learner gives {tuple(live.shape)}"
            )
        apart = torch.where(other == live, 0.0, (other - live).abs())
        sure = (other.softmax(1) - live.softmax(1)).abs()
        scale = 1 + live.abs().amax(1, keepdim=True)
        if not bool((apart <= TOLERANCE * scale).all() and (sure <= SURE).all()):  # NaN counts as apart
            raise _failed(form, f"answers random images otherwise, by up to {float(apart.max()):.3g} in a logit")
        largest = max(largest, float(apart.max()))
    return largest


def _failed(form: str, reason: str) -> UserError:
    todo = "Nothing was written; try another format"
    return UserError("--format", form, f"the check failed: the file {reason}", todo, exit_code=CHECK_FAILED)


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:160].rstrip(".")
