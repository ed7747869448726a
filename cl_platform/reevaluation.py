"""Accuracies of a trained learner counted anew: on the run's own test sets, or on a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform.building import instructions_of, stream_of
from cl_platform.errors import UserError, nearest
from cl_platform.evaluation import answered, count_correct, spaces_of
from cl_platform.metrics import AccuracyMatrix
from cl_platform.scenarios.listing import folders, image_files, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from cl_platform.trained import Trained

Cell = tuple[int, int]
"""(right answers, images)."""
BATCH = 128


@dataclass(frozen=True)
class Accuracies:
    """Right answers by prediction space.

    Attributes:
        spaces: space (``cil``, ``til`` or ``dil``), the primary one first -> task id -> (right answers, images).
        recorded: the same as the run itself counted it after its newest task; empty where there is nothing to compare.
        per_class: class name -> (right answers, images) in the primary space, for a folder of images.
        unknown: sub-folders of the folder that name no class of the learner.
        unread: (file, why) of images that could not be read.
        notes: what else there is to say, a line each.
    """

    spaces: dict[str, dict[int, Cell]]
    recorded: dict[str, dict[int, Cell]] = field(default_factory=dict)
    per_class: dict[str, Cell] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    unread: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def same_as_recorded(self) -> bool | None:
        """Whether every count is the run's own; ``None`` where there is nothing to compare."""
        return self.spaces == self.recorded if self.recorded else None

    def accuracy(self, space: str, task_id: int | None = None) -> float | None:
        """Share of right answers within 0..1, of one task or of all images together; ``None`` without images."""
        cells = self.spaces[space]
        return share(pooled(cells.values()) if task_id is None else cells[task_id])

    def mean_of_tasks(self, space: str) -> float | None:
        """Mean of the tasks' accuracies, as ``acc`` in ``metrics.json``; ``None`` without images."""
        known = [value for value in map(share, self.spaces[space].values()) if value is not None]
        return sum(known) / len(known) if known else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "spaces": {space: self._space(space, cells) for space, cells in self.spaces.items()},
            "per_class": [{"class": name, **_cell(cell)} for name, cell in self.per_class.items()],
            "unknown_classes": list(self.unknown),
            "unread": [{"path": shown(path), "reason": reason} for path, reason in self.unread],
            "same_as_recorded": self.same_as_recorded,
            "notes": list(self.notes),
        }

    def _space(self, space: str, cells: dict[int, Cell]) -> dict[str, Any]:
        tasks = [{"task_id": task_id, **_cell(cell)} for task_id, cell in cells.items()]
        return {"tasks": tasks, "mean_of_tasks": self.mean_of_tasks(space), "total": _cell(pooled(cells.values()))}


def share(cell: Cell) -> float | None:
    """Right answers of all images; ``None`` without images."""
    return cell[0] / cell[1] if cell[1] else None


def pooled(cells: Any) -> Cell:
    """Right answers and images of several cells together."""
    listed = list(cells)
    return sum(right for right, _ in listed), sum(images for _, images in listed)


def _cell(cell: Cell) -> dict[str, Any]:
    return {"right": cell[0], "images": cell[1], "accuracy": share(cell)}


def on_own_data(trained: Trained) -> Accuracies:
    """The whole test sets of the tasks that the learner knows, from the run's configuration.

    Raises:
        UserError: data that cannot be had.
    """
    config, kept = trained.config, set(trained.kept_tasks)
    stream = stream_of(config, trained.record, instructions_of(config, trained.record))
    tasks = [task for task in stream.tasks if task.task_id in kept]
    counts = count_correct(trained.learner, tasks)
    spaces = {
        space: {task.task_id: cell for task, cell in zip(tasks, zip(right, counts.total, strict=True), strict=True)}
        for space, right in counts.correct.items()
    }
    notes = []
    if stream.digest != trained.stream.digest:
        notes.append("the data are not those that the run was trained and evaluated on")
    recorded = {space: _recorded(trained, space, kept) for space in spaces}
    found = Accuracies(spaces, recorded if all(recorded.values()) else {}, notes=tuple(notes))
    if found.same_as_recorded is False:
        first = f"{trained.device.type} here"
        notes.append(f"not the counts that the run itself wrote after its newest task ({first})")
    return Accuracies(spaces, found.recorded, notes=tuple(notes))


