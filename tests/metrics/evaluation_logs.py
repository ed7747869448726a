"""Logs of continual evaluation written as text, for tests."""

from __future__ import annotations

from cl_platform.metrics.continual_log import HEADER, Curves, LogRow, format_rows, parse

Spec = tuple[int, int, str, dict[int, tuple[int, int]]]
"""(step, position, event, position of the evaluated task -> counts)."""


def log_text(evaluations: list[Spec]) -> str:
    rows = ((s, k, e, j, c) for s, k, e, cells in evaluations for j, c in cells.items())
    return HEADER + "".join(format_rows([LogRow(s, k, k, 0, e, j, "cil", *c)]) for s, k, e, j, c in rows)


def curves_of(evaluations: list[Spec], forgotten: tuple[int, ...] = ()) -> Curves:
    return Curves.of(parse(log_text(evaluations)), "cil", forgotten)


def three_tasks() -> list[Spec]:
    """b = 0, 4, 8, end at 12, 10 images, every step."""
    curve = {
        0: dict(enumerate([3, 6, 8, 9, 4, 6, 8, 7, 5, 7, 7, 8], start=1)),
        1: dict(enumerate([5, 7, 9, 9, 6, 8, 9, 7], start=5)),
        2: dict(enumerate([4, 6, 8, 9], start=9)),
    }
    made: list[Spec] = []
    for k, first in enumerate([1, 0, 1]):
        begin = 4 * k
        made.append((begin, k, "start", {**{j: (curve[j][begin], 10) for j in range(k)}, k: (first, 10)}))
        for s in range(begin + 1, begin + 5):
            made.append((s, k, "end" if s == begin + 4 else "step", {j: (curve[j][s], 10) for j in range(k + 1)}))
    return made


def irregular() -> list[Spec]:
    """b = 0, 10, end at 20; the second task is evaluated at 11, 12, 14, 20."""
    made: list[Spec] = [(0, 0, "start", {0: (9, 10)}), (10, 0, "end", {0: (9, 10)})]
    made.append((10, 1, "start", {0: (9, 10), 1: (0, 10)}))
    for s, a, b in [(11, 5, 2), (12, 3, 4), (14, 5, 6), (20, 8, 9)]:
        made.append((s, 1, "end" if s == 20 else "step", {0: (a, 10), 1: (b, 10)}))
    return made


def switch(case: tuple[float, list[int], list[float]]) -> list[Spec]:
    """A switch at step 10 with the accuracy of task 0 before it, the offsets evaluated after it and their values."""
    pre, offsets, values = case
    old = {0: (round(100 * pre), 100)}
    made: list[Spec] = [(0, 0, "start", {0: (0, 100)}), (10, 0, "end", old), (10, 1, "start", old)]
    made += [(10 + o, 1, "step", {0: (round(100 * v), 100)}) for o, v in zip(offsets, values, strict=True)]
    return [*made, (10 + max(offsets, default=5), 1, "end", {1: (5, 10)})]


BROKEN = (
    HEADER
    + """0,0,0,0,start,0,cil,1,10
2,0,0,0,step,0,cil,8,10
4,0,0,0,end,0,cil,9,10
4,1,1,0,start,0,cil,9,10
4,1,1,0,start,1,cil,0,10
5,1,1,0,step,0,cil,4,10
5,1,1,0,step,1,cil,5,10
6,1,1,0,step,0,cil,12,10
6,1,1,0,step,1,cil,6,10
8,1,1,0,end,0,cil,7,10
8,1,1,0,end,1,cil,9,1"""
)
"""Line 9 has more right answers than images, line 12 is cut off."""
