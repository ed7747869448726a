"""The reference of a run that forgot: the same run on a stream that never held the forgotten tasks."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cl_platform.errors import UserError
from cl_platform.files import write_atomically
from cl_platform.run_folder import checkpoints, read_config, to_json
from cl_platform.unlearning.audit import AuditLog
from cl_platform.unlearning.canonical import canonical_json
from cl_platform.unlearning.sequence import parse

Train = Callable[[dict[str, Any], Path], None]
"""Trains a resolved configuration into a folder, or goes on with what is there."""

SILENT = (
    "run_dir", "resume", "debug", "output_root", "logger", "report", "diagnostics", "unlearning", "plugins", "sweep",
)  # fmt: skip
"""Keys that change nothing that is learnt."""
NOTE = "reference.json"
NUMERICS = ("threads", "cpu_capability", "deterministic", "float32_matmul_precision")


@dataclass(frozen=True)
class Price:
    """What a training costs, as far as the run's own ``cost.json`` tells.

    Attributes:
        steps: optimizer updates.
        images: training images, each epoch anew.
        seconds: on the machine of the run.
    """

    steps: float | None = None
    images: float | None = None
    seconds: float | None = None

    def times(self, factor: float) -> Price:
        """As much of it."""
        return Price(*(None if part is None else factor * part for part in (self.steps, self.images, self.seconds)))

    def __str__(self) -> str:
        shown = [("steps", self.steps), ("images", self.images), ("s", self.seconds)]
        known = [f"{round(value):,} {unit}" for unit, value in shown if value is not None]
        return "about " + ", ".join(known) if known else "unknown, the run has no cost.json"


@dataclass(frozen=True)
class Reference:
    """A run that never learnt the forgotten tasks.

    Attributes:
        folder: its run folder.
        config_sha256: digest of all of its configuration that could change what is learnt.
        fingerprint: the numerics it was trained under, as far as they are known.
        cached: it was there already.
        given: it was named by the user.
        seed: of its run.
    """

    folder: Path
    config_sha256: str
    fingerprint: Mapping[str, Any]
    cached: bool
    given: bool
    seed: int


# -- configuration --------------------------------------------------------------------------------------------------


def skipped_by(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids of the tasks that a configuration leaves out, ascending."""
    return tuple(sorted({int(task_id) for task_id in (config.get("scenario") or {}).get("skip_tasks") or ()}))


def reference_config(config: Mapping[str, Any], forgotten: Iterable[int], seed: int | None = None) -> dict[str, Any]:
    """The configuration of the run that never learnt ``forgotten``.

    What only watches (evaluation while learning, loggers, the report) is off: it changes nothing that is learnt. A
    sequence of instructions stays, without a word about the tasks left out.

    Args:
        config: resolved configuration of the run that forgot.
        forgotten: ids of all tasks that it forgot.
        seed: another seed than the run's.
    """
    made = copy.deepcopy({key: value for key, value in config.items() if key not in ("unlearning", "sweep")})
    gone = sorted({*skipped_by(config), *map(int, forgotten)})
    made["scenario"] = {**(made.get("scenario") or {}), "skip_tasks": gone}
    made["evaluation"] = {**(made.get("evaluation") or {}), "grid": "off"}
    made["report"] = {**(made.get("report") or {}), "html": False}
    made["diagnostics"] = {**(made.get("diagnostics") or {}), "gradients": "off", "representation": False}
    made["logger"], made["resume"] = {}, "auto"
    sequence = _sequence(config)
    if sequence is not None:
        made["unlearning"] = {"sequence": str(parse(sequence).without(gone))}
    if seed is not None:
        made["seed"] = int(seed)
    return made


