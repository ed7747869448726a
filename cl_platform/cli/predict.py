"""``cl-platform predict RUN images...``."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from cl_platform.cli.answers import WRITERS, opened, printable
from cl_platform.cli.talk import print_log
from cl_platform.errors import UserError, unknown_name

Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN", show_default=False)]
Images = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders, patterns; - reads paths from standard input, one a line.", metavar="IMAGES",
        show_default=False,
    ),
]  # fmt: skip
Format = Annotated[str, typer.Option("--format", help="table, csv or json.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="Classes of an answer; more than there are: all.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images that are looked at together.")]
Output = Annotated[Path | None, typer.Option("--output", help="Write there, in place of standard output.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; left out: that of the run.")]
Json = Annotated[bool, typer.Option("--json", help="The same as --format json.")]

PART_FAILED = 1


def predict(
    run: Run,
    images: Images,
    form: Format = "table",
    top_k: TopK = 1,
    batch_size: BatchSize = 128,
    output: Output = None,
    device: Device = None,
    as_json: Json = False,
) -> int:
    """Say what images show, with a trained learner; which task they belong to is found out, not asked."""
    form = "json" if as_json else form
    if form not in WRITERS:
        raise unknown_name("--format", form, WRITERS)
    print_log(logging.WARNING)
    from cl_platform.image_paths import image_paths
    from cl_platform.trained import Trained

    troubles = Troubles()
    paths = image_paths(_words(images), troubles.add)
    first = next(paths, None)
    if first is None:
        raise troubles.nothing_found()
    trained = Trained.open(run, device)
    troubles.speak()
    with opened(output) as file:
        writer = WRITERS[form](file)
        writer.begin()
        for answer in trained.answers(itertools.chain([first], paths), top_k, batch_size):
            if answer.error is None:
                writer.write(answer)
            else:
                troubles.add(answer.path or "", answer.error)
        writer.end()
    return PART_FAILED if troubles.count else 0


def _words(images: Sequence[str]) -> Iterator[str]:
    for word in images:
        if word != "-":
            yield word
            continue
        for line in getattr(sys.stdin, "buffer", sys.stdin):
            path = (os.fsdecode(line) if isinstance(line, bytes) else line).rstrip("\r\n")
            if path:
                yield path


class Troubles:
    """What could not be answered: said on standard error, from the moment on that anything is answered at all."""

    def __init__(self) -> None:
        self.count = 0
        self._held: list[tuple[str, str]] | None = []

    def add(self, name: str, reason: str) -> None:
        """One more."""
        self.count += 1
        if self._held is None:
            print(f"{printable(name)}: {reason}", file=sys.stderr)
        else:
            self._held.append((name, reason))

    def speak(self) -> None:
        """Say what was held back, and everything from now on at once."""
        held, self._held = self._held or [], None
        for name, reason in held:
            print(f"{printable(name)}: {reason}", file=sys.stderr)

    def nothing_found(self) -> UserError:
        """The refusal where no image was found."""
        name, reason = (self._held or [("", "no image was named")])[0]
        return UserError("images", printable(name), reason, "Name image files, folders of them, or a pattern")
