"""From what a user names (files, folders, patterns) to the paths of image files, one after the other."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator

from cl_platform.scenarios.listing import SUFFIXES

Complaint = Callable[[str, str], None]
"""Takes a name and why it leads to no image."""


def image_paths(words: Iterable[str], complain: Complaint) -> Iterator[str]:
    """Paths of files, found while they are asked for; a folder's files come sorted bytewise, folder by folder.

    A file is taken whatever its ending; of a folder and those in it, visible files with the ending of an image are.

    Args:
        words: files, folders, or patterns such as ``photos/**/*.png``; a file of exactly that name comes first.
        complain: told of words without any file, and of folders that cannot be read.
    """
    for word in words:
        if os.path.lexists(word):
            yield from _below(word, complain)
        elif glob.has_magic(word):
            matches = sorted(glob.iglob(word, recursive=True), key=os.fsencode)
            if not matches:
                complain(word, "matches no file")
            for match in matches:
                yield from _below(match, complain)
        else:
            complain(word, "there is no such file")


def _below(path: str, complain: Complaint) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    found = False
    for folder, inner, files in os.walk(path, onerror=lambda e: complain(str(e.filename), e.strerror or str(e))):
        inner[:] = sorted((name for name in inner if not name.startswith(".")), key=os.fsencode)
        for name in sorted(files, key=os.fsencode):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                found = True
                yield os.path.join(folder, name)
    if not found:
        complain(path, f"the folder holds no image (files ending in {', '.join(SUFFIXES)})")
