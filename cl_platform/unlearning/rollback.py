"""Forgetting by relearning: back to the newest checkpoint that never saw the task, and the later tasks without it.

The new history is made in a folder of its own inside the run folder and takes the place of the old one only when it is
complete; until then a crash leaves the run as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError
from cl_platform.files import write_atomically
from cl_platform.run_folder import checkpoint_positions, to_json
from cl_platform.unlearning import forgotten as records
from cl_platform.unlearning.choice import Option, Price, level_on
from cl_platform.unlearning.forgotten import Record
from cl_platform.unlearning.reference import read_json
from cl_platform.unlearning.scan import files_below

METHOD = "rollback"
STAGING = "relearned"
"""Folder, beside what else the open request keeps, in which the new history is made."""
STAYS = ("unlearning", ".lock", "config.yaml")
"""What of a run folder is not part of its history."""
GONE = "of the history in which the task was learnt"
HISTORY = (
    "checkpoints", "accuracy_matrix.csv", "confusion.json", "continual_eval.csv", "gradients.csv", "metrics.json",
    "cost.json", "environment.json", "instructions.json", "representation.safetensors", "report.html", "figures",
    "run.log", "tensorboard", "csv", "stream.json",
)  # fmt: skip
"""What a run writes: all of it gives way to the new history, whether or not that has a file of the name."""
LEARNING = ("train", "boundary", "eval_continual", "eval_boundary", "checkpoint")
"""Phases of a run's cost that grow with what is learnt."""
SEEDS = ("continual_eval.csv", "gradients.csv", "representation.safetensors")
"""Files that grow over a run; a resumed run cuts off what is about later tasks."""


@dataclass(frozen=True)
class Way:
    """A rollback as it will be done.

    Attributes:
        base: position of the checkpoint to go back to; -1 for the initial weights.
        order: ids of the tasks of the new stream.
        until: number of them that are learnt when it is done.
    """

    base: int
    order: tuple[int, ...]
    until: int

    @property
    def stages(self) -> tuple[int, ...]:
        """Ids of the tasks to relearn, in order."""
        return self.order[self.base + 1 : self.until]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"base": self.base, "order": list(self.order), "until": self.until}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Way:
        """What :meth:`to_json` gave."""
        return cls(state["base"], tuple(state["order"]), state["until"])


def way_back(
    run: Path,
    order: Sequence[int],
    learnt: int,
    gone: Sequence[int],
    foresees: str = "nothing",
    ended: bool = True,
    ends: Sequence[int] = (),
) -> Way:
    """Where to go back to, and what to relearn.

    Args:
        run: the run folder.
        order: ids of the tasks of its stream, forgotten ones that kept their place included.
        learnt: how many of them have been learnt, or passed.
        gone: ids of all tasks to be forgotten by then.
        foresees: what of the stream's future the strategies depend on: ``nothing``, its ``end`` or its ``length``.
        ended: the stream has been learnt as a whole.
        ends: positions at which the scenario ended before tasks were added behind it.
    """
    kept = tuple(task_id for task_id in order if task_id not in gone)
    until = sum(task_id not in gone for task_id in order[:learnt])
    first = min((order.index(task_id) for task_id in gone if task_id in order), default=len(order))
    newest = first - 1
    if foresees == "length":
        newest = -1
    elif foresees == "end" and ended:  # whoever does something at the end of the stream has to come to the new end
        newest = min(newest, len(kept) - 2)
    if foresees == "end" and any(order[place] in gone for place in ends if place < learnt):
        newest = min(newest, first - 2)  # such an end is now at an earlier task
    base = max((position for position in checkpoint_positions(run) if position <= newest), default=-1)
    return Way(base, kept, until)


