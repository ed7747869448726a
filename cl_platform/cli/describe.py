"""``cl-platform describe NAME``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cl_platform.cli.compose import groups, members_of
from cl_platform.cli.listing import choice_file
from cl_platform.cli.talk import warn_of_broken_plugins
from cl_platform.errors import UserError, as_typed

if TYPE_CHECKING:
    from rich.table import Table

Name = Annotated[str, typer.Argument(help="Of a strategy, scenario, backbone, ...", metavar="NAME", show_default=False)]
Kind = Annotated[str | None, typer.Option("--kind", help="Where several kinds have the name: which one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plugins = Annotated[list[str] | None, typer.Option("--plugin", help="Also load this file or module.")]


def describe(name: Name, kind: Kind = None, plugin: Plugins = None, as_json: Json = False) -> None:
    """Say what something is: its paper, its keys, what it stores, and how exactly it can forget."""
    from cl_platform import catalogue, plugins

    plugins.load(plugin)
    warn_of_broken_plugins()
    if name in groups()["strategy"] and (members := members_of("strategy", name)):
        raise UserError(
            "NAME", name, f"is another name for strategy=[{','.join(members)}]", f"Describe {' and '.join(members)}"
        )
    facts = catalogue.describe(catalogue.found(name, kind), name, choice_file)
    if as_json:
        typer.echo(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        _print(facts)


def _print(facts: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(f"{facts['kind']} {facts['name']}", style="bold", markup=False)
    for text in (facts["summary"], facts["about"] if facts["about"] != facts["summary"] else ""):
        if text:
            console.print(Padding(Text(text), (0, 0, 0, 2)))
    lines = [("choose it by", facts["choose"]), ("comes from", f"{facts['origin']}: {facts['defined']}")]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for title, text in [*lines, *_strategy_lines(facts)]:
        grid.add_row(Text(title), Text(text))
    console.print()
    console.print(grid)
    if facts["parameters"]:
        console.print()
        console.print(_keys(facts["parameters"]))


def _keys(keys: Sequence[Mapping[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    prefix = str(keys[0]["key"]).rpartition(".")[0] + "."
    table = Table(box=None, pad_edge=False, title=f"keys, {prefix}KEY=VALUE", title_justify="left", title_style="bold")
    table.add_column("key", no_wrap=True)
    table.add_column("default", overflow="fold", max_width=20)
    table.add_column("what it is", overflow="fold")
    for key in keys:
        among = f" ({', '.join(map(str, key['choices']))})" if key["choices"] else ""
        table.add_row(Text(key["key"].removeprefix(prefix)), Text(as_typed(key["default"])), Text(key["doc"] + among))
    return table


def _strategy_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "forgetting" not in facts:
        return []
    forgetting, memory = facts["forgetting"], facts["memory"]
    through = "; ".join(f"{leak} {text}" for leak, text in forgetting["leaks"].items())
    drop = "a task's parts can be dropped, exactly" if not through else f"dropping a task leaves {through}"
    stored = memory["components"]
    amounts = ", ".join(f"{kind} {_amount(size)}" for kind, size in stored.items()) if stored else "nothing"
    lines = [
        ("needs", "; ".join(facts["needs"]) or "nothing"),
        ("owns", ", ".join(facts["owns"]) or "nothing"),
        ("stands", facts["stands"]),
        ("forgets", f"{drop}; rolling back is exact and relearns the tasks after it"),
        ("stores", f"{amounts}, {memory['note']}" if stored is not None else memory["note"]),
    ]
    if forgetting["holds_temporarily"]:
        lines.insert(4, ("", "can hold a task until further notice (instruction T)"))
    return lines


def _amount(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000 or unit == "MB":
            return f"{size:.3g} {unit}"
        size /= 1000
    return ""
