"""Fields of the certificate, their types, and what must not stand in them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeAlias

from cl_platform.unlearning.privacy import findings

SCHEMA = "cl_platform/unlearning-certificate/1"
Check: TypeAlias = Callable[[object, str], Iterator[str]]
"""Called with a value and its place; yields what is wrong."""


def problems(certificate: object, names: Collection[str] = ()) -> list[str]:
    """What is wrong with a certificate: missing, unknown or ill-typed fields, and whatever is nobody's business.

    Args:
        certificate: as read from JSON.
        names: names that must not stand in it, such as those of classes; those of the account and the machine are
            looked for in any case.
    """
    found = list(_CERTIFICATE(certificate, "certificate"))
    if not found and isinstance(certificate, Mapping):
        found += findings({key: certificate[key] for key in _FREE}, names, "certificate")
        found += list(_consistent(certificate))
    return found


_FREE = ("run", "method", "components", "files", "not_covered", "kept_counts", "reference", "verification", "cost")
"""Fields whose words come from outside; those of the others are listed here or made of digits."""


def _is(kind: type | tuple[type, ...], called: str) -> Check:
    def check(value: object, place: str) -> Iterator[str]:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, str)):
            yield f"{place} must be {called}"

    return check


def _number(value: object, place: str) -> Iterator[str]:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        yield f"{place} must be a finite number"


def _natural(value: object, place: str) -> Iterator[str]:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        yield f"{place} must be a whole number from 0"


def _like(pattern: str, called: str) -> Check:
    compiled = re.compile(pattern)

    def check(value: object, place: str) -> Iterator[str]:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            yield f"{place} must be {called}"

    return check


def _one_of(*words: str) -> Check:
    return _like("|".join(map(re.escape, words)), f"one of {', '.join(words)}")


def _maybe(inner: Check) -> Check:
    def check(value: object, place: str) -> Iterator[str]:
        if value is not None:
            yield from inner(value, place)

    return check


def _list(inner: Check) -> Check:
    def check(value: object, place: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield f"{place} must be a list"
            return
        for index, item in enumerate(value):
            yield from inner(item, f"{place}[{index}]")

    return check


def _fields(**checks: Check) -> Check:
    def check(value: object, place: str) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield f"{place} must be an object"
            return
        yield from (f"{place}.{name} is missing" for name in checks if name not in value)
        yield from (f"{place}.{name} is not a field" for name in value if name not in checks)
        for name, inner in checks.items():
            if name in value:
                yield from inner(value[name], f"{place}.{name}")

    return check


def _open(leaf: Check) -> Check:
    """An object of any keys whose leaves are all checked alike."""

    def check(value: object, place: str) -> Iterator[str]:
        if not isinstance(value, Mapping):
            yield f"{place} must be an object"
            return
        yield from walk(value, place)

    def walk(value: object, place: str) -> Iterator[str]:
        if isinstance(value, Mapping):
            for name, inner in value.items():
                yield from walk(inner, f"{place}.{name}")
        elif isinstance(value, (list, tuple)):
            for index, inner in enumerate(value):
                yield from walk(inner, f"{place}[{index}]")
        else:
            yield from leaf(value, place)

    return check


def _scalar(value: object, place: str) -> Iterator[str]:
    if isinstance(value, float):
        yield from _number(value, place)
    elif not (value is None or isinstance(value, (str, bool, int))):
        yield f"{place} must be plain JSON"


def _relative(value: object, place: str) -> Iterator[str]:
    if not isinstance(value, str) or not value or value.startswith(("/", "~")) or ".." in value.split("/"):
        yield f"{place} must be a path inside the run folder"


_text = _is(str, "a string")
_flag = _is(bool, "true or false")
_exact = _is((str, int, bool), "a string, a whole number, true or false")
_sha = _like(r"[0-9a-f]{64}", "64 hexadecimal digits")
_time = _like(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "a time as YYYY-MM-DDTHH:MM:SSZ")
_way = r"drop|rollback|approximate:[a-z0-9_]+"
_metric = _open(_scalar)
_price = {
    "seconds": _number,
    "seconds_purge": _number,
    "images": _natural,
    "optimizer_steps": _natural,
    "peak_bytes": _natural,
}

_CERTIFICATE = _fields(
    schema=_one_of(SCHEMA),
    request_id=_like(r"[0-9a-f]{32}", "32 hexadecimal digits"),
    state=_one_of("open", "done", "refused"),
    created_utc=_time,
    closed_utc=_maybe(_time),
    run=_fields(
        config_sha256=_sha,
        version=_text,
        git_commit=_maybe(_text),
        scenario=_text,
        strategy=_list(_text),
    ),
    target=_fields(
        task_id=_natural,
        class_ids=_list(_natural),
        n_train=_natural,
        n_buffer=_natural,
        trigger=_one_of("in_stream", "sequence", "command"),
    ),
    method=_fields(
        requested=_like(rf"auto|{_way}", "auto, drop, rollback or approximate:NAME"),
        used=_like(rf"none|{_way}", "drop, rollback, approximate:NAME or, if refused, none"),
        params=_open(_scalar),
        reason=_text,
    ),
    level=_one_of("E-bit", "E-law", "approximate", "none"),
    level_basis=_fields(
        lineage=_one_of("verified", "declared", "violated"), leaks=_list(_like(r"L-\d\d", "an id such as L-01"))
    ),
    fingerprint=_open(_exact),
    components=_list(
        _fields(
            name=_text,
            kind=_text,
            owners=_list(_natural),
            action=_one_of("deleted", "recomputed", "retrained", "modified", "kept"),
            dtype=_text,
            shape=_list(_natural),
            bytes_before=_natural,
            bytes_after=_natural,
            sha256_before=_maybe(_sha),
            sha256_after=_maybe(_sha),
            salted=_flag,
        )
    ),
    files=_list(
        _fields(
            path=_relative,
            action=_one_of("deleted", "rewritten", "kept"),
            reason=_text,
            bytes=_natural,
            sha256_before=_maybe(_sha),
            sha256_after=_maybe(_sha),
        )
    ),
    not_covered=_list(_fields(what=_text, why=_text)),
    kept_counts=_open(_exact),
    reference=_maybe(
        _fields(
            config_sha256=_sha,
            cached=_flag,
            compared=_flag,
            equal=_maybe(_flag),
            tensors=_natural,
            bytes=_natural,
            differences=_list(_open(_scalar)),
        )
    ),
    verification=_maybe(_metric),
    cost=_fields(**_price, estimated=_maybe(_fields(**_price))),
    bookkeeping_excluded=_list(_text),
    audit=_fields(entries=_natural, head=_sha),
)


def _consistent(certificate: Mapping[str, Any]) -> Iterator[str]:
    """Statements that contradict one another."""
    if (certificate["closed_utc"] is None) != (certificate["state"] == "open"):
        yield "certificate.closed_utc must be there exactly when the request is over"
    if (certificate["level"] == "none") != (certificate["state"] == "refused"):
        yield "certificate.level must be none exactly when the request was refused"
    if certificate["level"] == "E-bit" and certificate["level_basis"]["leaks"]:
        yield "certificate.level cannot be E-bit while leaks remain"
    if certificate["level"] == "E-bit" and certificate["level_basis"]["lineage"] == "violated":
        yield "certificate.level cannot be E-bit on a lineage that was violated"
    if certificate["method"]["used"].startswith("approximate") and certificate["level"] not in ("approximate", "none"):
        yield "certificate.level must be approximate for an approximate method"
    for index, entry in enumerate(certificate["components"]):
        place = f"certificate.components[{index}]"
        if (entry["sha256_after"] is None) != (entry["action"] == "deleted"):
            yield f"{place}.sha256_after must be null exactly for a deleted component"
        if entry["salted"] and entry["action"] == "kept":
            yield f"{place}.salted must be false for a kept component"
        gone = entry["action"] == "deleted" and certificate["target"]["task_id"] in entry["owners"]
        if gone and not entry["salted"]:
            yield f"{place}.sha256_before of a deleted component of the task must be salted"
    for index, entry in enumerate(certificate["files"]):
        place = f"certificate.files[{index}].sha256_after"
        if entry["action"] == "deleted" and entry["sha256_after"] is not None:
            yield f"{place} must be null for a deleted file"
        if entry["action"] == "rewritten" and entry["sha256_after"] is None:
            yield f"{place} must be there for a rewritten file"
