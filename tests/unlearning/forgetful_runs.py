"""Run folders of tiny learners that learnt three tasks of digits and forgot one, for verification to look at."""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from tiny import built, config_of, digits, learn, trainer_for

from cl_platform.learner import ContinualLearner
from cl_platform.run_folder import RunFolder, checkpoints
from cl_platform.scenarios import Stream
from cl_platform.unlearning import certificate as certificates
from cl_platform.unlearning import forgotten as records
from cl_platform.unlearning.audit import AuditLog, now_utc
from cl_platform.unlearning.canonical import fingerprint
from cl_platform.unlearning.lineage import learnt_state, owners
from cl_platform.unlearning.models import restored
from cl_platform.unlearning.verify import Workshop

TARGET = 1
Mutation = Callable[[ContinualLearner], None]


def drop(learner: ContinualLearner) -> None:
    learner.drop_task(TARGET)


def nothing(learner: ContinualLearner) -> None:
    """Says that it forgot."""


def raw_config(root: Path, strategy: str = "s_lora", seed: int = 0, skip: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "strategy": {strategy: {}},
        "scenario": {"kind": "split_digits", "skip_tasks": list(skip)},
        "trainer": {"max_epochs": 1, "progress": True},
        "optimizer": {"lr": 0.003},
        "seed": seed,
        "output_root": str(root / "outputs"),
    }


def stream_of(raw: Mapping[str, Any]) -> Stream:
    whole, gone = digits(3), set(raw["scenario"]["skip_tasks"])
    kept = [task for task in whole.tasks if task.task_id not in gone]
    tasks = tuple(dataclasses.replace(task, position=position) for position, task in enumerate(kept))
    return dataclasses.replace(whole, tasks=tasks, left_out=tuple(sorted(gone)))


def build(raw: Mapping[str, Any]) -> tuple[ContinualLearner, Stream]:
    (name,) = raw["strategy"]
    config, stream = config_of(name), stream_of(raw)
    learner = built(config, stream, raw["seed"])
    learner.trainer = trainer_for(config)
    return learner, stream


def train(raw: Mapping[str, Any], folder: Path) -> None:
    """What a run leaves, as far as verification reads it."""
    learner, stream = build(raw)
    (name,) = raw["strategy"]
    run = RunFolder(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(raw)))
    tasks = [{"task_id": task.task_id, "train": len(task.train)} for task in stream.tasks]
    environment = {"dataset": {"tasks": tasks, "digest": "d1"}, "git_commit": None}
    (folder / "environment.json").write_text(json.dumps(environment))
    for task in stream.tasks:
        learn(learner, config_of(name), [task])
        save(run, learner, task.position)
    (folder / "cost.json").write_text(json.dumps({"updates": 6, "images_trained": 48, "seconds_total": 3.0}))
    (folder / "metrics.json").write_text("{}")
    run.close()


def save(run: RunFolder, learner: ContinualLearner, position: int) -> None:
    state = {"learnt": learner.learnt, "backbone_frozen": learner.backbone.frozen}
    run.save_checkpoint(position, learner.learnt_state(), state)


def trained(root: Path, strategy: str = "s_lora", seed: int = 0, name: str = "run") -> Path:
    train(raw_config(root, strategy, seed), root / name)
    return root / name


def forget(
    run: Path,
    how: Mutation = drop,
    level: str = "E-bit",
    leaks: tuple[str, ...] = (),
    keep_older: bool = False,
    numerics: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Change the newest state of a run and certify it; what is certified need not be true.

    Args:
        run: its folder.
        how: what becomes of the learner.
        level: that is claimed.
        leaks: that are admitted.
        keep_older: leave the state before forgetting, and those before it, in the folder.
        numerics: fingerprint in place of this machine's.
    """
    raw = yaml.safe_load((run / "config.yaml").read_text())
    newest = next(checkpoints(run))
    learner = restored(raw, newest, build)
    salt = secrets.token_bytes(16)
    before, known = certificates.look_at(learnt_state(learner), salt), owners(learner)
    how(learner)
    learner.learnt = [task_id for task_id in learner.learnt if task_id != TARGET]
    folder = RunFolder(run)
    if not keep_older:
        folder.remove_checkpoints()
    save(folder, learner, newest.position + 1)
    folder.close()
    record = records.Record().with_entry(records.Forgotten(TARGET, "drop", level, 2, True))
    records.write(run, record)
    entries = certificates.component_entries(
        before, learnt_state(learner), {name: ("part", tasks) for name, tasks in known.items()}
    )
    task = digits(3).tasks[TARGET]
    draft = certificates.draft(
        request_id=secrets.token_hex(16),
        created_utc=now_utc(),
        run=certificates.Run("0" * 64, "0.1.0", None, "split_digits", tuple(raw["strategy"])),
        target=certificates.Target(TARGET, task.classes, len(task.train), 0, "command"),
        method=certificates.Method("auto", "approximate:ssd" if level == "approximate" else "drop", "it was asked for"),
        level=level,
        lineage="declared",
        leaks=leaks,
        fingerprint=dict(numerics or fingerprint()),
        components=entries,
        cost=certificates.Cost(0.25),
    )
    log = AuditLog(run / "unlearning" / "audit.jsonl")
    log.append("request_opened", {"method": "drop", "task_id": TARGET}, draft["request_id"])
    certificates.seal(certificates.closed(draft, []), run / "unlearning", log)
    return draft


def forget_in(run: Path, task_id: int, method: str) -> None:
    """A request by command, for shadow models."""
    assert task_id == TARGET
    forget(run)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


WORKSHOP = Workshop(build=build, train=train, forget=forget_in)
