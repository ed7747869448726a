"""What can be chosen by name, and what is to be known of it before it is chosen."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_platform import plugins, registry
from cl_platform.config import choices_of, defaults_of
from cl_platform.errors import UserError, nearest

PLURALS = {
    "strategy": "strategies",
    "scenario": "scenarios",
    "backbone": "backbones",
    "unlearning method": "unlearning methods",
    "metric": "metrics",
    "buffer policy": "buffer policies",
}
"""What several of a kind are called, in the order in which they are listed."""

Files = Callable[[str, str], Path | None]
"""The configuration file of a choice, from its group and name."""


@dataclass(frozen=True)
class Entry:
    """Something that can be chosen by its name.

    Attributes:
        kind: such as ``strategy``.
        name: what is typed.
        summary: one line about it.
        origin: ``built in``, or the plug-in that brings it.
    """

    kind: str
    name: str
    summary: str
    origin: str


def entries(files: Files) -> list[Entry]:
    """Everything that can be chosen, by kind and name.

    Args:
        files: finds the configuration file of a built-in choice, whose first comment is its summary.
    """
    plugins.register_built_in()
    brought = _sources()
    made = []
    for kind in registry.KINDS:
        for name in kind.names():
            summary = _summary(kind, name, files)
            made.append(Entry(kind.kind, name, summary, brought.get((kind.kind, name), "built in")))
    made.extend(_metrics())
    return sorted(made, key=lambda entry: (list(PLURALS).index(entry.kind), entry.name))


def _sources() -> dict[tuple[str, str], str]:
    """(kind, name) of what plug-ins bring -> the plug-in."""
    return {pair: plugin.source for plugin in plugins.report() for pair in plugin.brings}


def _metrics() -> Iterator[Entry]:
    from cl_platform.metrics.built_in import DIAGNOSTICS
    from cl_platform.metrics.definitions import DEFINITIONS

    for known in (*DEFINITIONS, *DIAGNOSTICS.values()):
        yield Entry("metric", known.key, known.text, "built in")


def _summary(kind: registry.Registry, name: str, files: Files) -> str:
    file = files(kind.group, name) if kind.group is not None else None
    if kind is registry.strategies and file is not None:
        return _first_line(sys.modules[kind.get(name).__module__])  # it names the paper
    if file is not None:
        comments = re.findall(r"^# (?!@package)(.*)$", file.read_text(encoding="utf-8"), re.M)
        return re.sub(rf"^{kind.group}={re.escape(name)}: ", "", comments[0]) if comments else ""
    return _first_line(kind.get(name))


def _first_line(thing: Any) -> str:
    """The first line of a docstring, that of the function behind a partial one."""
    thing = thing.func if isinstance(thing, functools.partial) else thing
    return next(iter((inspect.getdoc(thing) or "").splitlines()), "")


def found(name: str, kinds: str | None = None) -> registry.Registry:
    """The kind in which ``name`` is registered.

    Args:
        name: what is looked for.
        kinds: the kind, where several have the name.

    Raises:
        UserError: nothing is called so (with the nearest names), or several things are.
    """
    plugins.register_built_in()
    plugins.load_installed()
    having = [kind for kind in registry.KINDS if name in kind and kinds in (None, kind.kind)]
    if not having:
        known = {other for kind in registry.KINDS for other in kind.names()}
        near = nearest(name, known)
        todo = f"Did you mean {' or '.join(near)}" if near else "See cl-platform list"
        raise UserError("NAME", name, "nothing that can be chosen is called so", todo)
    if len(having) > 1:
        listed = ", ".join(kind.kind for kind in having)
        raise UserError("name", name, f"is a {listed}", f"Add --kind '{having[0].kind}'")
    return having[0]


def describe(kind: registry.Registry, name: str, files: Files) -> dict[str, Any]:
    """What is to be known of a choice, as plain JSON.

    Args:
        kind: where it is registered.
        name: its name there.
        files: as for :func:`entries`.
    """
    thing = kind.get(name)
    facts: dict[str, Any] = {
        "kind": kind.kind,
        "name": name,
        "choose": _chosen_by(kind, name),
        "summary": _summary(kind, name, files),
        "about": _about(thing),
        "origin": _sources().get((kind.kind, name), "built in"),
        "defined": registry.origin(thing),
        "parameters": parameters(kind, name, files),
    }
    if kind is registry.strategies:
        facts |= strategy_facts(name)
    return facts


def _chosen_by(kind: registry.Registry, name: str) -> str:
    if kind.group is not None:
        return f"{kind.group}={name}"
    return f"strategy.er.buffer.policy={name}" if kind is registry.buffer_policies else f"in metrics.json as {name}"


def _about(thing: Any) -> str:
    """The docstring's prose: without arguments and attributes, code marks or links."""
    thing = thing.func if isinstance(thing, functools.partial) else thing
    text = (inspect.getdoc(thing) or "").partition("\nArgs:")[0].partition("\nAttributes:")[0].partition("\nRaises:")[0]
    text = re.sub(r":\w+:`~?([^`]*)`", lambda match: match.group(1).rpartition(".")[2], text)
    paragraphs = re.split(r"\n\s*\n", text.replace("``", "").strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def parameters(kind: registry.Registry, name: str, files: Files) -> list[dict[str, Any]]:
    """Keys of a choice: full name, default, what it is, and what it may be."""
    config = kind.config(name)
    if kind.group is None or (config is None and kind is not registry.scenarios and kind is not registry.backbones):
        return []
    prefix = {"strategy": f"strategy.{name}", "unlearning": f"unlearning.{name}"}.get(kind.group, kind.group)
    if config is None:
        config = _shared(kind)
    recommended = dict(plugins.choices(kind.group).get(name, {})) or _yaml(files(kind.group, name))
    recommended = recommended.get(name, {}) if kind is registry.unlearning_methods else recommended
    return list(_keys(config, prefix, {**defaults_of(config), **recommended}))


def _shared(kind: registry.Registry) -> type:
    from cl_platform.backbones import BackboneConfig
    from cl_platform.scenarios import ScenarioConfig

    return ScenarioConfig if kind is registry.scenarios else BackboneConfig


def _yaml(file: Path | None) -> dict[str, Any]:
    import yaml

    return {} if file is None else yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _keys(config: type, prefix: str, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    hints = typing.get_type_hints(config)
    named = dict(zip(defaults_of(config), [f for f in dataclasses.fields(config) if f.init], strict=True))
    for key, value in values.items():
        field = named.get(key)
        full = f"{prefix}.{key}"
        if field is None:  # the optimizer that a strategy recommends
            inner = value.items() if isinstance(value, Mapping) else ()
            yield from ({"key": f"{key}.{k}", "default": v, "doc": "recommended", "choices": None} for k, v in inner)
        elif dataclasses.is_dataclass(_inner(hints[field.name])) and isinstance(value, Mapping):
            yield from _keys(_inner(hints[field.name]), full, value)
        else:
            choices = choices_of(field.metadata)
            doc = field.metadata.get("doc") or ""
            yield {"key": full, "default": value, "doc": doc, "choices": None if choices is None else list(choices)}


def _inner(hint: Any) -> Any:
    """The dataclass in a hint such as ``Config | None``, else the hint."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)), hint)
    return hint


# -- strategies -------------------------------------------------------------------------------------------------------


def strategy_facts(name: str) -> dict[str, Any]:
    """What a strategy needs, owns, forgets and stores."""
    cls = registry.strategies.get(name)
    try:
        made = cls(cls.Config())
    except (TypeError, UserError):  # a key without a default
        made = cls
    return {
        "needs": list(_needs(cls)),
        "owns": sorted(cls.owns),
        "stands": _stands(cls),
        "forgetting": _forgetting(made),
        "memory": first_task_bytes(name),
    }


def _needs(cls: Any) -> Iterator[str]:
    if cls.needs.prompts:
        yield "a vision transformer that takes prompts"
    if cls.needs.boundaries:
        yield "to be told where a task ends"
    if cls.needs.buffer:
        yield "a strategy with a replay buffer beside it"
    if cls.needs.teacher:
        yield "a copy of the learner before the task"
    if not cls.needs.gradient:
        yield "no gradient steps: it learns in closed form"


def _stands(cls: Any) -> str:
    if cls.needs.alone:
        return "alone"
    if cls.encloses:
        return "before the strategies that it encloses"
    return "beside others" if not cls.needs.buffer else "behind a strategy with a replay buffer"


def _forgetting(made: Any) -> dict[str, Any]:
    from cl_platform.strategies.base import LEAKS

    shared = "trainable" not in made.owns and made.needs.gradient
    leaks = sorted(made.leaks | ({"L-01"} if shared else set()))
    return {
        "drop": "exact" if not leaks else "approximate",
        "leaks": {leak: LEAKS[leak] for leak in leaks},
        "rollback": "exact, relearns the tasks after it",
        "holds_temporarily": bool(made.holds_temporarily),
    }


def first_task_bytes(name: str) -> dict[str, Any]:
    """Bytes of the strategy's own state once the first of two-class tasks has begun on ``vit_nano``.

    Returns:
        ``components`` by kind and ``note``; ``None`` in place of the first where the strategy cannot stand there alone.
        A buffer counts as full, with images of 32 pixels.
    """
    from cl_platform.backbones import BackboneConfig
    from cl_platform.building import build_learner
    from cl_platform.memory.columns import bytes_per_slot
    from cl_platform.run_config import parse
    from cl_platform.scenarios import build_stream

    values = dict(plugins.choices("strategy").get(name, {}))
    cls = registry.strategies.get(name)
    if cls.needs.buffer or cls.encloses:
        return {"components": None, "note": "depends on the strategies beside it"}
    raw = {
        "strategy": {name: values},
        "scenario": {"kind": "split_digits"},
        "backbone": defaults_of(BackboneConfig) | {"kind": "vit_nano"},
    }
    try:
        config = parse(raw)
        stream = build_stream(config.scenario, config.data, config.seed)
        learner = build_learner(config, stream)
        learner.begin_task(stream.tasks[0], 1)
    except (UserError, ImportError) as error:
        return {"components": None, "note": str(error)}
    sizes: dict[str, int] = {}
    for component in learner.composition.components():
        size = sum(t.numel() * t.element_size() for t in component.tensors.values())
        sizes[component.kind] = sizes.get(component.kind, 0) + size
    buffer = getattr(registry.strategies.get(name).Config(), "buffer", None)
    if buffer is not None:
        sizes["buffer"] = buffer.size * bytes_per_slot((3, 32, 32), registry.buffer_policies.get(buffer.policy).keyed)
    sizes.pop("bookkeeping", None)
    trained = learner.trainable_parameters()
    note = f"in its first task of two classes on vit_nano, which trains {trained:,} parameters"
    return {"components": {kind: size for kind, size in sorted(sizes.items()) if size}, "note": note}
