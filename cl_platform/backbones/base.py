"""What every backbone is: a model without its classifier, its input range, its size, and one digest of its bytes."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cl_platform.config import setting
from cl_platform.errors import UserError, nearest

BackboneKind = Literal["vit", "cnn", "other"]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class BackboneConfig:
    """The keys under ``backbone``: which network, whose weights, and the range of the images it is fed."""

    kind: str = setting(doc="name of the backbone: vit_nano, timm, vit_base, resnet18_cifar, custom, ...")
    name: str | None = setting(None, doc="full timm tag ARCHITECTURE.TAG, for kind=timm")
    pretrained: bool | None = setting(None, doc="load the kind's own weights; null: wherever the kind has some")
    weights: str | None = setting(None, doc="local file: .safetensors, .pth/.pt/.bin/.tar, .npz; or 'package'")
    prefix: str | None = setting(None, doc="keep only the file's keys that begin with this, and strip it")
    container: str | None = setting(None, doc="entry of the file that holds the weights, dots go deeper")
    input_size: int | None = setting(None, min=8, doc="side of the square input in pixels; null: the network's own")
    input_norm: str | list[Any] = setting("timm", doc="timm | unit | imagenet | [mean, std]")
    grad_checkpointing: bool = setting(False, doc="recompute blocks in the backward pass to save memory")
    _target_: str | None = setting(None, doc="dotted path of your own module, for kind=custom")
    kwargs: dict[str, Any] = field(default_factory=dict, metadata={"doc": "arguments of _target_ or of timm's model"})

    @property
    def target(self) -> str | None:
        """Dotted path of the user's own module."""
        return self._target_

    def wants_pretrained(self, available: bool) -> bool:
        """Whether the kind's own weights are to be loaded; a local file replaces them."""
        return self.weights is None and (available if self.pretrained is None else self.pretrained)


