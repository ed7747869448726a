"""Diagnostics 5.4 after each task: what the features alone could still tell, and how far they have moved.

An analysis tool: it reads training images of earlier tasks, which no strategy may. Nothing here reaches training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_platform.files import write_atomically
from cl_platform.metrics.matrix import Outcome, Result, Undefined
from cl_platform.metrics.representation import (
    REPRESENTATION_DEFINITIONS,
    cka_drift,
    cka_drift_debiased,
    nme_acc,
    probe_acc,
)
from cl_platform.metrics.results import entry
from cl_platform.metrics.subset import evaluation_subset

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import ImageSet, Stream

FILE = "representation.safetensors"
TRAIN_PER_CLASS = 50
TEST_PER_TASK = 100


class Representation:
    """Probe, nearest mean and drift of the features before the head.

    Args:
        stream: the tasks.
        seed: the run's seed; images are drawn from it as for continual evaluation.
        folder: the run's; features right after each task go into ``representation.safetensors``.
    """

    def __init__(self, stream: Stream, seed: int, folder: Path) -> None:
        self._stream, self._seed, self._path = stream, seed, folder / FILE
        self._first: dict[str, Tensor] = {}  # position -> features of its test images right after it was learnt
        self._records: list[dict[str, Any]] = []
        self._forgotten: set[int] = set()

    def forget(self, position: int) -> None:
        """Look no more at the task of a position, which was forgotten on request, nor remember its features."""
        self._forgotten.add(position)
        self._first.pop(str(position), None)

    def reopen(self, records: list[dict[str, Any]]) -> None:
        """Go on behind the last task of ``records``, with the features that its run has written."""
        from safetensors.torch import load

        self._records = list(records)
        kept = load(self._path.read_bytes()) if self._path.exists() else {}
        self._first = {name: tensor for name, tensor in kept.items() if int(name) < len(records)}

    @property
    def records(self) -> list[dict[str, Any]]:
        """One plain record a task end."""
        return self._records

    def end_task(self, learner: ContinualLearner, position: int) -> None:
        """Look at the features of all tasks up to ``position``."""
        from safetensors.torch import save

        places = [place for place in range(position + 1) if place not in self._forgotten]
        tasks = [self._stream.tasks[place] for place in places]
        train = [_some(task.train, TRAIN_PER_CLASS * len(task.classes), self._seed, task.task_id) for task in tasks]
        test = [_some(task.test, TEST_PER_TASK, self._seed, task.task_id) for task in tasks]
        known, now = ([learner.features_of(part).cpu() for part in parts] for parts in (train, test))
        here = dict(zip(places, now, strict=True))
        self._first[str(position)] = here[position].contiguous()
        write_atomically(self._path, save(self._first))
        seen, labels = torch.cat(known), torch.cat([part.labels for part in train])
        asked, truth = torch.cat(now), torch.cat([part.labels for part in test])
        before = {j: self._first[str(j)] for j in places if j < position and str(j) in self._first}
        self._records.append(
            {
                "probe_acc": _plain(probe_acc(seen, labels, asked, truth)),
                "nme_acc": _plain(nme_acc(seen, labels, asked, truth)),
                "cka_drift": {str(j): _plain(cka_drift(h, here[j])) for j, h in before.items()},
                "cka_drift_debiased": {str(j): _plain(cka_drift_debiased(h, here[j])) for j, h in before.items()},
            }
        )

    def entries(self, space: str) -> dict[str, dict[str, Any]]:
        """Entries of ``metrics.json`` as of the last task; ``after`` runs along the task ends."""
        made = {}
        for definition in REPRESENTATION_DEFINITIONS:
            along = [self._mean(record, definition.key) for record in self._records]
            value, reason = along[-1] if along else (None, "empty")
            made[f"{definition.key}_{space}"] = {
                **entry(definition.id, value, space, definition.unit, reason=reason),
                "after": [number for number, _ in along],
            }
        return made

    @staticmethod
    def _mean(record: Mapping[str, Any], key: str) -> tuple[float | None, str | None]:
        found = record[key]
        if "value" in found:
            return found["value"], found["reason"]
        if not found:
            return None, "needs_two_tasks"
        reason = next((item["reason"] for item in found.values() if item["value"] is None), None)
        return (None, reason) if reason else (sum(i["value"] for i in found.values()) / len(found), None)


def _some(image_set: ImageSet, count: int, seed: int, task_id: int) -> ImageSet:
    rows = evaluation_subset(image_set.labels.tolist(), count, seed, task_id)
    return image_set.select(torch.tensor(rows, dtype=torch.int64))


def _plain(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, Result):
        return {"value": outcome.value, "reason": None}
    assert isinstance(outcome, Undefined)
    return {"value": None, "reason": outcome.reason}
