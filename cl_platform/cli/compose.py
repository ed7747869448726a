"""From the command line to a resolved configuration, with every refusal turned into one line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_platform import plugins
from cl_platform.errors import UserError, nearest, unknown_name

LISTS = ("strategy", "logger")
"""Groups of which several choices can be taken at once."""


def config_folder() -> Path:
    """The ``conf`` folder: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def groups() -> dict[str, list[str]]:
    """Configuration groups and their choices, those of loaded plug-ins included."""
    root = config_folder()
    return {
        folder.name: sorted({*(file.stem for file in folder.glob("*.yaml")), *plugins.choices(folder.name)})
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


def choice_values(group: str, choice: str) -> dict[str, Any]:
    """Keys and values of a choice, as its file or its plug-in has them."""
    import yaml

    brought = plugins.choices(group)
    if choice in brought:
        return dict(brought[choice])
    return yaml.safe_load((config_folder() / group / f"{choice}.yaml").read_text(encoding="utf-8")) or {}


def load_plugins(words: Sequence[str]) -> None:
    """Load installed plug-ins and those that ``plugins=`` names.

    Raises:
        UserError: a named one cannot be loaded.
    """
    plugins.load_installed()
    plugins.load(plugins.named_in(words))


def check_choices(overrides: Sequence[str]) -> None:
    """Refuse unknown choices and groups before Hydra composes, with the nearest names.

    Raises:
        UserError: a choice that its group does not have, no choice, or the same one twice in a list.
    """
    known = groups()
    for override in overrides:
        name, _, value = override.partition("=")
        if not name.strip():
            raise UserError(override, "", "is no KEY=VALUE", "See python train.py --help")
        group = name.lstrip("+~").partition("@")[0]
        if group not in known or "=" not in override or "(" in value:  # a sweep's function, such as glob(*)
            continue
        choices = [choice for choice in re.split(r"[\[\],\s]+", value.strip("'\"")) if choice]
        if not choices and not (group in LISTS and "[" in value):
            raise UserError(
                f"{group}=", "", f"needs a choice; known are {', '.join(known[group])}", "Write one of them"
            )
        for members in re.findall(r"\[([^\[\]]*)\]", value):
            listed = [member.strip() for member in members.split(",")]
            twice = next((member for member in listed if listed.count(member) > 1), None)
            if twice:
                raise UserError(group, f"[{members}]", f"names {twice} more than once", "Name it once")
        for choice in choices:
            if choice == "null" and group != "experiment":
                none = f"Write {group}=[]" if group == "logger" else "Choose one of them"
                raise UserError(group, choice, f"needs a choice; known are {', '.join(known[group])}", none)
            if choice not in known[group] and choice != "null":
                raise unknown_name(group, choice, known[group])


def explain(error: Exception, overrides: Sequence[str], known_keys: Sequence[str] = ()) -> UserError:
    """Hydra's refusal as one of ours.

    Args:
        error: what composing raised.
        overrides: the command line's words.
        known_keys: full names of all keys, for the nearest one.
    """
    from hydra.errors import OverrideParseException

    text = " ".join(str(error).split()).partition(" See https://")[0]
    missing = re.search(r"Could not override '([^']+)'", text)
    if missing:
        return _unknown_key(missing.group(1), overrides, known_keys)
    if "nterpolation" in text:
        name, _, value = next((o for o in overrides if "${" in o), "").partition("=")
        reason = text.partition(" full_key")[0][:120].rstrip(".")
        return UserError(name, value, f"cannot be resolved ({reason})", "Put an existing key into ${...}")
    if "hydra/launcher" in text:
        launcher = next((o.partition("=")[2] for o in overrides if o.startswith("hydra/launcher=")), "")
        return UserError(
            "hydra/launcher", launcher, "is not installed", "Run pip install 'cl-platform[sweep]' for joblib"
        )
    if "Ambiguous value" in text:
        listed = next(
            (o for o in overrides if "," in o.partition("=")[2] and not o.partition("=")[2].startswith("[")), ""
        )
        name, _, value = listed.partition("=")
        return UserError(name, value, "several values need a sweep", "Add -m, or write one list as KEY=[A,B]")
    bad = getattr(error, "override", None) or next(
        (o for o in overrides if o in text), overrides[0] if overrides else ""
    )
    name, _, value = bad.partition("=")
    if "=" not in bad:
        return UserError(name, "", "is no KEY=VALUE", "See python train.py --help")
    if isinstance(error, OverrideParseException):
        return UserError(
            name,
            value,
            "cannot be read; a bracket or a quote is left open, or a sign needs quotes",
            f"Write {name}=VALUE, and a text with signs other than letters and digits as '{name}=\"{value}\"'",
        )
    return UserError(name, value, text[:200].rstrip("."), f"Write {name}=VALUE, see python train.py --help")


def _unknown_key(key: str, overrides: Sequence[str], known_keys: Sequence[str]) -> UserError:
    """What is wrong with a key that the composed configuration does not have."""
    given = next((o.partition("=")[2] for o in overrides if o.lstrip("+~").startswith(f"{key}=")), None)
    group, _, rest = key.partition(".")
    choice = rest.partition(".")[0]
    if group in LISTS:
        if members := members_of(group, choice):
            inner = [f"{group}.{member}.{rest.partition('.')[2]}" for member in members]
            meant = next((k for k in inner if k in known_keys), None)
            todo = f"Did you mean {meant}" if meant else f"Set keys of {' or '.join(members)}"
            return UserError(key, given, f"{choice} is another name for {group}=[{','.join(members)}]", todo)
        if choice in groups()[group] and not any(k.startswith(f"{group}.{choice}.") for k in known_keys):
            return UserError(key, given, f"{choice} is not chosen in this run", f"Add {group}={choice}")
    elif others := _choices_with(group, rest):
        todo = f"Add {group}={others[0]}" if len(others) == 1 else "Choose one of them"
        return UserError(key, given, f"is a key of {group}={' or '.join(others)}, not of what is chosen here", todo)
    if key.startswith("trainer.lightning."):
        return UserError(key, given, "a key for lightning.Trainer is added with a plus", f"Write +{key}={given}")
    near = nearest(key, [k for k in known_keys if "." in k or "." not in key], 1)
    return UserError(key, given, "unknown key", f"Did you mean {near[0]}" if near else "See python train.py --help")


def members_of(group: str, choice: str) -> list[str]:
    """The choices for which ``choice`` is another name, in order; none where it is one itself."""
    return list(choice_values(group, choice).get("defaults", ())) if choice in groups()[group] else []


def _choices_with(group: str, key: str) -> list[str]:
    """Choices of a group whose files hold a key."""
    return [choice for choice in groups().get(group, []) if key in flat_keys(choice_values(group, choice))]


def flat_keys(values: Any, prefix: str = "") -> list[str]:
    """Full names of all keys of a nested mapping."""
    if not isinstance(values, dict):
        return [prefix]
    inner = [flat_keys(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in values.items()]
    return [name for names in inner for name in names] + ([prefix] if prefix else [])


def sweep_runs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run that ``-m`` makes of some, in the order in which they are run.

    Words for Hydra itself, such as a launcher, are left out.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = [word for word in overrides if not word.lstrip("+~").startswith(("hydra.", "hydra/"))]
    with initialize_config_dir(str(config_folder()), version_base="1.3"):  # it knows the choices behind glob(*)
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    each = []
    for override in parser.parse_overrides(words):
        swept = override.is_sweep_override() and override.is_discrete_sweep()
        name = override.get_key_element()
        each.append([f"{name}={v}" for v in override.sweep_string_iterator()] if swept else [str(override.input_line)])
    return [list(run) for run in itertools.product(*each)]


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration for some overrides, as plain Python values.

    Raises:
        UserError: an unknown choice or key, or a plug-in that cannot be loaded.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    load_plugins(overrides)
    check_choices(overrides)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            cfg = hydra_compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            chosen = [o for o in overrides if o.partition("=")[0] in groups()]
            keys = flat_keys(OmegaConf.to_container(hydra_compose("config", overrides=chosen), resolve=False))
            raise explain(error, overrides, keys) from error
    return settled(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


def settled(raw: dict[str, Any]) -> dict[str, Any]:
    """The configuration with ``for_strategy``'s values where the named strategy is among the chosen ones.

    A key that was given another value than its strategy's file has keeps that one.

    Raises:
        UserError: a name that no strategy has.
    """
    wishes, chosen = raw.get("for_strategy") or {}, raw.get("strategy")
    rest = {key: value for key, value in raw.items() if key != "for_strategy"}
    if isinstance(rest.get("plugins"), (str, list)):
        rest["plugins"] = plugins.absolute(rest["plugins"])
    if not isinstance(wishes, dict):
        raise UserError("for_strategy", wishes, "must be a group of keys", "Write for_strategy.NAME.KEY=VALUE")
    for name, keys in wishes.items():
        if name not in groups()["strategy"]:
            raise unknown_name("for_strategy", name, groups()["strategy"])
        if isinstance(chosen, dict) and isinstance(chosen.get(name), dict):
            chosen = {**chosen, name: _unless_changed(chosen[name], choice_values("strategy", name), keys)}
    return {**rest, "strategy": chosen} if "strategy" in raw else rest


def _unless_changed(values: dict[str, Any], defaults: dict[str, Any], wishes: Any) -> dict[str, Any]:
    """``values`` with those of ``wishes`` whose keys still have their default, group by group."""
    result = dict(values)
    for key, wish in (wishes or {}).items():
        here, default = values.get(key), defaults.get(key)
        if isinstance(wish, dict) and isinstance(here, dict):
            result[key] = _unless_changed(here, default or {}, wish)
        elif here == default:
            result[key] = wish
    return result
