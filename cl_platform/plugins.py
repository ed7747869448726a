"""Code of others: found as installed packages or named as files, loaded, and offered like what is built in.

A plug-in is a Python module whose import registers objects (:mod:`cl_platform.registry`). An installed package names it
in the entry point group ``cl_platform.plugins``; a file or module of one's own is named by ``plugins=[./mine.py]``. A
module may say for which version of the contract it was written, as ``CL_PLATFORM_API = 1`` on a line of its own.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from cl_platform import registry
from cl_platform.config import defaults_of
from cl_platform.errors import UserError

GROUP = "cl_platform.plugins"
API = 1
"""Version of the contract; raised when plug-ins written for it have to be changed."""

BUILT_IN = (
    "cl_platform.strategies", "cl_platform.scenarios", "cl_platform.backbones", "cl_platform.unlearning.approximate",
    "cl_platform.memory.build",
)  # fmt: skip


@dataclass(frozen=True)
class Plugin:
    """A plug-in that was found.

    Attributes:
        name: of its entry point, or its file or module as the user named it.
        source: the package and its version, or the file.
        brings: (kind, name) of everything that it registered.
        problem: why nothing of it can be used; ``None`` if all went well.
    """

    name: str
    source: str
    brings: tuple[tuple[str, str], ...] = ()
    problem: str | None = None

    @property
    def line(self) -> str:
        """What a user is told of one that cannot be used."""
        return f"plug-in {self.name} ({self.source}) is left out: {self.problem}"


_found: dict[str, Plugin] = {}  # what this process has imported; an import cannot be taken back either
_choices: dict[str, dict[str, dict[str, Any]]] = {}


def load_installed() -> list[Plugin]:
    """Load the plug-ins of all installed packages that were not loaded yet; one that fails stops nothing.

    Returns:
        all of them, broken ones included.
    """
    loaded = []
    for point in _points(tuple(sys.path)):
        package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
        key = f"{package}: {point.name}"
        if key not in _found:
            _found[key] = _tried(point, package)
        loaded.append(_found[key])
    return loaded


@functools.cache
def _points(places: tuple[str, ...]) -> list[importlib.metadata.EntryPoint]:
    """The entry points of all packages in some places; reading them takes long enough to be done once."""
    return sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))


def _tried(point: importlib.metadata.EntryPoint, package: str) -> Plugin:
    before = _registered()
    try:
        _check_api(importlib.util.find_spec(point.module))
        made = point.load()
        if callable(made):  # a function that registers
            made()
        return _taken(point.name, package, before)
    except UserError as error:
        problem = str(error)
    except (Exception, SystemExit) as error:
        problem = _cause(error)
    _undo(before)
    return Plugin(point.name, package, problem=problem.rstrip("."))


def load(named: Any) -> list[Plugin]:
    """Load what the key ``plugins`` names: files (``./mine.py``) and modules (``package.module``).

    Raises:
        UserError: no such file or module, one whose import fails, one for another version, or a name that is taken.
    """
    if named is None or named == "":
        return []
    if not isinstance(named, (str, list, tuple)) or not all(isinstance(entry, str) for entry in named):
        raise UserError("plugins", named, "must be a list of files or modules", "Write plugins=[./mine.py]")
    return [_load_one(entry) for entry in ([named] if isinstance(named, str) else named)]


def _load_one(entry: str) -> Plugin:
    is_file = _is_file(entry)
    path = Path(entry).expanduser().resolve()
    key = str(path) if is_file else entry
    if key in _found:
        return _found[key]
    if is_file and not path.is_file():
        raise UserError("plugins", entry, "there is no such file", "Write plugins=[./mine.py], from this folder")
    name = f"cl_platform_plugin_{path.stem}_{hashlib.sha256(key.encode()).hexdigest()[:8]}" if is_file else entry
    before = _registered()
    try:
        spec = importlib.util.spec_from_file_location(name, path) if is_file else importlib.util.find_spec(name)
        if spec is None:
            raise UserError("plugins", entry, "there is no such module", "Write plugins=[./mine.py] for a file")
        _check_api(spec)
        if is_file:
            _execute(spec)
        else:
            importlib.import_module(name)
        plugin = _taken(entry, key, before)
        if not plugin.brings:
            raise UserError(
                "plugins", entry, "registers nothing",
                "Put @cl_platform.registry.strategies.register('NAME') above a class of it",
            )  # fmt: skip
    except UserError:
        _undo(before)
        raise
    except (Exception, SystemExit) as error:
        _undo(before)
        raise UserError("plugins", entry, f"cannot be imported, {_cause(error)}", "Mend it, or leave it out") from error
    _found[key] = plugin
    return plugin


def _execute(spec: Any) -> ModuleType:
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _check_api(spec: Any) -> None:
    """Refuse a module written for another version of the contract, before it is imported.

    Raises:
        UserError: it says another version than this one.
    """
    source = getattr(spec, "origin", None)
    if not source or not source.endswith(".py"):
        return
    try:
        tree = ast.parse(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return  # the import will say it better
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if getattr(target, "id", None) == "CL_PLATFORM_API" and isinstance(value, ast.Constant):
            said = value.value
            if said != API:
                older = isinstance(said, int) and said < API
                raise UserError(
                    "CL_PLATFORM_API", said, f"is written for another version of the contract, here it is {API}",
                    "Update the plug-in" if older else "Update cl-platform",
                )  # fmt: skip


def _cause(error: BaseException) -> str:
    """An error as one line, with the line of the plug-in that is to blame, as far as can be told."""
    trace = error.__traceback__
    place = ""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if (
            "importlib" not in file
            and not file.startswith("<frozen")
            and Path(file).resolve() != Path(__file__).resolve()
        ):
            place = f" in line {trace.tb_lineno} of {Path(file).name}"
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} in line {error.lineno} of {Path(error.filename or '?').name}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def register_built_in() -> None:
    """Import all modules that register something."""
    for module in BUILT_IN:
        importlib.import_module(module)


def _registered() -> list[tuple[dict[str, Any], ...]]:
    """What is registered by now, all that is built in included: a clash is then the plug-in's."""
    register_built_in()
    return [kind.state() for kind in registry.KINDS]


