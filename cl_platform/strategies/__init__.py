"""One file per method; importing this package imports every file in it, and so registers all built-in strategies."""

import importlib
import pkgutil

from cl_platform.strategies.base import Component, Context, Needs, ParameterGroup, Step, Strategy
from cl_platform.strategies.composition import Composition, build_strategies

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = [
    "Component",
    "Composition",
    "Context",
    "Needs",
    "ParameterGroup",
    "Step",
    "Strategy",
    "build_strategies",
]