def option(way: Way, device: str, price: Callable[[Way], tuple[int, int]], cost: Mapping[str, Any]) -> Option:
    """What the rollback would reach and cost here.

    Args:
        way: see :func:`way_back`.
        device: kind of device that relearns.
        price: (training images, optimizer updates) of its stages; raises a ``UserError`` where their data are missing.
        cost: what the run has cost so far, as in a checkpoint.
    """
    where = "the initial weights" if way.base < 0 else f"the checkpoint after task {way.order[way.base]}"
    if not way.order:
        return Option(METHOD, None, Price(), "it is the run's only task: delete the run folder instead")
    if not way.stages:
        return Option(METHOD, level(device), Price(), f"{where} lacks the task, and nothing was learnt after it")
    try:
        images, steps = price(way)
    except UserError as error:
        listed = ", ".join(map(str, way.stages))
        why = f"the data of tasks {listed} cannot be had"
        return Option(METHOD, None, Price(way.stages, seconds=None), why, detail=str(error).rstrip("."))
    seconds = _seconds(cost, steps, images)
    return Option(METHOD, level(device), Price(way.stages, images, steps, seconds), f"from {where}")


def _seconds(cost: Mapping[str, Any], steps: int, images: int) -> float | None:
    """Seconds of so many steps, at the pace of the run so far."""
    spent = sum(cost.get("seconds", {}).get(name, 0.0) for name in LEARNING)
    if cost.get("updates") and steps:
        return float(spent) / float(cost["updates"]) * steps
    if cost.get("images_trained") and images:
        return float(spent) / float(cost["images_trained"]) * images
    return None


def level(device: str) -> str:
    """What relearning reaches on a kind of device."""
    return level_on(device, exact=True)


def prepare(run: Path, staging: Path, way: Way, record: Record) -> None:
    """Begin the folder in which the new history is made with what stays of the old one; one begun before goes on.

    Args:
        run: the run folder.
        staging: the other one.
        way: see :func:`way_back`.
        record: what will have been forgotten.
    """
    if (staging / "config.yaml").exists():
        return  # its own checkpoints say how far it came before a crash
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "checkpoints").mkdir(parents=True)
    for position in range(way.base + 1):
        name = f"task_{position}"
        if (run / "checkpoints" / name).is_dir():
            shutil.copytree(run / "checkpoints" / name, staging / "checkpoints" / name)
    for name in SEEDS:
        if (run / name).exists():
            shutil.copyfile(run / name, staging / name)
    _note_environment(run, staging, way)
    records.write(staging, record)
    write_atomically(staging / "config.yaml", (run / "config.yaml").read_bytes())


def _note_environment(run: Path, staging: Path, way: Way) -> None:
    """With what the run was made, of the tasks that stay; whoever relearns some writes it anew."""
    facts = read_json(run / "environment.json")
    data = facts.get("dataset")
    if isinstance(data, dict):
        kept = [task for task in data.get("tasks") or () if task.get("task_id") in way.order]
        write_atomically(staging / "environment.json", to_json({**facts, "dataset": {**data, "tasks": kept}}))


def exchange(run: Path, staging: Path, way: Way) -> tuple[dict[str, str], dict[str, str]]:
    """How the new history takes the place of the old one.

    Returns:
        Files of the run folder that get new content -> where it lies, relative to the run folder; and files of the old
        history that go -> why.
    """
    rewrites = {}
    for path in files_below(staging):
        relative = path.relative_to(staging).as_posix()
        if relative.split("/")[0] not in STAYS and not _older(relative, way):
            rewrites[relative] = path.relative_to(run).as_posix()
    removals = {}
    for path in files_below(run):
        relative = path.relative_to(run).as_posix()
        if relative.split("/")[0] in HISTORY and relative not in rewrites and not _older(relative, way):
            removals[relative] = GONE
    return rewrites, removals


def _older(path: str, way: Way) -> bool:
    """Whether a file is of a checkpoint that the new history begins with, or comes before that."""
    parts = path.split("/")
    number = parts[1].removeprefix("task_") if parts[0] == "checkpoints" and len(parts) > 2 else ""
    return number.isdigit() and int(number) <= way.base
