"""Going on with a run from its folder alone: to its end where it was cut off, or with tasks added behind its last."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cl_platform.errors import UserError
from cl_platform.run import Course, carry_on
from cl_platform.run_config import parse
from cl_platform.run_folder import Checkpoint, RunFolder, checkpoints, read_config, to_yaml
from cl_platform.scenarios.extended import shares_classes
from cl_platform.strategies.phases import Phase
from cl_platform.trainer import quiet_libraries
from cl_platform.unlearning import journal

if TYPE_CHECKING:
    from cl_platform.run import RunResult
    from cl_platform.run_config import RunConfig
    from cl_platform.scenarios import ImageSet, Stream, Task

FILE = "config.yaml"
RESULTS = ("metrics.json", "cost.json")
"""What a finished run has and one that is going on has not."""
COMPARED = 32  # first images of a task that tell whether the same came before
ANEW = "Train a new run on all of the data"

log = logging.getLogger("cl_platform")


def finished(path: Path) -> bool:
    """Whether a run has come to its end."""
    return (path / RESULTS[0]).is_file()


def resume(path: Path) -> RunResult | None:
    """Go on with a run that was cut off, or start it anew where it had not finished a task.

    Returns:
        ``None`` where it has finished already.

    Raises:
        UserError: no run folder, a damaged one, or one that another process writes to.
        Interrupted: Ctrl-C or SIGTERM, after the running step.
    """
    config = _going_on(path, read_config(path))
    folder = RunFolder(path)
    try:
        return None if finished(path) and not _open_request(path) else carry_on(config, folder)
    finally:
        folder.close()


def extend(path: Path, extension: Mapping[str, Any]) -> RunResult:
    """Learn more tasks on a finished run, in its folder.

    What is divided by the number of tasks or classes, such as a pool of prompts, stays as it was divided when the run
    began; each added task gets a share of the same size. Cut off, the run is gone on with by :func:`resume`.

    Args:
        path: the run folder.
        extension: the groups ``scenario`` and ``data`` of the new tasks, resolved.

    Raises:
        UserError: a run that has not finished, data that do not fit to it, strategies that cannot grow, or a training
            that failed; where it happens before the first new task is learnt, the run is what it was.
        Interrupted: Ctrl-C or SIGTERM, after the running step.
    """
    quiet_libraries()
    raw = read_config(path)
    folder = RunFolder(path)
    try:
        checkpoint = _last(path)
        wanted = with_extension(raw, extension)
        _rehearse(_going_on(path, raw), _going_on(path, wanted), path, checkpoint)
        for name in RESULTS:  # first: a run that is cut off right here is gone on with to the end that it had
            (path / name).unlink(missing_ok=True)
        folder.write(FILE, to_yaml(wanted))
        try:
            result = carry_on(_going_on(path, wanted), folder)
        except UserError:
            found = next(checkpoints(path), None)
            if found is None or found.position == checkpoint.position:  # no new task was learnt: back to the old end
                folder.write(FILE, to_yaml(raw))
                carry_on(_going_on(path, raw), folder)
            raise
    finally:
        folder.close()
    assert result is not None
    return result


def _going_on(path: Path, raw: Mapping[str, Any]) -> RunConfig:
    return replace(parse(raw), run_dir=None, resume=str(path))


def _open_request(path: Path) -> bool:
    return journal.find(path) is not None


def _last(path: Path) -> Checkpoint:
    """The newest checkpoint of a finished run."""
    if _open_request(path):
        raise UserError(
            "run", path, "a request to forget a task is still open in it",
            f"Finish it first: python -m cl_platform unlearn {path}",
        )  # fmt: skip
    found = next(checkpoints(path), None)
    if not finished(path) or found is None:
        raise UserError(
            "run", path, "has not finished, and tasks are added behind the last one",
            f"Finish it first: python -m cl_platform resume {path}",
        )  # fmt: skip
    return found


def with_extension(raw: Mapping[str, Any], extension: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with one more extension, which a sequence of instructions learns for good."""
    listed = [*(raw.get("extensions") or ()), dict(extension)]
    made = {**raw, "extensions": listed}
    config = parse(made)
    if config.unlearning.sequence is not None:
        counts = [config.scenario.num_tasks, *(added.scenario.num_tasks for added in config.extensions)]
        new = range(sum(counts[:-1]), sum(counts))
        told = " ".join([str(config.unlearning.sequence), *(f"R{task_id}" for task_id in new)])
        made["unlearning"] = {**raw["unlearning"], "sequence": told.strip()}
    return made


