"""A learner's answering path as one function of images that ``torch.export`` can take apart."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from cl_platform.batch import Batch
from cl_platform.errors import UserError

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner

NUMBERS = (torch.tensor, torch.as_tensor, torch.arange)
"""Makers of tensors whose content is known; one that is made to be filled later may come to depend on the images."""
BATCH = "batch"
"""Name of the dimension that may have any size."""


class AnswerOf(nn.Module):
    """uint8 images (b, 3, H, W) -> logits (b, S) float32 over the seen classes, in float32 throughout.

    Args:
        learner: held without being a part of this module, so that its tensors are constants of the function.
    """

    def __init__(self, learner: ContinualLearner) -> None:
        super().__init__()
        self._held = (learner,)  # a tuple: torch registers no module in it

    def forward(self, images: Tensor) -> Tensor:
        """Transform, features, answer: what :meth:`ContinualLearner.logits_of_images` computes."""
        learner = self._held[0]
        ready = learner.transforms.evaluate(images)
        nothing = ready.new_full((ready.shape[0],), -1, dtype=torch.int64)
        extra = {} if learner.composition.query == "none" else {"query": learner.backbone(ready).float()}
        batch = Batch(ready, nothing, nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool), extra)
        logits: Tensor = learner.composition.predict(batch).float()
        return logits


class _Traced(nn.Module):
    """The function as it is traced.

    Args:
        function: of images.
        portable: only with operations that other runtimes have.
    """

    def __init__(self, function: AnswerOf, portable: bool) -> None:
        super().__init__()
        self._function, self._portable = (function,), portable

    def forward(self, images: Tensor) -> Tensor:
        """Logits (b, S)."""
        with _Constants(self._portable):
            logits: Tensor = self._function[0](images)
            return logits


class _Constants(TorchFunctionMode):
    """Works out at once what no image has a part in, and writes in simple terms what exporters do not know."""

    def __init__(self, portable: bool) -> None:
        super().__init__()
        self._portable = portable

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = all(map(_is_constant, tensors)) and not any(isinstance(leaf, torch.SymInt) for leaf in leaves)
        if known and (tensors or func in NUMBERS):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is torch.cdist:
            return _distances(*args, **kwargs)
        if func is F.interpolate and kwargs.get("antialias"):
            return _resized(*args, **kwargs)
        if any(map(_is_constant, tensors)):
            args, kwargs = tree_map(_whole, (args, kwargs))
        if self._portable and func in (torch.sort, Tensor.sort):
            return _sorted(*args, **kwargs)
        return func(*args, **kwargs)


def _whole(value: Any) -> Any:
    """A constant that is a part of another one, as one of its own: files hold each constant apart."""
    if not isinstance(value, Tensor) or not _is_constant(value):
        return value
    if value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size():
        return value
    with _disable_current_modes():
        return value.clone(memory_format=torch.contiguous_format)


def _is_constant(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _sorted(values: Tensor, dim: int = -1, descending: bool = False, **_: Any) -> Any:
    """``torch.sort`` as the choice of all; in ONNX the lower of equal ones comes first, as in a stable sort."""
    return values.topk(values.shape[dim], dim=dim, largest=descending, sorted=True)


def _distances(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    """``torch.cdist`` without a kernel of its own."""
    apart = (x.unsqueeze(-2) - y.unsqueeze(-3)).abs()
    return apart.sum(-1) if p == 1.0 else apart.square().sum(-1).sqrt()


def _resized(images: Tensor, size: tuple[int, int], mode: str, align_corners: bool | None, **_: Any) -> Tensor:
    """``F.interpolate`` as two matrix products: other runtimes round the weights of a cubic filter differently."""
    height, width = images.shape[-2:]
    with _disable_current_modes():
        options: dict[str, Any] = {"mode": mode, "antialias": True, "align_corners": align_corners}
        rows = F.interpolate(torch.eye(height)[None, None], (size[0], height), **options)[0, 0]
        columns = F.interpolate(torch.eye(width)[None, None], (size[1], width), **options)[0, 0]
    return rows.to(images.device) @ images @ columns.T.contiguous().to(images.device)


def traced(learner: ContinualLearner, example: Tensor, portable: bool = False) -> torch.export.ExportedProgram:
    """The function with its constants as a graph; the number of images is free.

    Args:
        learner: in evaluation mode, without a trainer.
        example: a few images (b, 3, H, W) uint8.
        portable: only with operations that other runtimes have.

    Raises:
        UserError: the way in which a strategy answers depends on the images beyond what a graph can say.
    """
    free = {"images": {0: torch.export.Dim(BATCH, min=1)}}
    try:
        with learner.answering(), silence():
            function = _Traced(AnswerOf(learner), portable)
            return torch.export.export(function, (example,), dynamic_shapes=free, strict=False)
    except Exception as error:  # whatever an operation raises that cannot be traced
        raise _refused(learner, error) from error


def as_onnx(program: torch.export.ExportedProgram, facts: Mapping[str, str], learner: ContinualLearner) -> bytes:
    """A traced function as an ONNX model, inputs ``images``, outputs ``logits``.

    Args:
        program: from :func:`traced`.
        facts: its metadata.
        learner: that was traced, for messages.

    Raises:
        UserError: an operation that ONNX does not have.
    """
    try:
        with silence():
            made = torch.onnx.export(
                program, (), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False
            )
    except Exception as error:
        raise _refused(learner, error) from error
    assert made is not None
    proto = made.model_proto
    for key, value in facts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    content: bytes = proto.SerializeToString()
    return content


def _refused(learner: ContinualLearner, failure: Exception) -> UserError:
    composition = learner.composition
    owner = composition.owner("prediction") or composition.owner("features")
    name = owner.name if owner is not None else "+".join(composition.members)
    while failure.__cause__ is not None and not isinstance(failure, UserError):
        failure = failure.__cause__  # type: ignore[assignment]  # exporters wrap what went wrong in advice
    reason = next(iter(str(failure).strip().splitlines()), type(failure).__name__)[:160].rstrip(".")
    why = f"its answers cannot be written down in this format ({reason})"
    return UserError("strategy", name, why, "Use --format safetensors")


@contextmanager
def silence() -> Iterator[None]:
    """Keep the exporters' talk out of the terminal."""
    loggers = [
        logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx", "torch.onnx", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
