"""Relapse (4.3.10): whether the forgotten task comes back in the features while later tasks are learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform.metrics.forgetting import forget_probe_acc, relapse
from cl_platform.metrics.measured import Measured, undefined
from cl_platform.unlearning.models import Build, checkpoint_after, restored

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

Side = tuple[Path, Mapping[str, Any]]
"""A run folder and its configuration."""


def relapse_of(u: Side, r: Side, task: Task, learnt: Sequence[int], after_task: int | None, build: Build) -> Measured:
    """The largest rise of the probe's accuracy over that of the reference since the task was forgotten.

    Args:
        u: the run that forgot.
        r: the reference.
        task: the forgotten one.
        learnt: ids of the kept tasks in the order of learning.
        after_task: the newest task learnt when the request came.
        build: a learner that has learnt nothing.
    """
    done = len(learnt)
    if after_task is not None and after_task in learnt:
        done = list(learnt).index(after_task) + 1
    values: list[tuple[Measured, Measured]] = []
    for count in range(max(done, 1), len(learnt) + 1):
        pair = []
        for run, config in (u, r):
            checkpoint = checkpoint_after(run, learnt[:count])
            if checkpoint is None:
                break
            learner = restored(config, checkpoint, build)
            train, test = learner.features_of(task.train).cpu(), learner.features_of(task.test).cpu()
            pair.append(forget_probe_acc(train, task.train.labels, test, task.test.labels))
        if len(pair) == 2:
            values.append((pair[0], pair[1]))
    if len(values) < 2 and done < len(learnt):
        return undefined("the states right after forgetting are not there any more")
    return relapse([one for one, _ in values], [other for _, other in values])
