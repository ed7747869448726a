"""Where a run goes, and what it can go on from."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, cast

from cl_platform import registry
from cl_platform.config import typed
from cl_platform.errors import UserError
from cl_platform.run_config import RunConfig, parse
from cl_platform.run_folder import Checkpoint, checkpoints, latest_run, new_run_path

ASIDE = ("strategy", "run_dir", "resume", "debug", "output_root", "logger", "data", "report", "raw", "given", "bare")
"""Fields of the configuration that change nothing of what a run computes, or are compared apart."""

log = logging.getLogger("cl_platform")


def locate(config: RunConfig) -> tuple[Path, Checkpoint | None]:
    """The run folder and, when resuming, the checkpoint to go on from.

    Raises:
        UserError: a folder that holds a run already, no run where one is named, or a run of another configuration.
    """
    root = Path(config.output_root)
    given = Path(str(config.run_dir)) if config.run_dir is not None and config.run_dir != "" else None
    if config.resume is None:
        if given is not None and (given / "config.yaml").exists():
            raise UserError("run_dir", given, "holds a run already", "Add resume=auto, or choose another folder")
        return given or new_run_path(root, config.scenario_name, config.strategy_name), None
    if config.resume != "auto":
        if isinstance(config.resume, bool) or config.resume == "":
            key = "resume" if config.resume != "" else "resume="
            raise UserError(key, config.resume, "must be auto, null or a run folder", "Write resume=auto")
        given = Path(str(config.resume))
        if not given.is_dir():
            raise UserError("resume", given, "there is no such run folder", "Write resume=auto or a run folder")
    path = given or latest_run(root, config.scenario_name, config.strategy_name)
    if path is None or not (path / "config.yaml").exists():
        if config.resume == "auto":
            where = path or root / config.scenario_name / config.strategy_name
            log.info("resume=auto: there is no run in %s to go on with, a new one starts", where)
            return path or new_run_path(root, config.scenario_name, config.strategy_name), None
        raise UserError("resume", path, "holds no run", "Write resume=auto or a run folder")
    _same_configuration(config, path)
    checkpoint = next(checkpoints(path), None)
    if checkpoint is None:
        log.info("resume=%s: no task of the run in %s was finished, it starts anew", config.resume, path)
    return path, checkpoint


def _same_configuration(config: RunConfig, path: Path) -> None:
    import yaml

    import cl_platform.strategies  # noqa: F401  # registers them

    raw = yaml.safe_load((path / "config.yaml").read_text())
    try:
        before = _settings(parse(raw))
    except UserError as error:
        reason = f"the run was started with {error.key}={error.value}, which this version does not take"
        raise UserError("resume", path, reason, "Start a new run, or use the version that began it") from error
    now = _settings(config)
    if before["extensions"] and not now["extensions"]:
        todo = f"Go on with it by python -m cl_platform resume {path}"
        raise UserError("resume", path, "tasks were added to the run since it was started", todo)
    for key in sorted(set(before) | set(now)):
        if before.get(key) != now.get(key):
            name = _first_difference(key, before.get(key), now.get(key))
            raise UserError("resume", path, f"the run was started with another {name}", "Use the same configuration")


def _settings(config: RunConfig) -> dict[str, Any]:
    """What decides the numbers of a run, keys that its version did not know yet at their defaults."""
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ASIDE}
    plain = {name: dataclasses.asdict(cast(Any, v)) if dataclasses.is_dataclass(v) else v for name, v in own.items()}
    strategy = {}
    for name, keys in config.strategy.items():
        taken = {key: value for key, value in keys.items() if key != "optimizer"}  # a recommendation for that group
        strategy[name] = dataclasses.asdict(typed(registry.strategies.get(name).Config, taken, f"strategy.{name}"))
    plain |= {"strategy": strategy, "order of strategies": list(strategy)}
    plain["unlearning"] = {"sequence": config.unlearning.sequence}  # requests may come later; this is what was learnt
    return {**plain, "trainer": {**plain["trainer"], "progress": None}}  # shows something, changes nothing


def _first_difference(key: str, one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in [*one, *other]:
            if one.get(name) != other.get(name):
                return _first_difference(f"{key}.{name}", one.get(name), other.get(name))
    return key