def weights_digest(source: nn.Module | Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter and buffer, in the order of their names.

    Args:
        source: a module, or tensors by name.

    Returns:
        64 hexadecimal digits; equal exactly if all names, types, shapes and bytes are.
    """
    named: dict[str, Tensor] = {}
    if isinstance(source, nn.Module):
        named.update(source.named_parameters(remove_duplicate=False))
        named.update(source.named_buffers(remove_duplicate=False))
    else:
        named.update(source)
    digest = hashlib.sha256()
    for name in sorted(named):
        tensor = named[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Backbone(nn.Module):
    """A model that turns images into one feature vector each; the untouched model is the child ``model``.

    Attributes:
        model: the network without its classifier; its ``state_dict`` keys are those of timm or of the user.
        kind: ``vit``, ``cnn`` or ``other``.
        feature_dim: width of the features.
        input_size: side of the square input in pixels.
        mean, std: per channel, of images in [0, 1]: the model expects ``(image - mean) / std``.
        tag: full name of architecture and weights, for the run's environment.
        weights_from: ``packed``, ``hub``, ``package``, ``random`` or the name of a file.
        frozen: true after :meth:`freeze`.
        compiled: true after :meth:`compile_blocks`.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: BackboneKind,
        feature_dim: int,
        input_size: int,
        mean: Triple = HALF,
        std: Triple = HALF,
        tag: str = "",
        weights_from: str = "random",
    ) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.feature_dim = int(feature_dim)
        self.input_size = int(input_size)
        self.mean, self.std = mean, std
        self.tag = tag or type(model).__name__
        self.weights_from = weights_from
        self.frozen = False
        self.compiled = False

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features before any classifier.

        Args:
            images: (B, 3, S, S) float, normalised with ``mean`` and ``std``.

        Returns:
            (B, feature_dim) features.
        """
        features: Tensor = self.model(images)
        return features

    def train(self, mode: bool = True) -> Backbone:
        """As in torch, but a frozen backbone stays in eval mode: dropout off, batch norm's statistics fixed."""
        super().train(mode and not self.frozen)
        return self

    def freeze(self) -> None:
        """Take all parameters out of training and keep the model in eval mode until :meth:`unfreeze`."""
        self.frozen = True
        self.model.requires_grad_(False)
        self.train(False)

    def unfreeze(self) -> None:
        """Make all parameters trainable; the mode follows ``train`` and ``eval`` again."""
        self.frozen = False
        self.model.requires_grad_(True)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the model's blocks in place (the whole model where it has none); ``state_dict`` keys stay.

        A transformer block that takes a prefix or a delta in a pass runs uncompiled in that pass.
        """
        self.compiled = True
        for module in cast(Iterable[nn.Module], getattr(self.model, "blocks", None) or [self.model]):
            module.compile(backend=backend)

    def frozen_blocks(self) -> int:
        """Leading blocks that nothing trains, whose output is a constant of each image; 0 where blocks are unknown."""
        return 0

    def set_trainable(self, patterns: Iterable[str]) -> list[str]:
        """Make exactly the parameters whose names match one of the shell-like ``patterns`` trainable.

        Returns:
            The names of the trainable parameters, sorted.

        Raises:
            UserError: a pattern matches no parameter.
        """
        chosen = self.matching(patterns, "trainable")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in chosen)
        # One trainable weight is enough for the model to follow train(): its batch norms then learn statistics too.
        self.frozen = not chosen
        self.train(self.training)
        return chosen

    def matching(self, patterns: Iterable[str], key: str) -> list[str]:
        """Sorted names of the parameters that match one of the shell-like ``patterns``; ``key`` is for the message.

        Raises:
            UserError: a pattern matches no parameter.
        """
        names = [name for name, _ in self.model.named_parameters()]
        chosen: set[str] = set()
        for pattern in patterns:
            matched = fnmatch.filter(names, pattern)
            if not matched:
                near = nearest(pattern, names) or sorted(names)[:3]
                raise UserError(
                    key, pattern, "matches no parameter of the backbone", f"Names look like {', '.join(near)}"
                )
            chosen.update(matched)
        return sorted(chosen)

    def digest(self) -> str:
        """SHA-256 of all parameters and buffers of ``model``; see :func:`weights_digest`."""
        return weights_digest(self.model)

    def describe(self) -> dict[str, Any]:
        """What a run records about its backbone, as plain values."""
        return {
            "tag": self.tag,
            "kind": self.kind,
            "class": type(self.model).__name__,
            "weights_from": self.weights_from,
            "sha256": self.digest(),
            "feature_dim": self.feature_dim,
            "input_size": self.input_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def input_range(input_norm: object, own_mean: Iterable[float], own_std: Iterable[float]) -> tuple[Triple, Triple]:
    """Mean and std of ``backbone.input_norm``.

    Args:
        input_norm: ``timm`` (what the weights were trained with: ``own_mean``, ``own_std``), ``unit`` (images stay
            in [0, 1]), ``imagenet``, or ``[mean, std]``, each a number or three.
        own_mean: mean that belongs to the weights.
        own_std: std that belongs to the weights.

    Raises:
        UserError: another word, a wrong number of values, or a std that is not positive.
    """
    named: dict[str, tuple[Triple, Triple]] = {
        "timm": (_triple(own_mean), _triple(own_std)),
        "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    }
    if isinstance(input_norm, str) and input_norm in named:
        return named[input_norm]
    try:
        mean, std = (_triple(part) for part in cast("list[Any]", input_norm))
        fits = min(std) > 0
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(
            "backbone.input_norm",
            input_norm,
            "must be timm, unit, imagenet or [mean, std] with std above 0",
            "Write for example backbone.input_norm=unit or backbone.input_norm=[0.5,0.5]",
        )
    return mean, std


def _triple(values: Any) -> Triple:
    numbers = [float(values)] * 3 if isinstance(values, (int, float)) else [float(v) for v in values]
    if len(numbers) != 3:
        raise ValueError("three values are needed, one a channel")
    return numbers[0], numbers[1], numbers[2]
