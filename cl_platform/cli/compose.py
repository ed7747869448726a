"""From the command line to a resolved configuration, with every refusal turned into one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError, nearest, unknown_name

LISTS = ("strategy", "logger")
"""Groups of which several choices can be taken at once."""


def config_folder() -> Path:
    """The ``conf`` folder: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def groups() -> dict[str, list[str]]:
    """Configuration groups and their choices."""
    root = config_folder()
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(root.iterdir())
        if folder.is_dir()
    }


def check_choices(overrides: Sequence[str]) -> None:
    """Refuse unknown choices and groups before Hydra composes, with the nearest names.

    Raises:
        UserError: a choice that its group does not have.
    """
    known = groups()
    for override in overrides:
        name, _, value = override.partition("=")
        group = name.lstrip("+~").partition("@")[0]
        if group not in known or "=" not in override or "(" in value:  # a sweep's function, such as glob(*)
            continue
        for choice in filter(None, re.split(r"[\[\],\s]+", value.strip("'\""))):
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
    text = " ".join(str(error).split()).partition(" See https://")[0]
    missing = re.search(r"Could not override '([^']+)'", text)
    if missing:
        key = missing.group(1)
        given = next((o.partition("=")[2] for o in overrides if o.lstrip("+~").startswith(f"{key}=")), None)
        group, _, rest = key.partition(".")
        choice = rest.partition(".")[0]
        if (
            group in LISTS
            and choice in groups()[group]
            and not any(k.startswith(f"{group}.{choice}.") for k in known_keys)
        ):
            return UserError(key, given, f"{choice} is not chosen in this run", f"Add {group}={choice}")
        if key.startswith("trainer.lightning."):
            return UserError(key, given, "a key for lightning.Trainer is added with a plus", f"Write +{key}={given}")
        near = nearest(key, [k for k in known_keys if "." in k or "." not in key], 1)
        return UserError(key, given, "unknown key", f"Did you mean {near[0]}" if near else "See python train.py --help")
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
    return UserError(
        name, value, text[:200].rstrip("."), f"Write {name}=VALUE; signs such as , = [ need '{name}=\"...\"'"
    )


def flat_keys(values: Any, prefix: str = "") -> list[str]:
    """Full names of all keys of a nested mapping."""
    if not isinstance(values, dict):
        return [prefix]
    inner = [flat_keys(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in values.items()]
    return [name for names in inner for name in names] + ([prefix] if prefix else [])


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration for some overrides, as plain Python values.

    Raises:
        UserError: an unknown choice or key.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_choices(overrides)
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            cfg = hydra_compose("config", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            chosen = [o for o in overrides if o.partition("=")[0] in groups()]
            keys = flat_keys(OmegaConf.to_container(hydra_compose("config", overrides=chosen), resolve=False))
            raise explain(error, overrides, keys) from error
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
