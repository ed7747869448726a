"""From the ``backbone`` group of a configuration to a backbone."""

from __future__ import annotations

from cl_platform.backbones import cnn, custom, nano, timm_backbone  # noqa: F401  they register their names
from cl_platform.backbones.base import Backbone, BackboneConfig
from cl_platform.errors import UserError, unknown_name
from cl_platform.registry import backbones

NAMELESS = ("vit_nano", "resnet18_cifar", "resnet18_slim", "efficientnet_lite0", "custom")
"""Built-in kinds that are one network each; kinds of plug-ins may use ``name`` as they like."""


def build_backbone(config: BackboneConfig, seed: int = 0) -> Backbone:
    """The backbone that ``config`` describes, on the CPU, trainable, in eval mode.

    Random weights come from the run's own stream; no global generator is left changed.

    Args:
        config: the keys under ``backbone``.
        seed: the run's seed.

    Raises:
        UserError: an unknown kind, name, tag or file, weights that do not fit or cannot be downloaded.
    """
    if config.kind not in backbones:
        raise unknown_name("backbone.kind", config.kind, backbones.names())
    if config.name is not None and config.kind in NAMELESS:
        raise UserError("backbone.name", config.name, f"backbone={config.kind} takes no name", "Use backbone=timm")
    if config.target is not None and config.kind != "custom":
        raise UserError("backbone._target_", config.target, "only for backbone=custom", "Use backbone=custom")
    if config.weights is None and (config.prefix or config.container):
        key = "prefix" if config.prefix else "container"
        value = config.prefix or config.container
        raise UserError(f"backbone.{key}", value, "is about a file, and none is given", "Set backbone.weights=FILE")
    backbone: Backbone = backbones.get(config.kind)(config, seed)
    backbone.eval()
    return backbone
