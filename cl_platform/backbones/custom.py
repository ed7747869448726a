"""``backbone=custom``: the user's own module, by its dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from cl_platform.backbones.base import Backbone, BackboneConfig, input_range
from cl_platform.backbones.cnn import feature_width
from cl_platform.backbones.loading import load_weights, smoke_check
from cl_platform.backbones.prefix import PromptedViT, supports_prompts
from cl_platform.errors import UserError, nearest
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.registry import backbones

KEY = "backbone._target_"


@backbones.register("custom")
def build_custom(config: BackboneConfig, seed: int) -> Backbone:
    """A module that maps (B, 3, S, S) to (B, width), built as ``_target_(**kwargs)``.

    A timm vision transformer becomes a PromptedViT. ``input_norm=timm`` reads the module's ``pretrained_cfg``;
    without one the images stay in [0, 1].
    """
    if not config.target:
        raise UserError(KEY, None, "the dotted path of your module is needed", f"Set {KEY}=PACKAGE.MODULE.CLASS")
    if config.wants_pretrained(available=False):
        raise UserError("backbone.pretrained", True, "the platform has no weights for your module", "Use weights=FILE")
    make = find_target(config.target)
    with seeded_globals(seed, RUN_LEVEL, "backbone_init"):
        try:
            model = make(**config.kwargs)
        except TypeError as error:
            raise UserError("backbone.kwargs", config.kwargs, f"{config.target}: {error}", "Change the keys") from error
    if not isinstance(model, nn.Module):
        raise UserError(KEY, config.target, f"gives {type(model).__name__}, not a torch module", "Name another one")
    if config.weights:
        load_weights(model, config.weights, config.prefix, config.container)
    backbone = _wrap(model, config)
    if config.weights:
        smoke_check(backbone, backbone.input_size, config.weights)
    return backbone


def _wrap(model: Any, config: BackboneConfig) -> Backbone:
    settings = dict(getattr(model, "pretrained_cfg", None) or {})
    mean, std = input_range(config.input_norm, settings.get("mean") or (0.0,) * 3, settings.get("std") or (1.0,) * 3)
    own_size = getattr(model, "input_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
    size = config.input_size or (own_size[-1] if isinstance(own_size, (tuple, list)) else own_size)
    if not size:
        raise UserError("backbone.input_size", None, f"{config.target} does not say its input size", "Set it in pixels")
    try:
        width = feature_width(model, int(size))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise UserError(
            KEY, config.target, f"fails on an image of {size} pixels: {error}", "It must map (B, 3, S, S) to (B, width)"
        ) from error
    tag, origin = str(config.target), str(config.weights or "random")
    if supports_prompts(model) is None:
        return PromptedViT(model, int(size), mean, std, tag, origin)
    kind = "cnn" if any(isinstance(m, nn.Conv2d) for m in model.modules()) else "other"
    return Backbone(model, kind, width, int(size), mean, std, tag, origin)  # type: ignore[arg-type]


def find_target(path: str) -> Callable[..., Any]:
    """The class or function at the dotted ``path``.

    Raises:
        UserError: the module cannot be imported, or has no such name (with the nearest ones).
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(KEY, path, "must be a dotted path", "Write PACKAGE.MODULE.CLASS")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            KEY, path, f"cannot be imported ({error})", "Check the spelling, and that its folder is on PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        public = [n for n in vars(module) if not n.startswith("_")]
        near = nearest(name, public)
        todo = f"Did you mean {' or '.join(near)}" if near else "Check the spelling"
        raise UserError(KEY, path, f"{module_name} has no class or function {name}", todo)
    return found  # type: ignore[no-any-return]
