"""A number about forgetting, or the sentence that says why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One value of one model.

    Attributes:
        value: finite; ``None`` if it is not defined.
        reason: why it is not; given exactly when ``value`` is ``None``.
        by_construction: the value follows from the classes that the model can answer, whatever was learnt, and is
            therefore no evidence.
        error: standard error, where one was estimated.
        censored_at: how far one looked without seeing what the value counts up to.

    Raises:
        ValueError: both a value and a reason, neither of them, or a value that is not finite.
    """

    value: float | None = None
    reason: str | None = None
    by_construction: bool = False
    error: float | None = None
    censored_at: int | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.reason is not None):
            raise ValueError(f"{self}: needs a value or a reason, not both")
        if not all(number is None or math.isfinite(number) for number in (self.value, self.error)):
            raise ValueError(f"{self} is not finite")

    def to_json(self) -> dict[str, Any]:
        """``value`` and ``reason``, and of the other attributes those that say something."""
        entry: dict[str, Any] = {"value": self.value, "reason": self.reason}
        if self.by_construction:
            entry["by_construction"] = True
        if self.error is not None:
            entry["error"] = self.error
        if self.censored_at is not None:
            entry["censored_at"] = self.censored_at
        return entry


def undefined(reason: str) -> Measured:
    """No value, because of ``reason``."""
    return Measured(reason=reason)


def combined(formula: Callable[..., float], *parts: Measured) -> Measured:
    """``formula`` of the parts' values; without a value if one of them has none, for the first one's reason."""
    missing = next((part for part in parts if part.value is None), None)
    if missing is not None:
        return undefined(str(missing.reason))
    value = formula(*(part.value for part in parts))
    return Measured(value, by_construction=any(part.by_construction for part in parts))
