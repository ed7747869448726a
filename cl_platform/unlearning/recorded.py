"""What a run's own records say about the model before forgetting, when that model is gone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from cl_platform.metrics.measured import Measured, undefined

GONE = "the accuracy on the task before forgetting is not known any more"


def recorded_accuracies(run: Path, task_id: int, sizes: Mapping[int, int]) -> dict[str, Measured]:
    """Test accuracies of the primary space at the last task end at which ``accuracy_matrix.csv`` counts the task.

    Args:
        run: the run folder.
        task_id: the forgotten task.
        sizes: kept task id -> its test images. Without a value where the records were made before one was learnt.

    Returns:
        ``forget_acc_test`` and ``retain_acc_test``, as far as they are known.
    """
    row = _last_row(run, task_id)
    if task_id not in row:
        return {"forget_acc_test": undefined(GONE)}
    found = {"forget_acc_test": Measured(row[task_id])}
    total = sum(sizes.values())
    if total and sizes.keys() <= row.keys():
        found["retain_acc_test"] = Measured(math.fsum(row[t] * n for t, n in sizes.items()) / total)
    return found


def _last_row(run: Path, task_id: int) -> dict[int, float]:
    """Accuracies by task id in the last row that has one of ``task_id``; empty if there is none."""
    try:
        header, *lines = (run / "accuracy_matrix.csv").read_text(encoding="utf-8").splitlines()
        ids = [int(name.removeprefix("task_")) for name in header.split(",")[1:]]
        rows = [[float(cell) for cell in line.split(",")[1:]] for line in lines if not line.startswith("init,")]
    except (OSError, ValueError):
        return {}
    known = [{t: value for t, value in zip(ids, row, strict=False) if not math.isnan(value)} for row in rows]
    return next((row for row in reversed(known) if task_id in row), {})
