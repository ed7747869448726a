"""Which keys of ``metrics.json`` have a published definition."""

from __future__ import annotations

from cl_platform.metrics.calibration import CALIBRATION_DEFINITIONS
from cl_platform.metrics.confusion import CONFUSION_DEFINITIONS
from cl_platform.metrics.continual_results import definition_of
from cl_platform.metrics.definitions import BY_KEY, Definition
from cl_platform.metrics.flips import FLIP_DEFINITIONS
from cl_platform.metrics.representation import REPRESENTATION_DEFINITIONS

DIAGNOSTICS: dict[str, Definition] = {
    made.key: made
    for made in (*FLIP_DEFINITIONS, *CALIBRATION_DEFINITIONS, *REPRESENTATION_DEFINITIONS, *CONFUSION_DEFINITIONS)
}
"""Definitions of the diagnostics that ``metrics.json`` may hold."""


def definition(key: str) -> Definition | None:
    """The published definition of a key without its space's suffix; ``None`` for a key nobody defined."""
    known = BY_KEY.get(key) or definition_of(key) or DIAGNOSTICS.get(key)
    parameter = key.rpartition("_")[2]
    if known is not None and known.key != key and parameter.isdigit():
        name = "B" if known.key == "lca" else "D"
        return Definition(
            known.id, key, f"{known.text[:-1]}, {name}\u00a0=\u00a0{parameter}.", known.unit, known.better
        )
    if known is None and key == "acc_curve":
        return Definition("1.1", key, "Mean accuracy over the tasks seen (1.1) at every task end.", "fraction", "up")
    return known
