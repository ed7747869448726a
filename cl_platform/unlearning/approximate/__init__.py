"""Methods that change what was learnt so that a task seems forgotten; no figure makes them more than approximate.

One file per method; importing this package imports every file in it, and so registers all built-in methods.
"""

import importlib
import pkgutil

from cl_platform.unlearning.approximate.base import (
    ApproximateMethod,
    ApproximateReport,
    ApproximateRequest,
    build_method,
)

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["ApproximateMethod", "ApproximateReport", "ApproximateRequest", "build_method"]
