"""Search in files for the first bytes of deleted tensors: weights are stored uncompressed, so a hit decides."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cl_platform.unlearning.canonical import Value, content, raw_bytes

LEAD = 64
"""Bytes that are searched for."""
LEAST = 16
"""Tensors with fewer bytes are not searched for: others may well begin alike."""
DISTINCT = 10
"""Different byte values that a lead must have, half of it not zero: zeros, ones and counts stand everywhere."""
CHUNK = 1 << 22


@dataclass(frozen=True)
class Hit:
    """A deleted tensor that a file still holds.

    Attributes:
        path: of the file, relative to the folder that was searched.
        name: of the tensor.
        how: ``bytes``, or ``name`` where a safetensors file has an entry of that name.
    """

    path: str
    name: str
    how: str


def leads(state: Mapping[str, Value]) -> dict[str, bytes]:
    """First bytes of each tensor, to be taken before anything is forgotten; only these are fetched.

    Args:
        state: full name -> tensor.
    """
    return {name: _lead(value) for name, value in state.items()}


def _lead(value: Value) -> bytes:
    if not isinstance(value, torch.Tensor):
        return bytes(content(value)[:LEAD])
    flat = value.detach()
    if not flat.is_contiguous():
        flat = flat.contiguous()
    return bytes(raw_bytes(flat.reshape(-1)[: LEAD // flat.element_size()]))


def needles(before: Mapping[str, bytes], after: Mapping[str, Value]) -> dict[str, bytes]:
    """What to search for: leads of tensors that are gone or changed, as far as they can tell them from others.

    Args:
        before: what :func:`leads` gave.
        after: the learnt state now; what it still holds is no trace.
    """
    now = leads(after)
    kept = set(now.values())
    gone = {name: lead for name, lead in before.items() if now.get(name) != lead and lead not in kept}
    return {name: lead for name, lead in gone.items() if _telling_apart(lead)}


def _telling_apart(lead: bytes) -> bool:
    return len(lead) >= LEAST and len(set(lead)) >= DISTINCT and 2 * lead.count(0) <= len(lead)


def scan_for(needles: Mapping[str, bytes], folder: Path, without: Collection[str] = ()) -> list[Hit]:
    """Files below a folder that hold one of the needles, or an entry of that name in a safetensors file.

    A file is read once, in pieces, whatever the number of needles. Compressed and encrypted copies are not found.

    Args:
        needles: name -> bytes, from :func:`needles`.
        folder: searched with all folders in it; links are not followed.
        without: paths relative to it that are passed over, folders with all they hold.
    """
    hits = []
    for path in files_below(folder):
        relative = path.relative_to(folder).as_posix()
        if any(relative == skipped or relative.startswith(f"{skipped}/") for skipped in without):
            continue
        hits += [Hit(relative, name, "bytes") for name in found_in(path, needles)]
        if path.suffix == ".safetensors":
            known = {hit.name for hit in hits if hit.path == relative}
            hits += [Hit(relative, name, "name") for name in names_in(path) if name in needles and name not in known]
    return hits


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder in the order of names; links as such, never what they lead to."""
    for root, folders, names in os.walk(folder, followlinks=False):
        folders.sort()
        linked = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in sorted([*names, *linked]):
            yield Path(root) / name


def found_in(path: Path, needles: Mapping[str, bytes]) -> list[str]:
    """Names of the needles that a file holds."""
    if not needles or path.is_symlink() or not path.is_file():
        return []
    search = _Search(needles)
    overlap = max(map(len, needles.values())) - 1
    with open(path, "rb") as file:
        tail = b""
        while block := file.read(CHUNK):
            search.feed(tail + block)
            tail = (tail + block)[-overlap:]
    return [name for name, lead in needles.items() if lead in search.found]


def names_in(path: Path) -> list[str]:
    """Entries of a safetensors file, read from its header; none for a file that is damaged."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > os.fstat(file.fileno()).st_size:
                return []
            header = json.loads(file.read(length))
    except (OSError, ValueError, struct.error):
        return []
    return [name for name in header if name != "__metadata__"] if isinstance(header, dict) else []


class _Search:
    """All needles at once: a table of pairs of bytes leaves few places to compare.

    The pair is taken where the bytes of a needle are rarest among the needles, so that zeros make no candidates.
    """

    def __init__(self, needles: Mapping[str, bytes]) -> None:
        self.found: set[bytes] = set()
        self._by_pair: dict[int, list[tuple[int, bytes]]] = {}
        for lead in set(needles.values()):
            offset = _rare_pair(lead)
            self._by_pair.setdefault(lead[offset] | lead[offset + 1] << 8, []).append((offset, lead))
        self._table = np.zeros(1 << 16, dtype=bool)
        self._table[list(self._by_pair)] = True

    def feed(self, block: bytes) -> None:
        """Look into a piece; pieces must overlap by the longest needle less one byte."""
        if len(block) < 2:
            return
        data = np.frombuffer(block, dtype=np.uint8)
        pairs = data[:-1].astype(np.uint16) | data[1:].astype(np.uint16) << np.uint16(8)
        for place in np.flatnonzero(self._table[pairs]).tolist():
            for offset, lead in self._by_pair[int(pairs[place])]:
                if place >= offset and block.startswith(lead, place - offset):
                    self.found.add(lead)


def _rare_pair(lead: bytes) -> int:
    """Where a needle has two neighbouring bytes that are not common in weights."""
    common = {0x00, 0xFF, 0x3F, 0x40, 0xBF, 0x3C, 0x3D, 0x3E, 0xBC, 0xBD, 0xBE}
    scores = ((sum(byte in common for byte in lead[i : i + 2]), i) for i in range(len(lead) - 1))
    return min(scores)[1]


def report(hits: Iterable[Hit]) -> str:
    """Hits as one line: the files, and how many tensors each still holds."""
    by_path: dict[str, int] = {}
    for hit in hits:
        by_path[hit.path] = by_path.get(hit.path, 0) + 1
    return ", ".join(f"{path} ({count} tensors)" for path, count in sorted(by_path.items()))
