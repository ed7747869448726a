"""``cl-platform new strategy NAME``."""

from __future__ import annotations

import json
import keyword
import re
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from cl_platform.errors import UserError

What = Annotated[str, typer.Argument(help="strategy", metavar="strategy", show_default=False)]
Name = Annotated[str, typer.Argument(help="What will be typed behind strategy=.", metavar="NAME", show_default=False)]
Into = Annotated[Path, typer.Option("--into", help="Folder in which the package's folder is made.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

FILES = {
    "pyproject.toml.j2": "pyproject.toml",
    "README.md.j2": "README.md",
    "strategy.py.j2": "{module}/strategy.py",
    "test_strategy.py.j2": "tests/test_{name}.py",
}


def new(what: What, name: Name, into: Into = Path("."), as_json: Json = False) -> None:
    """Write a package with a working strategy and its test, ready for pip install."""
    if what != "strategy":
        raise UserError("new", what, "can be a strategy", "Write new strategy NAME")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise UserError("NAME", name, "must be lower-case letters, digits and _, and begin with a letter", "Rename it")
    _refuse_taken(name)
    target = into / f"cl_{name}"
    if target.exists():
        raise UserError("NAME", name, f"{target} is there already", "Choose another name, or another folder by --into")
    _write(name, target)
    if as_json:
        typer.echo(json.dumps({"folder": str(target), "files": [str(f) for f in sorted(_files(target))]}))
        return
    typer.echo(f"written: {target}")
    typer.echo(f"next:    pip install -e {target}")
    typer.echo(f"         cl-platform train strategy={name}")


def _refuse_taken(name: str) -> None:
    from cl_platform.cli.compose import groups, load_plugins

    load_plugins([])
    if name in groups()["strategy"]:
        raise UserError("NAME", name, "there is a strategy of this name", f"Rename it; see cl-platform describe {name}")


def _write(name: str, target: Path) -> None:
    """All files, or none."""
    import jinja2

    from cl_platform.plugins import API

    room = Path(__file__).resolve().parents[1] / "templates" / "strategy_package"
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(room),
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    title = "".join(part.capitalize() for part in name.split("_"))
    words: dict[str, str] = {
        "name": name,
        "module": f"cl_{name}",
        "package": f"cl-{name}".replace("_", "-"),
        "title": title,
        "api": str(API),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as desk:
            made = Path(desk) / target.name
            for template, place in FILES.items():
                file = made / place.format(**words)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(engine.get_template(template).render(words), encoding="utf-8")
            (made / words["module"] / "__init__.py").write_text(f'"""The strategy {name} for cl_platform."""\n')
            shutil.move(made, target)
    except OSError as error:
        raise UserError(
            "--into", target.parent, f"cannot be written ({error.strerror})", "Choose another folder"
        ) from error


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]
