"""From a plain mapping to a typed, range-checked dataclass, with an error that names the key as the user typed it.

A configuration is a frozen dataclass. Field metadata may hold ``min``, ``max`` (inclusive), ``above`` (exclusive
lower bound), ``choices`` and ``only_with``; see :func:`setting`. The key of a field ``lambda_`` is ``lambda``, a word
of Python's own.
"""

from __future__ import annotations

import dataclasses
import keyword
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, Union

from cl_platform.errors import UserError, as_typed, nearest

C = TypeVar("C")
Choices = Sequence[Any] | Callable[[], Sequence[Any]]


def setting(
    default: Any = dataclasses.MISSING,
    *,
    doc: str = "",
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    choices: Choices | None = None,
    only_with: tuple[str, tuple[Any, ...]] | None = None,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field with a one-line doc, a range (``min``/``max`` inclusive, ``above`` exclusive) or choices.

    ``only_with`` names another key of the group and the values of it with which this one does something; elsewhere only
    its default is taken, since a value that changes nothing misleads. ``choices`` may be a function that gives them,
    for those that plug-ins add to.
    """
    metadata = {"doc": doc, "min": min, "max": max, "above": above, "choices": choices, "only_with": only_with}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def typed(cls: type[C], values: Mapping[str, Any] | None, prefix: str = "") -> C:
    """Build the dataclass ``cls`` from ``values``.

    Args:
        cls: a dataclass; nested dataclasses are built from nested mappings.
        values: plain Python values as they come from yaml; ``None`` counts as empty.
        prefix: where the values stand in the whole configuration, for messages (``strategy.coda_prompt``).

    Raises:
        UserError: an unknown key (with the nearest one), a missing key, a wrong type, a value out of range.
    """
    if values is not None and not isinstance(values, Mapping):
        raise UserError(prefix, values, "must be a group of keys", f"Set keys below it, such as {prefix}.KEY=VALUE")
    values = dict(values or {})
    hints = typing.get_type_hints(cls)
    fields = {_key_of(f.name): f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else name
        if name not in fields:
            near = nearest(name, fields)
            todo = f"Did you mean {prefix + '.' if prefix else ''}{near[0]}" if near else "Remove it"
            raise UserError(key, value, f"unknown key; known are {', '.join(sorted(fields)) or 'none'}", todo)
        field = fields[name]
        try:
            built[field.name] = _convert(value, hints[field.name], key)
        except UserError as error:
            choices = choices_of(field.metadata)
            if choices is None:
                raise
            raise _no_choice(key, value, choices) from error
        _check_range(built[field.name], field.metadata, key, value)
    for name, field in fields.items():
        missing = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if missing and field.name not in built:
            key = f"{prefix}.{name}" if prefix else name
            raise UserError(key, None, f"a value is needed ({field.metadata.get('doc', name)})", f"Set {key}=...")
    made = cls(**built)
    _refuse_idle(made, fields, prefix)
    return made


def _refuse_idle(made: Any, fields: Mapping[str, dataclasses.Field[Any]], prefix: str) -> None:
    """Refuse a key with a value of its own that another key keeps from being read."""
    for name, field in fields.items():
        if field.metadata.get("only_with") is None:
            continue
        other, values = field.metadata["only_with"]
        value = getattr(made, field.name)
        if value == field.default or getattr(made, other) in values:
            continue
        start = f"{prefix}." if prefix else ""
        read = f"is read only where {start}{other} is {' or '.join(map(as_typed, values))}"
        raise UserError(f"{start}{name}", value, read, f"Set {start}{other}={as_typed(values[0])}, or remove it")


def defaults_of(cls: type) -> dict[str, Any]:
    """Keys and default values of a dataclass as plain Python values; ``???``, a value to be given, where it has none.

    Raises:
        TypeError: no dataclass.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = "???"
        values[_key_of(field.name)] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_key_of(f.name): _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _key_of(field_name: str) -> str:
    word = field_name.removesuffix("_")
    return word if keyword.iskeyword(word) else field_name


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        members = [a for a in args if a is not type(None)]
        for exact in members:  # a member that the value already is wins over one it could be turned into
            if isinstance(exact, type) and type(value) is exact:
                return value
        for member in members:
            try:
                return _convert(value, member, key)
            except UserError as error:
                if error.key != key:  # it says which element or inner key is wrong
                    raise
        raise _wrong_type(value, hint, key)
    if dataclasses.is_dataclass(hint):
        return typed(typing.cast(type, hint), value, key)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise UserError(key, value, "must be a list", f"Write {key}=[...]")
        return origin(_convert(v, args[0] if args else Any, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise UserError(key, value, "must be a group of keys", f"Set keys below it, such as +{key}.KEY=VALUE")
        return dict(value)
    return _convert_scalar(value, hint, key)


def _convert_scalar(value: Any, hint: Any, key: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # yaml reads 1e-3 as a string
        except ValueError:
            pass
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise _wrong_type(value, hint, key)


WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true"),
    int: ("a whole number", "10"),
    float: ("a number", "0.1"),
    str: ("a text", "NAME"),
    list: ("a list", "[...]"),
    tuple: ("a list", "[...]"),
    type(None): ("null", "null"),
}
"""What a type is called in a message, and how a value of it is typed."""


def _wrong_type(value: Any, hint: Any, key: str) -> UserError:
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    named = [WORDS.get(typing.get_origin(member) or member, ("a group of keys", "...")) for member in members]
    listed = " or ".join(filter(None, [", ".join(word for word, _ in named[:-1]), named[-1][0]]))
    return UserError(key, value, f"must be {listed}", f"Write {key}=VALUE, such as {key}={named[0][1]}")


def choices_of(metadata: Mapping[str, Any]) -> Sequence[Any] | None:
    """What a field may be, from its metadata; ``None`` for anything of its type."""
    choices: Choices | None = metadata.get("choices")
    return choices() if callable(choices) else choices


def _no_choice(key: str, value: Any, choices: Sequence[Any]) -> UserError:
    near = nearest(str(value), map(str, choices))
    todo = f"Did you mean {near[0]}" if near else "Choose one of them"
    return UserError(key, value, f"must be one of {', '.join(map(as_typed, choices))}", todo)


def _check_range(value: Any, metadata: Mapping[str, Any], key: str, given: Any) -> None:
    """Refuse a converted value that is out of range; ``given`` is how the user wrote it."""
    if value is None:
        return
    choices = choices_of(metadata)
    if choices is not None and value not in choices:
        raise _no_choice(key, given, choices)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    low, high, above = metadata.get("min"), metadata.get("max"), metadata.get("above")
    if low is not None and value < low:
        raise UserError(key, given, f"must be at least {low}", f"Raise {key}")
    if above is not None and value <= above:
        raise UserError(key, given, f"must be above {above}", f"Raise {key}")
    if high is not None and value > high:
        raise UserError(key, given, f"must be at most {high}", f"Lower {key}")