def _undo(before: Sequence[tuple[dict[str, Any], ...]]) -> None:
    for kind, state in zip(registry.KINDS, before, strict=True):
        kind.put_back(state)


def _taken(name: str, source: str, before: Sequence[tuple[dict[str, Any], ...]]) -> Plugin:
    """Offer what was registered since ``before`` as choices of the command line."""
    new = [
        (kind, entry)
        for kind, state in zip(registry.KINDS, before, strict=True)
        for entry in kind.names()
        if entry not in state[0]
    ]
    from cl_platform.metrics.built_in import definition

    for kind, entry in new:
        if kind is registry.metrics and definition(entry) is not None:
            raise UserError("metric", entry, "is built in", "Rename the plug-in's")
    made = {(kind.group, entry): _defaults(kind, entry) for kind, entry in new if kind.group is not None}
    for (group, entry), values in made.items():
        assert group is not None
        _choices.setdefault(group, {})[entry] = values
        _tell_hydra(group, entry, values)
    return Plugin(name, source, tuple((kind.kind, entry) for kind, entry in new))


def offer(kind: registry.Registry, name: str) -> None:
    """Offer a registered object as a choice of its group, such as a class that a script or a notebook defines."""
    if kind.group is not None:
        values = _defaults(kind, name)
        _choices.setdefault(kind.group, {})[name] = values
        _tell_hydra(kind.group, name, values)


def _defaults(kind: registry.Registry, name: str) -> dict[str, Any]:
    """Keys and values of a choice: those of its dataclass, and over them those that were registered.

    Raises:
        UserError: a yaml file that cannot be read.
    """
    config, given = kind.config(name), kind.defaults(name)
    values = defaults_of(config) if config is not None else _plain(kind)
    if isinstance(given, (str, Path)):
        given = _file(kind, name, given)
    values = {**values, **(given or {})}
    if kind.group in ("scenario", "backbone"):
        values["kind"] = name
    if kind.group == "unlearning":
        return {"method": f"approximate:{name}", name: values}
    return values


def _plain(kind: registry.Registry) -> dict[str, Any]:
    """The keys of a kind whose objects share one dataclass."""
    if kind.group == "scenario":
        from cl_platform.scenarios import ScenarioConfig

        return defaults_of(ScenarioConfig)
    if kind.group == "backbone":
        from cl_platform.backbones import BackboneConfig

        return defaults_of(BackboneConfig)
    return {}


def _file(kind: registry.Registry, name: str, given: str | Path) -> dict[str, Any]:
    import yaml

    module = sys.modules.get(getattr(kind.get(name), "__module__", ""))
    path = Path(getattr(module, "__file__", None) or ".").parent / given
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = f"the defaults of {kind.kind} {name} cannot be read ({' '.join(str(error).split())})"
        raise UserError("plugins", path, reason, "Mend the file") from error
    if not isinstance(values, dict):
        raise UserError("plugins", path, f"the defaults of {kind.kind} {name} must be keys and values", "Mend the file")
    return values


def _tell_hydra(group: str, name: str, values: Mapping[str, Any]) -> None:
    from hydra.core.config_store import ConfigStore

    node: dict[str, Any] = dict(values)
    if group == "unlearning":
        node = {"defaults": ["default", "_self_"], **node}
    ConfigStore.instance().store(
        name=name, node=node, group=group, package=f"strategy.{name}" if group == "strategy" else None,
        provider="a plug-in",
    )  # fmt: skip


def choices(group: str) -> Mapping[str, Mapping[str, Any]]:
    """What loaded plug-ins offer in a configuration group: name -> keys and their default values."""
    return _choices.get(group, {})


def report() -> list[Plugin]:
    """Everything that was loaded or tried by now, installed packages first looked through."""
    load_installed()
    return list(_found.values())


def absolute(named: str | list[str]) -> list[str]:
    """What the key ``plugins`` names, files by their whole path, so that a run finds them again from any folder."""
    entries = [named] if isinstance(named, str) else named
    return [str(Path(e).expanduser().resolve()) if _is_file(e) else e for e in entries if e]


def _is_file(entry: str) -> bool:
    return entry.endswith(".py") or "/" in entry


def named_in(words: Sequence[str]) -> list[str]:
    """The value of ``plugins=`` among a command line's words, read before the configuration is composed.

    Raises:
        UserError: it cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    word = next((word for word in reversed(words) if word.lstrip("+").startswith("plugins=")), None)
    if word is None:
        return []
    try:
        value = OverridesParser.create().parse_override(word).value()
    except OverrideParseException as error:
        raise UserError("plugins", word.partition("=")[2], "cannot be read", "Write plugins=[./mine.py]") from error
    plain = value if isinstance(value, list) else [value]
    return [str(entry) for entry in plain if entry is not None]
