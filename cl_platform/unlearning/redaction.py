"""Files of a run without what they say about a task's images one by one, or about its classes."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_platform.run_folder import to_json

REMOVED = "[a line about a forgotten task was removed on request]"


@dataclass(frozen=True)
class Subject:
    """The task that a run folder is purged of.

    Attributes:
        task_id: its id.
        position: its place in the stream.
        class_ids: its classes.
        own_class_ids: those of them that no task has that is kept; records of shared classes are about the others too.
        class_names: names of its own classes.
    """

    task_id: int
    position: int
    class_ids: tuple[int, ...]
    own_class_ids: tuple[int, ...]
    class_names: tuple[str, ...] = ()


def stream_facts(text: str, subject: Subject) -> str:
    """``stream.json`` without the names of the task's own classes, the task marked as forgotten."""
    content = json.loads(text)
    gone = set(subject.own_class_ids)
    content["class_names"] = [None if c in gone else name for c, name in enumerate(content["class_names"])]
    for task in content["tasks"]:
        task["forgotten"] = task["forgotten"] or task["task_id"] == subject.task_id
    return to_json(content)


def confusion(text: str, subject: Subject) -> str:
    """``confusion.json`` without rows and columns of the task's own classes."""
    content = json.loads(text)
    for record in content.get("after", []):
        _without_classes(record, set(subject.own_class_ids))
    return to_json(content)


def _without_classes(record: dict[str, Any], gone: set[int]) -> None:
    kept = [place for place, c in enumerate(record["classes"]) if c not in gone]
    for name in ("classes", "class_names"):
        if name in record:
            record[name] = [record[name][place] for place in kept]
    record["counts"] = [[record["counts"][row][column] for column in kept] for row in kept]


def metrics(text: str, subject: Subject) -> str:
    """``metrics.json`` without values of the task's own classes."""
    gone = {str(c) for c in subject.own_class_ids}
    content = json.loads(text)
    for entry in content.values():
        if isinstance(entry, dict) and isinstance(entry.get("per_class"), dict):
            entry["per_class"] = {c: value for c, value in entry["per_class"].items() if c not in gone}
    return to_json(content)


def features(content: bytes, subject: Subject) -> bytes:
    """``representation.safetensors`` without the features of the task's images.

    Raises:
        ValueError: no safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    try:
        held = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return save({name: tensor for name, tensor in held.items() if name != str(subject.position)})


def log_lines(text: str, subject: Subject) -> str:
    """``run.log`` without lines that name one of the task's classes; too many go rather than too few."""
    names = [re.escape(name) for name in subject.class_names if not name.isdigit() and len(name) > 1]
    if not names:
        return text
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(names)})(?!\w)", re.IGNORECASE)
    lines = text.splitlines(keepends=True)
    return "".join(f"{REMOVED}\n" if pattern.search(line) else line for line in lines)


def columns(text: str, subject: Subject) -> str:
    """``csv/metrics.csv`` without columns about one of the task's own classes."""
    import csv
    import io

    try:
        rows = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if not rows:
        return text
    about = about_class(subject)
    kept = [place for place, name in enumerate(rows[0]) if not about(name)]
    if len(kept) == len(rows[0]):
        return text
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerows([row[place] for place in kept if place < len(row)] for row in rows)
    return made.getvalue()


def about_class(subject: Subject) -> Callable[[str], bool]:
    """Whether a logger's tag is about one of the task's own classes: ``recall/class_07``, ``recall/otter``."""
    names = {name.casefold() for name in subject.class_names if not name.isdigit()}
    ids = set(subject.own_class_ids)

    def about(tag: str) -> bool:
        for part in tag.split("/"):
            match = re.fullmatch(r"class_0*(\d+)", part)
            if part.casefold() in names or (match is not None and int(match.group(1)) in ids):
                return True
        return False

    return about


# -- TensorBoard -----------------------------------------------------------------------------------------------------


def events(source: Path, subject: Subject) -> bytes | None:
    """A TensorBoard file without images, which show every task at once, and without tags of the task's own classes.

    A record that was only half written goes as well.

    Returns:
        Its new content; ``None`` if nothing of that was in it.

    Raises:
        ValueError: a record that is no event.
    """
    about = about_class(subject)
    kept: list[bytes] = []
    changed = False
    for whole, body in _event_records(source):
        if body is None:
            changed = True
            continue
        event = _event(body)
        gone = [value for value in event.summary.value if _is_image(value) or about(value.tag)]
        if not gone:
            kept.append(whole)
            continue
        changed = True
        for value in gone:
            event.summary.value.remove(value)
        if event.summary.value:
            kept.append(_framed(event.SerializeToString()))
    return b"".join(kept) if changed else None


def image_tags(source: Path) -> list[str]:
    """Tags of the images in a TensorBoard file, each once, in order."""
    found: dict[str, None] = {}
    for _, body in _event_records(source):
        if body is not None:
            found.update({value.tag: None for value in _event(body).summary.value if _is_image(value)})
    return list(found)


def _event(body: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        return Event.FromString(body)
    except DecodeError as error:
        raise ValueError(str(error)) from error


def _is_image(value: Any) -> bool:
    return bool(value.HasField("image")) or value.metadata.plugin_data.plugin_name == "images"


def _event_records(source: Path) -> Iterator[tuple[bytes, bytes | None]]:
    """Each record as it stands and its content; a torn last one has none."""
    left = source.stat().st_size
    with open(source, "rb") as file:
        while head := file.read(12):
            left -= len(head)
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else left
            if length + 4 > left:
                yield head, None
                return
            rest = file.read(length + 4)
            left -= len(rest)
            yield head + rest, rest[:length]


def _framed(content: bytes) -> bytes:
    import io

    from tensorboard.summary.writer.record_writer import RecordWriter

    made = io.BytesIO()
    RecordWriter(made).write(content)
    return made.getvalue()


# -- the rest of a checkpoint ----------------------------------------------------------------------------------------


def about_images(state: Mapping[str, Any], subject: Subject) -> list[str]:
    """Places in a checkpoint's ``state.json`` that still tell about the task's images or own classes one by one.

    Args:
        state: content of the file.
        subject: the forgotten task.
    """
    found = []
    results = state.get("results") or {}
    gone = set(subject.own_class_ids)
    for space, matrix in (results.get("matrices") or {}).items():
        if gone & {int(c) for c in matrix.get("per_class", {})}:
            found.append(f"results.matrices.{space}.per_class")
    diagnostics = results.get("diagnostics") or {}
    answers = diagnostics.get("answers") or {}
    if isinstance(answers, Mapping) and answers.get(str(subject.task_id)):
        found.append("results.diagnostics.answers")
    if any(gone & set(record["classes"]) for record in diagnostics.get("after", [])):
        found.append("results.diagnostics.after")
    return found


def shared_classes(classes: Mapping[int, Collection[int]], task_id: int, forgotten: Collection[int]) -> set[int]:
    """Classes of a task that a kept task has as well.

    Args:
        classes: task id -> class ids, of all tasks of the stream.
        task_id: the task to be forgotten.
        forgotten: ids of tasks forgotten before.
    """
    others = {c for other, ids in classes.items() if other != task_id and other not in forgotten for c in ids}
    return set(classes[task_id]) & others
