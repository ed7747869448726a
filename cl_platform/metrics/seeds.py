"""Statistics over runs that differ in their seed alone: mean, sample standard deviation, 95 % band."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cl_platform.metrics.matrix import Undefined

CONFIDENCE = 0.95
"""Share of a band."""


@dataclass(frozen=True)
class OverSeeds:
    """One quantity over several runs. Runs in which it has no value are counted by reason and enter no mean.

    Attributes:
        n: runs in which it has a value.
        mean: their mean; ``None`` if there are none.
        sd: sample standard deviation (divisor n - 1); ``None`` below two values.
        low: lower end of the 95 % band, ``mean - t(0.975, n - 1) sd / sqrt(n)``; ``None`` below two values.
        high: upper end.
        missing: reason -> number of runs without a value.
    """

    n: int
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    missing: Mapping[str, int] = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """All runs, with and without a value."""
        return self.n + sum(self.missing.values())

    @property
    def half(self) -> float | None:
        """Half the width of the band; ``None`` where there is none."""
        return None if self.sd is None else t_quantile(self.n - 1) * self.sd / math.sqrt(self.n)


def over_seeds(values: Iterable[float | Undefined]) -> OverSeeds:
    """Mean, deviation and band of what the runs of one configuration say; one run has no band.

    Raises:
        ValueError: NaN or infinity, which no metric is.
    """
    known: list[float] = []
    missing: Counter[str] = Counter()
    for value in values:
        if isinstance(value, Undefined):
            missing[value.reason] += 1
        elif not math.isfinite(value):
            raise ValueError(f"{value} is no value of a metric")
        else:
            known.append(float(value))
    reasons = dict(sorted(missing.items()))
    if not known:
        return OverSeeds(0, missing=reasons)
    mean = statistics.mean(known)  # exact before its one rounding: equal values have a deviation of exactly 0
    if len(known) == 1:
        return OverSeeds(1, mean, missing=reasons)
    sd = statistics.stdev(known)
    half = t_quantile(len(known) - 1) * sd / math.sqrt(len(known))
    return OverSeeds(len(known), mean, sd, mean - half, mean + half, reasons)


def curve_over_seeds(curves: Sequence[Mapping[int, float]], steps: Iterable[int]) -> list[tuple[int, OverSeeds]]:
    """The band at those of ``steps`` at which every curve has a value, in ascending order.

    Args:
        curves: one per run, step -> value.
        steps: where to look.
    """
    shared = sorted(step for step in set(steps) if all(step in curve for curve in curves)) if curves else []
    return [(step, over_seeds(curve[step] for curve in curves)) for step in shared]


def t_quantile(degrees: int, share: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t distribution: the middle ``share`` lies within plus and minus it.

    Raises:
        ValueError: no degree of freedom, or a share outside 0 and 1.
    """
    if degrees < 1 or not 0 < share < 1:
        raise ValueError(f"{degrees} degrees of freedom and a share of {share}: at least 1, and within 0 and 1")
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.5 + share / 2))
