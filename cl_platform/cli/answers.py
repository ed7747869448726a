"""Answers about images as CSV, JSON or lines for people, written one by one."""

from __future__ import annotations

import csv
import json
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cl_platform.errors import UserError

if TYPE_CHECKING:
    from cl_platform.trained import Answer

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""First characters that make a spreadsheet take a cell for a formula."""
NAME_WIDTH = 24
HEADER = ("path", "task_id", "rank", "class", "probability")


def printable(name: str) -> str:
    """A name on one line, without characters that a terminal would obey and without bytes that are no text."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def harmless(cell: str) -> str:
    """A text as a cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell.startswith(FORMULA) else cell


class Writer:
    """Writes answers to a file, in the order in which they come.

    Args:
        file: open for text.
    """

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def begin(self) -> None:
        """Before the first answer."""

    def write(self, answer: Answer) -> None:
        """One answer."""
        raise NotImplementedError

    def end(self) -> None:
        """After the last answer."""


class CsvWriter(Writer):
    """A row for each class of an answer: path, task id (empty where several tasks share the class), rank, class."""

    def begin(self) -> None:
        """The header."""
        self._rows = csv.writer(self.file, lineterminator="\n")
        self._rows.writerow(HEADER)

    def write(self, answer: Answer) -> None:
        """As many rows as it has classes."""
        path, task = harmless(_text(answer.path)), "" if answer.task_id is None else answer.task_id
        for rank, (name, probability) in enumerate(answer.classes, 1):
            self._rows.writerow((path, task, rank, harmless(name), f"{probability:.6g}"))


class JsonWriter(Writer):
    """One JSON array, an object for each answer."""

    _first = True

    def begin(self) -> None:
        """The opening bracket."""
        self.file.write("[")

    def write(self, answer: Answer) -> None:
        """One object on a line."""
        classes = [{"class": name, "probability": probability} for name, probability in answer.classes]
        entry = {"path": _text(answer.path), "task_id": answer.task_id, "classes": classes}
        self.file.write(("\n" if self._first else ",\n") + json.dumps(entry, ensure_ascii=False))
        self._first = False

    def end(self) -> None:
        """The closing bracket."""
        self.file.write("\n]\n")


class LineWriter(Writer):
    """Lines for people: class, probability, task, path; further classes of an image stand below the first."""

    def write(self, answer: Answer) -> None:
        """A line for each class."""
        task = "" if answer.task_id is None else f"task {answer.task_id}"
        for rank, (name, probability) in enumerate(answer.classes):
            shown = printable(name)
            shown = shown if len(shown) <= NAME_WIDTH else f"{shown[: NAME_WIDTH - 3]}..."
            last = f"  {task:<8}  {printable(answer.path or '')}" if rank == 0 else ""
            self.file.write(f"{shown:<{NAME_WIDTH}} {100 * probability:6.2f} %{last}".rstrip() + "\n")


WRITERS: dict[str, type[Writer]] = {"table": LineWriter, "csv": CsvWriter, "json": JsonWriter}


@contextmanager
def opened(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that has its new content only once all of it was written.

    Raises:
        UserError: it cannot be written.
    """
    if output is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex}.tmp")
    try:
        if output.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with open(temporary, "x", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, output)
    except OSError as error:
        hint = "Name a file in a folder that can be written"
        raise UserError("--output", output, f"cannot be written ({error.strerror or error})", hint) from error
    finally:
        temporary.unlink(missing_ok=True)


def _text(path: str | None) -> str:
    return os.fsencode(path or "").decode("utf-8", "replace")
