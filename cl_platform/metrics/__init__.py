"""Numbers about continual learning: integer counts, pure functions over them, and their published definitions."""

from cl_platform.metrics.counts import SPACES, AccuracyMatrix, Cell
from cl_platform.metrics.definitions import BY_KEY, DEFINITIONS, Definition
from cl_platform.metrics.matrix import REASONS, Outcome, Result, Undefined, average_curve, pooled_curve
from cl_platform.metrics.results import entry, summarise

__all__ = [
    "BY_KEY",
    "DEFINITIONS",
    "REASONS",
    "SPACES",
    "AccuracyMatrix",
    "Cell",
    "Definition",
    "Outcome",
    "Result",
    "Undefined",
    "average_curve",
    "entry",
    "pooled_curve",
    "summarise",
]
