"""Canonical bytes of a learnt state: digests of tensors, their root, and comparison byte by byte."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from cl_platform.errors import UserError

Value: TypeAlias = torch.Tensor | dict[str, Any] | list[Any] | str | int | float | bool | None
"""A piece of learnt state: a tensor, or a scalar or list that canonical JSON can write."""

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""Spelling of dtypes as in the header of a safetensors file."""

SHOWN = 20
"""Differences that a comparison names."""


def canonical_json(value: object) -> bytes:
    """JSON with one spelling per value: keys sorted, no blanks, UTF-8, no floats.

    Raises:
        TypeError: a float, a key that is no string, or a type that JSON does not know, with its place.
    """
    _check_json(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _check_json(value: object, place: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{place}: the key {key!r} must be a string")
            _check_json(inner, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_json(inner, f"{place}[{index}]")
    elif not (value is None or isinstance(value, (str, bool, int))):
        raise TypeError(f"{place}: {type(value).__name__} has no canonical spelling; write an int or a string")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a tensor in row-major order, little-endian; a view where the tensor lies in host memory.

    Raises:
        TypeError: a sparse or quantised tensor, or one of a dtype without a safetensors spelling.
    """
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        raise TypeError(f"{tensor.dtype} in layout {tensor.layout} has no canonical bytes")
    if not tensor.numel():
        return memoryview(b"")  # an empty array of numpy may have a stride that no view of bytes accepts
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    elements: memoryview = flat.view(torch.uint8).numpy().data
    return elements


def header(name: str, value: Value) -> bytes:
    """``["name","dtype",[shape]]`` as canonical JSON; dtype ``JSON`` and an empty shape for what is no tensor."""
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)
    if isinstance(value, torch.Tensor):
        return canonical_json([name, DTYPES[value.dtype], list(value.shape)])
    return canonical_json([name, "JSON", []])


def content(value: Value) -> memoryview | bytes:
    """The bytes that stand behind the header; a float counts as a scalar of 64 bits."""
    if isinstance(value, float):
        value = torch.tensor(value, dtype=torch.float64)
    return raw_bytes(value) if isinstance(value, torch.Tensor) else canonical_json(value)


def tensor_digest(name: str, tensor: Value, salt: bytes = b"") -> str:
    """SHA-256 of salt, header, line feed and content, in hexadecimal.

    Negative zero and zero differ, and so do NaNs with different payloads.

    Args:
        name: the full name in the learnt state.
        tensor: on any device; scalars and lists go in as canonical JSON.
        salt: makes the digest useless for confirming a guess at the content once the salt is gone.
    """
    digest = hashlib.sha256(salt)
    body = content(tensor)
    digest.update(header(name, tensor) + b"\n")
    digest.update(body)
    return digest.hexdigest()


def salted_pair(name: str, value: Value, body: memoryview | bytes, salt: bytes) -> tuple[str, str]:
    """Digests of one entry without and with a salt; ``body`` is its :func:`content`, fetched once for both."""
    found = []
    for start in (b"", salt):
        digest = hashlib.sha256(start + header(name, value) + b"\n")
        digest.update(body)
        found.append(digest.hexdigest())
    return found[0], found[1]


def digests(tensors: Mapping[str, Value], salt: bytes = b"") -> dict[str, str]:
    """``tensor_digest`` of every entry."""
    return {name: tensor_digest(name, tensor, salt) for name, tensor in tensors.items()}


def root(digests: Mapping[str, str]) -> str:
    """SHA-256 over the lines ``name digest``, sorted by the bytes of the name: one figure for a whole state.

    Raises:
        ValueError: a line feed in a name, which would make two states look alike.
    """
    total = hashlib.sha256()
    for name in sorted(digests, key=str.encode):
        if "\n" in name:
            raise ValueError(f"the name {name!r} contains a line feed")
        total.update(f"{name} {digests[name]}\n".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Difference:
    """An entry in which two states differ.

    Attributes:
        name: in the learnt state.
        kind: ``missing`` (only the other has it), ``extra`` (only the first has it), ``type`` or ``values``.
        elements: how many elements differ in their bytes; 0 unless ``kind`` is ``values``.
        largest: largest absolute difference among those of them where it is finite, else ``None``; negative zero and
            zero differ by 0.0.
    """

    name: str
    kind: str
    elements: int
    largest: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Outcome of comparing two states.

    Attributes:
        equal: same names, dtypes, shapes and bytes.
        tensors: entries compared, those that only one side has included.
        bytes: bytes of the entries that both have in the same type and that were compared.
        differing: how many entries differ.
        differences: the first 20 of them by name.
    """

    equal: bool
    tensors: int
    bytes: int
    differing: int
    differences: tuple[Difference, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "differences": [d.as_dict() for d in self.differences]}


def compare(one: Mapping[str, Value], other: Mapping[str, Value]) -> Comparison:
    """Whether two learnt states have the same bytes under the same names.

    Raises:
        UserError: both are the same objects in memory, so that equality would say nothing.
    """
    if _same_memory(one, other):
        raise UserError("reference", "", "is the state itself", "Compare with a state that was trained separately")
    return _compared((name, one, other) for name in sorted({*one, *other}, key=str.encode))


def compare_files(one: Path, other: Path) -> Comparison:
    """``compare`` of two safetensors files, entry by entry.

    Raises:
        UserError: both names lead to one file.
    """
    from safetensors import safe_open

    if one.samefile(other):
        raise UserError("reference", other, "is the file itself", "Name the file of another run")
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        files = (_Lazy(first), _Lazy(second))
        return _compared((name, *files) for name in sorted({*files[0], *files[1]}, key=str.encode))


def refuse_other_numerics(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Stop before two states are compared that could differ by rounding alone.

    Args:
        one: ``fingerprint`` of the first state.
        other: that of the second.

    Raises:
        UserError: they differ; names the first entry that does.
    """
    for key in sorted({*one, *other}):
        if one.get(key) != other.get(key):
            raise UserError(
                "reference",
                "",
                f"was computed with other numerics ({key} {other.get(key)} and here {one.get(key)}), so its bytes "
                "cannot be compared",
                "Train the reference on this machine with the same settings",
            )


class _Lazy(Mapping[str, Value]):
    """A safetensors file as a mapping that reads an entry when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = list(file.keys())

    def __getitem__(self, name: str) -> Value:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _same_memory(one: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    if one is other:
        return True
    pairs = [(one[name], other[name]) for name in one if name in other]
    filled = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.numel()]
    return bool(filled) and all(a.data_ptr() == b.data_ptr() and a.device == b.device for a, b in filled)


def _compared(entries: Iterable[tuple[str, Mapping[str, Value], Mapping[str, Value]]]) -> Comparison:
    tensors = compared_bytes = differing = 0
    shown: list[Difference] = []
    for name, one, other in entries:
        tensors += 1
        difference, size = _difference(name, one, other)
        compared_bytes += size
        differing += difference is not None
        if difference is not None and len(shown) < SHOWN:
            shown.append(difference)
    return Comparison(not differing, tensors, compared_bytes, differing, tuple(shown))


def _difference(name: str, one: Mapping[str, Value], other: Mapping[str, Value]) -> tuple[Difference | None, int]:
    if name not in one or name not in other:
        return Difference(name, "extra" if name in one else "missing", 0, None), 0
    first, second = one[name], other[name]
    if header(name, first) != header(name, second):
        return Difference(name, "type", 0, None), 0
    left, right = content(first), content(second)
    if left == right:
        return None, len(left)
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        places = _differing(left, right, first)
        return Difference(name, "values", int(places.sum()), _largest(first, second, places)), len(left)
    return Difference(name, "values", 1, None), len(left)


def _differing(left: memoryview | bytes, right: memoryview | bytes, like: torch.Tensor) -> torch.Tensor:
    """Which elements differ in their bytes, row-major."""
    pair = [np.frombuffer(side, dtype=np.uint8).reshape(-1, like.element_size()) for side in (left, right)]
    return torch.from_numpy((pair[0] != pair[1]).any(axis=1))


def _largest(one: torch.Tensor, other: torch.Tensor, places: torch.Tensor) -> float | None:
    wide = torch.complex128 if one.is_complex() else torch.float64
    first, second = (side.detach().cpu().reshape(-1)[places].to(wide) for side in (one, other))
    gaps = (first - second).abs()
    finite = gaps[torch.isfinite(gaps)]
    return float(finite.max()) if finite.numel() else None


def fingerprint(device: torch.device | str = "cpu") -> dict[str, str | int | bool]:
    """What decides how sums are rounded here: two runs under one fingerprint give the same bytes.

    Args:
        device: on which training runs.
    """
    kind = torch.device(device)
    on_cuda = kind.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "blas": _blas(),
        "device": torch.cuda.get_device_name(kind) if on_cuda else kind.type,
        "cuda": str(torch.version.cuda or "none") if on_cuda else "none",
        "processor": f"{_processor_vendor()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def _blas() -> str:
    """The linear-algebra libraries in the build of torch, for example ``mkl; Math Kernel Library 2024.2; DNN v3.7``."""
    shown = torch.__config__.show()
    found = [re.search(pattern, shown) for pattern in (r"BLAS_INFO=(\w+)", r"Math Kernel Library Version ([\d.]+)")]
    found.append(re.search(r"MKL-DNN (v[\d.]+)", shown))
    return "; ".join(match.group(1) for match in found if match) or "unknown"


def _processor_vendor() -> str:
    """Libraries choose their kernels by it, beyond the instruction set."""
    try:
        match = re.search(r"vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1) if match else "unknown"