def _recorded(trained: Trained, space: str, kept: set[int]) -> dict[int, Cell]:
    """The newest row of the run's own matrix."""
    matrix = AccuracyMatrix.from_dict(trained.checkpoint.state["results"]["matrices"][space])
    pairs = zip(matrix.task_ids, matrix.rows[-1], strict=True) if matrix.rows else ()
    return {task_id: cell for task_id, cell in pairs if cell is not None and task_id in kept}


def on_folder(trained: Trained, folder: Path) -> Accuracies:
    """A folder with a sub-folder of images for each class, named as the learner's classes.

    An image counts for the task that has its class, or for the first one where several share it.

    Raises:
        UserError: no such folder, or no class or image in it that the learner could know.
    """
    if not folder.is_dir():
        raise UserError("--on", shown(str(folder)), "there is no such folder", "Name a folder with class sub-folders")
    id_of = dict(zip(trained.class_names, trained.classes, strict=True))
    names = folders(folder, folder, "--on")
    known = [name for name in names if shown(name) in id_of]
    if not known:
        raise _no_class(trained, folder, names)
    space = spaces_of(trained.stream.setting)
    task_of = {
        c: t.task_id for t in reversed(trained.stream.tasks) if t.task_id in trained.kept_tasks for c in t.classes
    }
    spaces: dict[str, dict[int, Cell]] = {name: {} for name in space}
    per_class: dict[str, Cell] = {}
    unread: list[tuple[str, str]] = []
    for name in known:
        label = id_of[shown(name)]
        files = [str(folder / file.path) for file in image_files(folder, folder / name, label, "--on")]
        for logits in _logits_of_files(trained, files, unread):
            for kind in space:
                own = trained.stream.task(task_of[label]).classes
                right = answered(logits, trained.classes, own if kind == "til" else trained.classes) == label
                cell = (int(right.sum()), len(logits))
                spaces[kind][task_of[label]] = pooled([spaces[kind].get(task_of[label], (0, 0)), cell])
                if kind == space[0]:
                    per_class[shown(name)] = pooled([per_class.get(shown(name), (0, 0)), cell])
    if not per_class:
        raise UserError("--on", shown(str(folder)), "no image in its class folders can be read", "Put images there")
    ordered = {kind: dict(sorted(cells.items())) for kind, cells in spaces.items()}
    unknown = tuple(shown(name) for name in names if name not in known)
    return Accuracies(ordered, per_class=per_class, unknown=unknown, unread=tuple(unread))


def _logits_of_files(trained: Trained, files: Sequence[str], unread: list[tuple[str, str]]) -> Iterator[torch.Tensor]:
    """Logits (b, S) batch by batch; what cannot be read is added to ``unread``."""
    import torch

    from cl_platform.scenarios.decode import UnreadableImageError

    for start in range(0, len(files), BATCH):
        images = []
        for file in files[start : start + BATCH]:
            try:
                images.append(trained.prepared(file))
            except UnreadableImageError as error:
                unread.append((file, str(error)))
        if images:
            yield trained.logits(torch.stack(images))


def _no_class(trained: Trained, folder: Path, names: Sequence[str]) -> UserError:
    first = ", ".join(trained.class_names[:5]) + (", ..." if len(trained.class_names) > 5 else "")
    if "test" in names:
        todo = f"Name {shown(str(folder / 'test'))}"
    else:
        near = [match for name in names[:20] for match in nearest(shown(name), trained.class_names, 1)]
        todo = f"Did you mean {near[0]}" if near else "Name the sub-folders as the classes"
    held = ", ".join(map(shown, names[:5])) or "none"
    reason = f"no sub-folder is named as a class of the learner ({first}); it has {held}"
    return UserError("--on", shown(str(folder)), reason, todo)
