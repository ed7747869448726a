"""Files that have either their old or their new content, also after a crash."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name of its own, bring it to the disk, then rename it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class AppendedFile:
    """A file that only grows, each text in one write: a process that dies leaves whole texts, or a torn last one.

    Args:
        path: created empty if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  # held open for the life of the run

    def append(self, text: str) -> None:
        """Add a text."""
        self._file.write(text.encode())

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more writes."""
        self._file.close()
