"""``cl-platform extend RUN scenario=image_folder scenario.path=more``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cl_platform.cli.compose import compose, groups
from cl_platform.cli.resume import Json, Run, carried_on
from cl_platform.errors import UserError

GROUPS = ("scenario", "data")
OF_THE_RUN = (
    "setting", "online", "image_size", "augment", "augment_scale", "test_transform", "interpolation", "boundaries",
)  # fmt: skip
"""Keys of ``scenario`` that hold for all tasks of a run: how images are made and how tasks are told apart."""
OF_ITS_DATA: dict[str, Any] = {"skip_tasks": [], "domains": None}
"""Keys of ``scenario`` that mean certain tasks of the run, and what they are for others."""


def _choices(incomplete: str) -> list[str]:
    return [word for name in groups()["scenario"] if (word := f"scenario={name}").startswith(incomplete)]


Words = Annotated[
    list[str] | None,
    typer.Argument(
        help="scenario=NAME, scenario.KEY=VALUE, data.KEY=VALUE.",
        metavar="KEY=VALUE...",
        show_default=False,
        autocompletion=_choices,
    ),
]


def extend(run: Run, words: Words = None, as_json: Json = False) -> int:
    """Learn more tasks on a finished run, in its folder.

    The words choose the data of the new tasks; all else stays as in the run.

    New tasks get ids and classes of their own behind those that are there.
    Where all tasks of a run have the same classes, new ones must bring these.

    Example: cl-platform extend RUN scenario.path=more scenario.num_tasks=2
    """
    from cl_platform import continuing
    from cl_platform.run_folder import read_config

    extension = extension_of(read_config(run), words or [], run)
    return carried_on(run, lambda: continuing.extend(run, extension), as_json)


def extension_of(raw: Mapping[str, Any], words: Sequence[str], run: Path) -> dict[str, Any]:
    """The groups ``scenario`` and ``data`` of the tasks to add, resolved.

    Without ``scenario=NAME`` the run's own scenario is taken, with the keys that are named changed.

    Args:
        raw: the run's configuration.
        words: the command line's.
        run: its folder, for messages.

    Raises:
        UserError: a key that cannot be chosen here, an unknown one, or none at all.
    """
    if not words:
        todo = "Name their data, such as scenario=image_folder scenario.path=FOLDER scenario.num_tasks=2"
        raise UserError("extend", run, "nothing says which tasks are to be learnt", todo)
    named = {_key(word): word.partition("=")[2] for word in words}
    own = dict(raw.get("scenario") or {})
    start = [] if "scenario" in named else [f"scenario={own.get('kind')}"]
    plugins = raw.get("plugins") or []
    listed = [plugins] if isinstance(plugins, str) else list(plugins)
    made = compose([*start, *words, *([f"plugins=[{','.join(map(_quoted, listed))}]"] if listed else [])])
    scenario = dict(made["scenario"])
    if "scenario" not in named:
        kept = {**own, **OF_ITS_DATA, "class_order": _order(own)}
        scenario = {**kept, **{key: scenario[key] for key in scenario if f"scenario.{key}" in named}}
    else:
        scenario |= {key: own[key] for key in ("validation_share",) if key in own and f"scenario.{key}" not in named}
    scenario |= {key: own[key] for key in OF_THE_RUN if key in own}
    data = dict(raw.get("data") or {}) | {key: made["data"][key] for key in made["data"] if f"data.{key}" in named}
    return {"scenario": scenario, "data": data}


def _key(word: str) -> str:
    """The key of a word, if it may be chosen for new tasks."""
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(word, "", "is no KEY=VALUE", "Write scenario.KEY=VALUE or data.KEY=VALUE")
    group, _, name = key.partition(".")
    if group not in GROUPS or key == "data":
        raise UserError(
            key, value, "stays as it is in the run; only scenario and data are chosen for new tasks",
            "Leave it out, or train a new run",
        )  # fmt: skip
    if group == "scenario" and name in OF_THE_RUN:
        raise UserError(key, value, "holds for all tasks of a run and stays as it is", "Leave it out")
    if key == "scenario.skip_tasks":
        raise UserError(key, value, "names tasks of a whole scenario", "Leave it out; all tasks of it are learnt")
    if key == "scenario.kind":
        raise UserError(key, value, "is chosen by its group", f"Write scenario={value}")
    return key


def _order(scenario: Mapping[str, Any]) -> Any:
    """The run's order of classes where it is a rule; a list of classes holds for its own data only."""
    order = scenario.get("class_order", "natural")
    is_rule = isinstance(order, int) or (
        isinstance(order, str) and order.partition(":")[0] in ("natural", "coda", "pilot")
    )
    return order if is_rule or (isinstance(order, str) and order.isdigit()) else "natural"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
