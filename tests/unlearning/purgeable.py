"""A run folder as four tasks of a class-incremental run leave it, written by hand, and the request to forget task 1."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save

from cl_platform.metrics.counts import AccuracyMatrix
from cl_platform.run_folder import to_json
from cl_platform.unlearning import certificate as certificates
from cl_platform.unlearning import journal as journals
from cl_platform.unlearning.audit import AuditLog
from cl_platform.unlearning.canonical import fingerprint
from cl_platform.unlearning.purge import Subject, plan_purge
from cl_platform.unlearning.scan import leads, needles

NAMES = ("grebe", "heron", "otter", "beaver", "lynx", "marten", "trout", "perch")
SUBJECT = Subject(1, 1, (2, 3), (2, 3), ("otter", "beaver"))
HOST = "blue-host"
EVENTS = f"tensorboard/events.out.tfevents.1700000000.{HOST}.77.0"
LEFT_OVER = "checkpoints/.task_2.old/model.safetensors"


def state_after(position: int) -> dict[str, torch.Tensor]:
    """Learnt state after a task: a part for each task, one that all share, and some that are alike everywhere."""
    made: dict[str, torch.Tensor] = {}
    for task in range(position + 1):
        draws = torch.Generator().manual_seed(task)
        made[f"prompt.{task}"] = torch.randn(5, 8, generator=draws)
        made[f"head.{task}.weight"] = torch.randn(2, 8, generator=draws)
        made[f"head.{task}.bias"] = torch.zeros(32)
        made[f"seen.{task}"] = torch.tensor([2 * task, 2 * task + 1])
    made["scale"] = torch.linspace(0.1, 0.9, 32)
    return made


def forgotten_state() -> dict[str, torch.Tensor]:
    """The newest state without what belongs to task 1."""
    return {name: tensor for name, tensor in state_after(3).items() if ".1" not in name}


def rest_of_state(position: int, forgotten: bool = False) -> dict:
    matrix = AccuracyMatrix("cil", [0, 1, 2, 3])
    for task in range(position + 1):
        matrix.append_row(
            task, dict.fromkeys(range(task + 1), (3, 4)), per_class=dict.fromkeys(range(2 * task + 2), (2, 2))
        )
    answers = {str(task): [2 * task] * 4 for task in range(position + 1)}
    if forgotten:
        matrix.forget(1, (2, 3))
        answers.pop("1")
    diagnostics = {"after": [] if forgotten else confusion(position)["after"], "answers": answers}
    results = {"matrices": {"cil": matrix.to_dict()}, "diagnostics": diagnostics}
    gone = [{"task_id": 1, "in_place": True}] if forgotten else []
    return {"learnt": list(range(position + 1)), "results": results, "forgotten": gone}


def confusion(position: int) -> dict:
    after = []
    for task in range(position + 1):
        classes = list(range(2 * task + 2))
        counts = [[10 * row + column for column in classes] for row in classes]
        record = {"position": task, "task_id": task, "classes": classes, "class_names": list(NAMES[: len(classes)])}
        after.append({**record, "counts": counts})
    return {"space": "cil", "after": after}


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_run(run: Path, tensorboard: bool = False) -> Path:
    for position in range(4):
        blob = save(state_after(position))
        state = {"position": position, "model_sha256": hashlib.sha256(blob).hexdigest(), **rest_of_state(position)}
        write(run / f"checkpoints/task_{position}/model.safetensors", blob)
        write(run / f"checkpoints/task_{position}/state.json", to_json(state))
    write(run / LEFT_OVER, save(state_after(2)))
    write(run / "config.yaml", "seed: 0\n")
    write(run / "environment.json", to_json({"dataset": {"tasks": [{"task_id": 1, "classes": [2, 3], "train": 60}]}}))
    write(run / "accuracy_matrix.csv", "after_task,task_0,task_1\n0,0.5,NaN\n")
    write(run / "continual_eval.csv", "global_step,position\n")
    write(run / "cost.json", to_json({"updates": 4}))
    write(run / "confusion.json", to_json(confusion(3)))
    recall = {"id": "1.17", "value": 0.5, "per_class": {str(c): 0.5 for c in range(8)}}
    write(run / "metrics.json", to_json({"tasks": [0, 1, 2, 3], "recall": recall, "acc": {"per_task": [1, 1, 1, 1]}}))
    features = {str(p): torch.randn(4, 3, generator=torch.Generator().manual_seed(p)) for p in range(4)}
    write(run / "representation.safetensors", save(features))
    write(run / "run.log", "12:00 INFO started\n12:01 WARNING no image of otter\n12:02 INFO after task 1: 75 %\n")
    write(run / "csv/metrics.csv", "step,recall/class_02,recall/class_04,accuracy/task_01\n1,0.1,0.2,0.3\n")
    write(run / "fpf_sensitivity.csv", "module,entries\n")
    write(run / "report.html", "<p>otter</p>")
    write(run / "figures/confusion.svg", "<svg>otter</svg>")
    write(run / "figures/confusion.png", b"png")
    write(run / "notes.txt", "written by somebody\n")
    write(run / "old" / "best.bin", b"header" + save(state_after(2)))
    if tensorboard:
        write_events(run)
    return run


def write_events(run: Path) -> None:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run / "tensorboard"))
    writer.add_scalar("accuracy/task_01", 0.5, 1)
    writer.add_image("confusion/after_task_01", np.full((8, 8, 3), 130, np.uint8), 1, dataformats="HWC")
    writer.add_scalar("recall/otter", 0.5, 1)
    writer.add_scalar("recall/class_05", 0.5, 1)
    writer.close()
    (made,) = (run / "tensorboard").glob("events*")
    made.rename(run / EVENTS)


def opened(run: Path) -> tuple[journals.Journal, AuditLog, list]:
    """The request, planned and on disk; nothing of the run was touched yet."""
    journal = journals.begin(run, {"task_id": 1, "method": "drop"})
    log = AuditLog(run / "unlearning/audit.jsonl", NAMES)
    log.append("request_opened", {"method": "drop", "task_id": 1}, journal.request_id)
    before, after = state_after(3), forgotten_state()
    seen = certificates.look_at(before, journal.salt)
    owners = {name: ("prompt", (int(name.split(".")[1]),)) if "." in name else ("shared", (0,)) for name in before}
    journal.stage_checkpoint(3, after, rest_of_state(3, forgotten=True))
    actions = plan_purge(journal, SUBJECT, needles(leads(before), after))
    entries = certificates.component_entries(seen, after, owners)
    journal.commit(actions, certificate_draft(journal, entries), names=NAMES)
    return journal, log, actions


def certificate_draft(journal: journals.Journal, entries: list) -> dict:
    return certificates.draft(
        request_id=journal.request_id,
        created_utc=journal.created_utc,
        run=certificates.Run("0" * 64, "1.0", None, "split_wild", ("s_prompt",)),
        target=certificates.Target(1, (2, 3), 60, 0, "command"),
        method=certificates.Method("auto", "drop", "no kept component has seen the task"),
        level="E-bit",
        lineage="verified",
        leaks=(),
        fingerprint=fingerprint(),
        components=entries,
        cost=certificates.Cost(0.1),
    )


def tree(run: Path) -> dict[str, bytes]:
    """Every file but those of the proof."""
    found = {p.relative_to(run).as_posix(): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    return {path: content for path, content in found.items() if not path.startswith("unlearning/")}


def audit_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "unlearning/audit.jsonl").read_bytes().splitlines()]
