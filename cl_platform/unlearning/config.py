"""What a user can say about forgetting: the keys below ``unlearning``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cl_platform.config import setting, typed
from cl_platform.errors import UserError, nearest, unknown_name
from cl_platform.registry import unlearning_methods

APPROXIMATE = "approximate:"
WAYS = ("auto", "drop", "rollback")


@dataclass(frozen=True)
class RequestConfig:
    """An entry of ``unlearning.requests``."""

    after_task: int = setting(doc="id of the task after which it is carried out", min=0)
    forget: int = setting(doc="id of the task to be forgotten", min=0)
    method: str | None = setting(None, doc="in place of unlearning.method")


@dataclass(frozen=True)
class UnlearningConfig:
    """Keys of ``unlearning``. ``methods`` holds the groups ``unlearning.<name>`` of approximate methods by name."""

    method: str = setting("auto", doc="auto, drop, rollback or approximate:NAME")
    requests: tuple[RequestConfig, ...] = setting(factory=tuple, doc="what is forgotten while the stream is learnt")
    sequence: str | None = setting(None, doc="instructions such as 'R0 T1 F1' in place of the plain stream")
    accept: str = setting("E-bit", doc="auto takes the cheapest way of this level", choices=("E-bit", "E-law"))
    min_retain_ratio: float = setting(0.5, doc="approximate: least share of the accuracy kept", min=0, max=1)
    keep_rows: bool = setting(False, doc="approximate: leave the head rows of the task")
    purge_data_cache: bool = setting(False, doc="also delete the run's whole data set from the cache of images")
    anchor: str | None = setting(None, doc="file outside the run to which the audit log's head is appended")
    methods: dict[str, dict[str, Any]] = setting(factory=dict, doc="keys of approximate methods, by name")

    def __post_init__(self) -> None:
        check_method(self.method, "unlearning.method")
        for number, request in enumerate(self.requests):
            if request.method is not None:
                check_method(request.method, f"unlearning.requests[{number}].method")
        if self.requests and self.sequence is not None:
            raise UserError(
                "unlearning.requests", "[...]", "a sequence says itself what is forgotten", "Set one of the two"
            )


def parse_unlearning(values: Mapping[str, Any] | None) -> UnlearningConfig:
    """The keys below ``unlearning``, those of approximate methods apart.

    Raises:
        UserError: an unknown key, or a value out of range.
    """
    if values is not None and not isinstance(values, Mapping):
        return typed(UnlearningConfig, values, "unlearning")  # which says what is wrong
    own = {field.name for field in fields(UnlearningConfig)} - {"methods"}
    plain = {key: value for key, value in (values or {}).items() if key in own}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in (values or {}).items():
        if key in own:
            continue
        known = _names()
        if key not in known:
            near = nearest(key, [*own, *known])
            todo = f"Did you mean unlearning.{near[0]}" if near else "Remove it"
            raise UserError(f"unlearning.{key}", value, f"unknown key; known are {', '.join(sorted(own))}", todo)
        groups[key] = dict(value or {})
    return typed(UnlearningConfig, {**plain, "methods": groups}, "unlearning")


def check_method(method: str, key: str) -> None:
    """Refuse what is no way to forget.

    Raises:
        UserError: an unknown way, or an unknown approximate method.
    """
    if method.startswith(APPROXIMATE):
        name = method.removeprefix(APPROXIMATE)
        if name not in _names():
            raise unknown_name(key, method, [APPROXIMATE + known for known in _names()])
    elif method == APPROXIMATE.rstrip(":"):
        raise UserError(key, method, f"needs a name; known are {', '.join(_names())}", f"Write {APPROXIMATE}NAME")
    elif method not in WAYS:
        raise unknown_name(key, method, [*WAYS, *(APPROXIMATE + known for known in _names())])


def _names() -> list[str]:
    import cl_platform.unlearning.approximate  # noqa: F401  # registers them

    return unlearning_methods.names()