def _rehearse(before: RunConfig, wanted: RunConfig, path: Path, checkpoint: Checkpoint) -> None:
    """Everything that could go wrong before the first update, without writing a file.

    Raises:
        UserError: the data or the strategies refuse.
    """
    old = Course(before, path, checkpoint, None)
    try:
        new = Course(wanted, path, checkpoint, None)
    except UserError as error:
        raise _explained(error) from error
    composition = new.learner.composition
    refuse_finished_work(composition.foresees, list(before.strategy), old.phases, new.phases)
    _refuse_known_classes(old.stream, new.stream, old.record.ids)
    _refuse_known_images(old.stream, new.stream, old.record.ids)
    if len(new.stream.tasks) == len(old.stream.tasks):
        raise UserError("scenario.num_tasks", 0, "there is no new task to learn", "Name data with new tasks")
    try:
        new.recall(checkpoint)
    except RuntimeError as error:  # torch's word for tensors of other shapes
        raise UserError(
            "strategy", list(before.strategy), f"its state cannot grow ({_line(error)[:200]})", ANEW
        ) from error


def _explained(error: UserError) -> UserError:
    """A refusal to build the longer run: the keys that it names cannot be changed any more."""
    if not error.key.startswith(("strategy.", "backbone.", "trainer.", "evaluation.")):
        return error
    return UserError(error.key, error.value, f"the run cannot grow so far: {error.allowed}", f"Add fewer tasks. {ANEW}")


def refuse_finished_work(foresees: str, names: Sequence[str], old: Sequence[Phase], new: Sequence[Phase]) -> None:
    """Refuse strategies whose work on the whole stream is over, or was divided by its length."""
    listed = names[0] if len(names) == 1 else list(names)
    if foresees == "length":
        why = "divides its work by the length of the stream, which was settled when the run began"
        raise UserError("strategy", listed, why, ANEW)

    def known(phases: Sequence[Phase]) -> list[Any]:
        return [(phase.position, phase.fresh, _parts(phase.task)) for phase in phases]

    if known(new)[: len(old)] != known(old):
        raise UserError("strategy", listed, "trains once on all tasks together, and that training is over", ANEW)


def _parts(task: Task) -> list[int]:
    return [part.task_id for part in task.parts] or [task.task_id]


def _refuse_known_classes(old: Stream, new: Stream, forgotten: Sequence[int]) -> None:
    """Refuse new classes that have the name of one that the run knows.

    A class that only forgotten or left-out tasks had may come again: it is a new one.
    """
    if shares_classes(old):
        return
    known = {c for task in old.tasks if task.task_id not in forgotten for c in task.classes}
    names = {old.class_names[c] for c in known}
    ids = {task.task_id for task in old.tasks}
    added = [new.class_names[c] for task in new.tasks if task.task_id not in ids for c in task.classes]
    again = [name for name in added if name in names]
    if again:
        shown = ", ".join(again[:5]) + (f" and {len(again) - 5} more" if len(again) > 5 else "")
        raise UserError(
            "scenario", new.name,
            f"the run knows {'a class' if len(again) == 1 else 'classes'} named {shown} already, and every class of an "
            "added task is a new one", "Rename the folders, or leave these classes out",
        )  # fmt: skip


def _refuse_known_images(old: Stream, new: Stream, forgotten: Sequence[int]) -> None:
    """Refuse a task whose images are those of one that the run has learnt; those of a forgotten one may come again."""
    ids = {task.task_id for task in old.tasks}
    known = [task for task in old.tasks if task.task_id not in forgotten]
    for task in (task for task in new.tasks if task.task_id not in ids):
        twin = next((other for other in known if _same_images(other.train, task.train)), None)
        if twin is not None:
            raise UserError(
                "scenario", new.name,
                f"its task {task.task_id} would bring the images of task {twin.task_id} again",
                "Name other data, such as scenario.path=FOLDER, or other scenario.domains",
            )  # fmt: skip


def _same_images(one: ImageSet, other: ImageSet) -> bool:
    if len(one) != len(other) or not len(one):
        return False
    rows = slice(0, COMPARED)
    return torch.equal(one.images(rows), other.images(rows))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
