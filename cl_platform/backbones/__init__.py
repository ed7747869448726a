"""Pretrained networks without classifiers, and the places where prompts, prefixes and adapters attach."""

from cl_platform.backbones.base import Backbone, BackboneConfig, weights_digest
from cl_platform.backbones.build import build_backbone
from cl_platform.backbones.prefix import BlockExtras, PromptedViT, refuse_prompts, supports_prompts

__all__ = [
    "Backbone",
    "BackboneConfig",
    "BlockExtras",
    "PromptedViT",
    "build_backbone",
    "refuse_prompts",
    "supports_prompts",
    "weights_digest",
]
