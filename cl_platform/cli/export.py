"""``cl-platform export RUN --format onnx --output FILE``."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from cl_platform.cli.talk import print_log

Run = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN", show_default=False)]
Format = Annotated[
    str, typer.Option("--format", help="torch_export, onnx or safetensors.", metavar="FORMAT", show_default=False)
]
Output = Annotated[Path, typer.Option("--output", help="File to write.", metavar="FILE", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def export(run: Run, form: Format, output: Output, force: Force = False, as_json: Json = False) -> None:
    """Write a trained learner into one file; it is compared with the live one before it is written.

    torch_export, onnx: a function from uint8 RGB images to logits of the classes,
    with resizing and normalisation inside; metadata name the classes.

    safetensors: all that was learnt, for this platform to load.
    """
    print_log(logging.WARNING)
    from cl_platform.export import check_request
    from cl_platform.export import export as exported

    check_request(run, form, output, force)
    from cl_platform.trained import Trained

    trained = Trained.open(run, "cpu")
    made = exported(trained, form, output, force)
    shape = (None, *trained.stream.image_shape)
    if made.images:
        print(f"note: {made.images} remembered training images are in the file", file=sys.stderr)
    if as_json:
        facts = {
            "path": str(made.path), "format": made.form, "bytes": made.size, "difference": made.difference,
            "input_shape": list(shape), "classes": trained.class_names, "remembered_images": made.images,
        }  # fmt: skip
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    typer.echo(f"{made.path}: {made.form}, {made.size:,} bytes")
    if form != "safetensors":
        size = " x ".join(map(str, shape[1:]))
        typer.echo(f"uint8 images (any number) x {size} -> logits of {len(trained.classes)} classes")
    found = f"differ by at most {made.difference:.2g} from" if made.difference else "equal"
    typer.echo(f"checked on random images: logits {found} the live learner's")