def _sequence(config: Mapping[str, Any]) -> str | None:
    given = (config.get("unlearning") or {}).get("sequence")
    return None if given is None else str(given)


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of all of a configuration that could change what is learnt."""
    return hashlib.sha256(canonical_json(_spelt(_learning(config)))).hexdigest()


def _learning(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: copy.deepcopy(value) for key, value in config.items() if key not in SILENT}
    evaluation = kept.get("evaluation") or {}
    kept["evaluation"] = {"cache_bytes": evaluation.get("cache_bytes")}  # decides which features are kept
    kept["trainer"] = {key: value for key, value in (kept.get("trainer") or {}).items() if key != "progress"}
    kept["data"] = {key: value for key, value in (kept.get("data") or {}).items() if key == "skip_corrupt"}
    kept["scenario"] = {**(kept.get("scenario") or {}), "skip_tasks": list(skipped_by(config))}
    kept["sequence"] = _sequence(config)
    return kept


def _spelt(value: Any) -> Any:
    """Floats as text: canonical JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): _spelt(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelt(item) for item in value]
    return repr(value) if isinstance(value, float) else value


# -- price ----------------------------------------------------------------------------------------------------------


def price_of(run: Path, left_out: Iterable[int]) -> Price:
    """What training without some tasks costs, by the run's own cost and the tasks' training images."""
    cost, tasks = read_json(run / "cost.json"), (read_json(run / "environment.json").get("dataset") or {}).get("tasks")
    share = 1.0
    if isinstance(tasks, list) and tasks:
        gone = set(left_out)
        total = sum(int(task.get("train", 0)) for task in tasks)
        kept = sum(int(task.get("train", 0)) for task in tasks if task.get("task_id") not in gone)
        share = kept / total if total else 1.0
    return Price(*(cost.get(key) for key in ("updates", "images_trained", "seconds_total"))).times(share)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no readable file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# -- cache ----------------------------------------------------------------------------------------------------------


def cache_root(config: Mapping[str, Any]) -> Path:
    """Where references are kept: beside the runs, under the run's output root."""
    return Path(str(config.get("output_root") or "outputs")) / "references"


def cached_folder(config: Mapping[str, Any], fingerprint: Mapping[str, Any], sources: Mapping[str, str]) -> Path:
    """Folder of the reference of a configuration: its name depends on all that decides the bytes.

    Args:
        config: made by :func:`reference_config`.
        fingerprint: numerics of this machine.
        sources: digests of the data and the weights that the reference itself is made from, and what stands for the
            code. A run that forgot by relearning has another stream than before, its reference has not.
    """
    key = {"config": config_sha256(config), "fingerprint": dict(fingerprint), "sources": dict(sources)}
    return cache_root(config) / hashlib.sha256(canonical_json(_spelt(key))).hexdigest()[:16]


def owner_of(log: AuditLog) -> str:
    """What stands for a run in the notes of the cache, wherever its folder is moved: its first audit entry."""
    entries = log.entries()
    return str(entries[0]["hash"])[:16] if entries else ""


def remove_stale(config: Mapping[str, Any], forgotten: Iterable[int], owner: str) -> list[str]:
    """Delete a run's cached references that have learnt one of the tasks forgotten since; the names of their folders.

    One that other runs use as well stays for them.

    Args:
        config: of the run.
        forgotten: ids of all tasks that it forgot.
        owner: stands for the run, see :func:`owner_of`.
    """
    gone, names = set(forgotten), []
    for folder in sorted(cache_root(config).glob("*")):
        note = read_json(folder / NOTE)
        owners = [name for name in note.get("owners", ()) if name != owner]
        if len(owners) == len(note.get("owners", ())) or gone <= set(note.get("skip_tasks", ())):
            continue
        if owners:
            write_atomically(folder / NOTE, to_json({**note, "owners": owners}))
        else:
            shutil.rmtree(folder)
            names.append(folder.name)
    return names


