"""Averages over a sequence of instructions to learn and to forget (Liu, Liu and Stone, CoLLAs 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cl_platform.metrics.counts import Cell


def request_averages(answers: Sequence[Mapping[int, Cell]]) -> tuple[float | None, float | None]:
    """Average accuracy and forgetting over all pairs of an instruction and a task that is held after it.

    Args:
        answers: after each instruction, in order: task id -> (right answers, images) of the tasks held then.

    Returns:
        mean accuracy in [0, 1], and mean of the accuracy when the task was first answered minus that now, in [-1, 1];
        ``None`` where no task was ever held.
    """
    first: dict[int, float] = {}
    accuracies, losses = [], []
    for held in answers:
        for task_id, (right, images) in held.items():
            if not images:
                continue
            now = right / images
            accuracies.append(now)
            losses.append(first.setdefault(task_id, now) - now)
    if not accuracies:
        return None, None
    return sum(accuracies) / len(accuracies), sum(losses) / len(losses)
