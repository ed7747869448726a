"""What was answered after each instruction of a sequence: a file of the run folder, with counts of whole tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_platform.metrics import Cell
from cl_platform.metrics.instructions import request_averages
from cl_platform.run_folder import to_json
from cl_platform.unlearning.reference import read_json
from cl_platform.unlearning.sequence import Stage

FILE = "instructions.json"


def entry(stage: Stage, found: Mapping[str, Mapping[int, Cell]]) -> dict[str, Any]:
    """The record of one stage, plain JSON.

    Args:
        stage: the one just obeyed.
        found: prediction space -> task id -> (right answers, images) of the tasks held then.
    """
    right = {space: {str(t): list(cell) for t, cell in cells.items()} for space, cells in found.items()}
    return {"token": stage.token, "instruction": str(stage), "right_of": right}


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run folder; none where there is no such file."""
    return list(read_json(folder / FILE).get("after", ()))


def to_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Content of the file: the records, and means over all pairs of an instruction and a task held after it."""
    averages = {}
    for space in entries[0]["right_of"]:
        held = [{int(t): (cell[0], cell[1]) for t, cell in e["right_of"][space].items()} for e in entries]
        accuracy, forgetting = request_averages(held)
        averages[space] = {"accuracy": accuracy, "forgetting": forgetting}
    return to_json({"after": list(entries), "averages": averages})
