"""``cl-platform list``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cl_platform.cli.compose import config_folder
from cl_platform.cli.talk import warn_of_broken_plugins
from cl_platform.errors import unknown_name

Kind = Annotated[str | None, typer.Argument(help="strategies, scenarios, backbones, ...; all by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON array.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="Also load this file or module.")]


def list_(kind: Kind = None, plugin: Plugins = None, as_json: Json = False) -> None:
    """List what can be chosen by name: built in or brought by plug-ins."""
    from cl_platform import catalogue, plugins

    plugins.load(plugin)
    warn_of_broken_plugins()
    wanted = None
    if kind is not None:
        words = {plural.replace(" ", "_"): single for single, plural in catalogue.PLURALS.items()}
        words |= {single.replace(" ", "_"): single for single in catalogue.PLURALS}
        asked = kind.replace(" ", "_").replace("-", "_")
        if asked not in words:
            raise unknown_name("kind", kind, words)
        wanted = words[asked]
    shown = [entry for entry in catalogue.entries(choice_file) if wanted in (None, entry.kind)]
    if as_json:
        facts = [{"kind": e.kind, "name": e.name, "summary": e.summary, "origin": e.origin} for e in shown]
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    _print(shown)


def _print(shown: list) -> None:  # type: ignore[type-arg]
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cl_platform.catalogue import PLURALS

    console = Console(highlight=False)
    width = max((len(entry.name) for entry in shown), default=0)
    for kind, plural in PLURALS.items():
        own = [entry for entry in shown if entry.kind == kind]
        if not own:
            continue
        table = Table(
            box=None, show_header=False, pad_edge=False, title=plural, title_justify="left", title_style="bold"
        )
        table.add_column(width=width, no_wrap=True)
        table.add_column(overflow="fold")
        for entry in own:
            from_plugin = "" if entry.origin == "built in" else f" [{entry.origin}]"
            table.add_row(Text(entry.name), Text(entry.summary + from_plugin))
        console.print(table)
        console.print()


def choice_file(group: str, name: str) -> Path | None:
    """The configuration file of a built-in choice."""
    file = config_folder() / group / f"{name}.yaml"
    return file if file.is_file() else None
