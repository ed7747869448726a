"""Continual learning of image classifiers on pretrained backbones.

The public names are imported on first use, so that ``import cl_platform`` stays light.
"""

from __future__ import annotations

from typing import Any

_HOMES = {
    "fit": "cl_platform.api",
    "Run": "cl_platform.api",
    "stream_from_folder": "cl_platform.api",
    "stream_from_datasets": "cl_platform.scenarios",
    "stream_from_avalanche": "cl_platform.scenarios.avalanche",
    "build_stream": "cl_platform.scenarios",
    "build_backbone": "cl_platform.backbones",
    "compose": "cl_platform.cli.compose",
    "parse": "cl_platform.run_config",
    "Strategy": "cl_platform.strategies",
    "UserError": "cl_platform.errors",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cl_platform' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
