"""Which tasks a run has forgotten: a file of the run folder, so that they stay forgotten."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError
from cl_platform.files import write_atomically

FILE = "unlearning/forgotten.json"


@dataclass(frozen=True)
class Forgotten:
    """A task that was forgotten on request.

    Attributes:
        task_id: its id; it is never learnt again in this run.
        method: ``drop``, ``rollback`` or ``approximate:<name>``.
        level: ``E-bit``, ``E-law`` or ``approximate``.
        after_task: the newest task that had been learnt by then, or ``None``.
        in_place: the task keeps its place in the stream and its counts before the request; else the run is one whose
            stream leaves the task out.
    """

    task_id: int
    method: str
    level: str
    after_task: int | None
    in_place: bool


@dataclass(frozen=True)
class Record:
    """All tasks that a run has forgotten, in the order of the requests."""

    entries: tuple[Forgotten, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """Their task ids."""
        return tuple(entry.task_id for entry in self.entries)

    @property
    def left_out(self) -> tuple[int, ...]:
        """Ids of those that the stream leaves out, ascending."""
        return tuple(sorted(entry.task_id for entry in self.entries if not entry.in_place))

    @property
    def in_place(self) -> tuple[int, ...]:
        """Ids of those that keep their place in the stream."""
        return tuple(entry.task_id for entry in self.entries if entry.in_place)

    def with_entry(self, entry: Forgotten) -> Record:
        """The record with one more task; an earlier entry about it is replaced."""
        return Record((*(known for known in self.entries if known.task_id != entry.task_id), entry))

    def leaving_out(self, task_ids: Iterable[int] | None = None) -> Record:
        """The record where the stream leaves out some tasks, or all, that kept their place."""
        chosen = set(self.ids if task_ids is None else task_ids)
        return Record(tuple(replace(e, in_place=e.in_place and e.task_id not in chosen) for e in self.entries))

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON."""
        return [asdict(entry) for entry in self.entries]

    @classmethod
    def from_json(cls, state: Iterable[Mapping[str, Any]]) -> Record:
        """What :meth:`to_json` gave."""
        return cls(tuple(Forgotten(**entry) for entry in state))


def read(run: Path) -> Record:
    """The record of a run folder, empty where nothing was forgotten.

    Raises:
        UserError: the file cannot be understood; a run that went on without it would learn the task again.
    """
    path = run / FILE
    if not path.exists():
        return Record()
    try:
        return Record.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError, OSError) as error:
        why = f"{FILE} cannot be understood ({error})"
        raise UserError("run", run, why, "Restore the file: it says which tasks must not be learnt again") from error


def to_text(record: Record) -> str:
    """Content of the file."""
    return json.dumps(record.to_json(), indent=1) + "\n"


def write(run: Path, record: Record) -> None:
    """Put the record into the run folder."""
    (run / FILE).parent.mkdir(exist_ok=True)
    write_atomically(run / FILE, to_text(record))


def after(run: Path, state: Mapping[str, Any] | None) -> Record:
    """The record as it holds for a run that goes on from a checkpoint.

    A task that the checkpoint does not know as forgotten was not learnt yet in it: the stream leaves it out.

    Args:
        run: the run folder.
        state: of the checkpoint, ``None`` for the initial weights.
    """
    record = read(run)
    known = {entry["task_id"] for entry in (state or {}).get("forgotten", []) if entry["in_place"]}
    return record.leaving_out(task_id for task_id in record.ids if task_id not in known)