@dataclass(frozen=True)
class Maker:
    """Makes the references of one run.

    Attributes:
        run: folder of the run that forgot.
        config: its configuration.
        forgotten: ids of all tasks that it forgot, ascending.
        fingerprint: numerics of this machine.
        train: trains a configuration into a folder.
        sources: from what a configuration would be trained here, see :func:`cached_folder`.
        say: prints a line.
        owner: stands for the run in the notes of the cache, wherever its folder is moved.
    """

    run: Path
    config: Mapping[str, Any]
    forgotten: tuple[int, ...]
    fingerprint: Mapping[str, Any]
    train: Train
    sources: Callable[[Mapping[str, Any]], Mapping[str, str]]
    say: Callable[[str], None]
    owner: str

    def obtain(self, seed: int | None = None) -> Reference:
        """The reference, from the cache or trained now; its price is said before.

        Args:
            seed: another seed than the run's.
        """
        made = reference_config(self.config, self.forgotten, seed)
        folder = cached_folder(made, self.fingerprint, self.sources(made))
        made["run_dir"] = str(folder)
        found = Reference(folder, config_sha256(made), self.fingerprint, True, False, int(made.get("seed") or 0))
        note = read_json(folder / NOTE)
        of_seed = "" if seed is None else f" of seed {seed}"
        if note.get("config_sha256") == found.config_sha256 and _whole(folder):
            self.say(f"reference{of_seed}: from the cache, {folder}")
            self._note(folder, made, found, note.get("owners", ()))
            return found
        left_out = f"task{'s' if len(self.forgotten) > 1 else ''} {', '.join(map(str, self.forgotten))}"
        price = price_of(self.run, self.forgotten)
        self.say(f"reference{of_seed}: a run without {left_out} is trained, {price}")
        self.train(made, folder)
        self._note(folder, made, found, ())
        return replace(found, cached=False)

    def _note(self, folder: Path, made: Mapping[str, Any], found: Reference, owners: Iterable[str]) -> None:
        note = {
            "schema": "cl_platform/reference/1",
            "config_sha256": found.config_sha256,
            "skip_tasks": list(skipped_by(made)),
            "fingerprint": dict(self.fingerprint),
            "owners": sorted({*owners, self.owner}),
        }
        if note != read_json(folder / NOTE):
            write_atomically(folder / NOTE, to_json(note))


def _whole(folder: Path) -> bool:
    return (folder / "metrics.json").is_file() and next(checkpoints(folder), None) is not None


# -- given by the user ----------------------------------------------------------------------------------------------


def named(folder: Path, run: Path, config: Mapping[str, Any], forgotten: Iterable[int]) -> Reference:
    """A reference that the user names; whether its bytes are equal is then the verdict.

    Args:
        folder: a run folder.
        run: folder of the run that forgot.
        config: of the run that forgot.
        forgotten: ids of all tasks that it forgot.

    Raises:
        UserError: it is the run itself, no run, one that learnt a forgotten task, or one of another configuration.
    """
    if not folder.is_dir():
        raise UserError("--reference", folder, "there is no such folder", "Name a run folder, or leave it out")
    if folder.resolve() == run.resolve():
        raise UserError("--reference", folder, "is the run itself, which would equal anything", "Name another run")
    theirs = read_config(folder)
    gone = {*map(int, forgotten)}
    learnt = next(({*map(int, found.state.get("learnt", ()))} for found in checkpoints(folder)), None)
    if learnt is None:
        raise UserError("--reference", folder, "holds no finished task", "Train it first, or leave it out")
    held = sorted(gone & learnt) or sorted(gone - set(skipped_by(theirs)))
    if held:
        raise UserError(
            "--reference", folder, f"it has learnt task {held[0]} itself, so it is no reference",
            f"Name a run with scenario.skip_tasks=[{','.join(map(str, sorted(gone)))}], or leave it out",
        )  # fmt: skip
    seed = int(theirs.get("seed") or 0)
    mine = reference_config(config, {*gone, *skipped_by(theirs)}, seed)
    if config_sha256(mine) != config_sha256(theirs):
        raise UserError(
            "--reference", folder, "its configuration differs from the run's in more than seed and tasks left out",
            "Name a run with the same keys, or leave it out",
        )  # fmt: skip
    return Reference(folder, config_sha256(theirs), fingerprint_of(folder), True, True, seed)


def fingerprint_of(folder: Path) -> dict[str, Any]:
    """Numerics that a run folder says it was trained under, as far as it does."""
    noted = read_json(folder / NOTE).get("fingerprint")
    if isinstance(noted, dict):
        return noted
    environment = read_json(folder / "environment.json")
    versions, numerics = environment.get("versions") or {}, environment.get("numerics") or {}
    found = {name: versions.get(name) for name in ("torch", "numpy")} | {name: numerics.get(name) for name in NUMERICS}
    return {name: value for name, value in found.items() if value is not None}
