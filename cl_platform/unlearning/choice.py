"""Which way to forget: the highest level that can be reached here, then the lowest price, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cl_platform.cost import duration
from cl_platform.errors import UserError

LEVELS = ("approximate", "E-law", "E-bit")
"""Ascending: what a way to forget can claim about all that was learnt."""

EXACT = LEVELS[1:]


@dataclass(frozen=True)
class Price:
    """What a way to forget costs.

    Attributes:
        tasks: ids of the tasks to relearn, in order.
        images: training images that pass, as often as they come.
        steps: optimizer updates.
        seconds: an estimate from what the run has taken so far; ``None`` where nothing is known.
    """

    tasks: tuple[int, ...] = ()
    images: int = 0
    steps: int = 0
    seconds: float | None = 0.0

    def __str__(self) -> str:
        if not self.tasks:
            return "no relearning"
        count = "1 task" if len(self.tasks) == 1 else f"{len(self.tasks)} tasks"
        listed = ", ".join(map(str, self.tasks))
        time = "unknown time" if self.seconds is None else f"about {duration(self.seconds, tenths=True)}"
        return f"relearns {count} ({listed}): {self.images:,} images, {self.steps:,} steps, {time}"


@dataclass(frozen=True)
class Option:
    """A way to forget as it stands here.

    Attributes:
        method: ``drop``, ``rollback`` or ``approximate:<name>``.
        level: what it reaches here, one of ``LEVELS``; ``None`` where it cannot be done.
        price: its cost.
        why: what decides the level, or what is missing; part of a sentence that may stand in a certificate.
        leaks: ids of the channels through which something of the task remains.
        holders: names of the kept components that hold something of it.
        detail: more about what is missing, for the user alone.
    """

    method: str
    level: str | None
    price: Price
    why: str
    leaks: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    detail: str = ""

    @property
    def told(self) -> str:
        """Why, and what exactly is missing."""
        return f"{self.why} ({self.detail})" if self.detail else self.why


@dataclass(frozen=True)
class Choice:
    """What will be done.

    Attributes:
        option: the way taken.
        reason: why it was taken; a sentence without its full stop.
        options: all ways that were weighed.
    """

    option: Option
    reason: str
    options: tuple[Option, ...]


def choose(
    task_id: int, requested: str, options: Sequence[Option], accept: str = "E-bit", key: str = "--method"
) -> Choice:
    """Decide.

    Args:
        task_id: to be forgotten.
        requested: ``auto``, or the one way that is wanted.
        options: the ways there are.
        accept: ``auto`` takes the cheapest way that reaches this level, and where none does the highest exact one.
        key: where the way stands, for messages.

    Raises:
        UserError: the way that is wanted cannot be done, or ``auto`` finds no exact one.
    """
    if requested != "auto":
        option = next(option for option in options if option.method == requested)
        if option.level is None:
            why = f"task {task_id} cannot be forgotten so: {option.told}"
            raise UserError(key, requested, why, _other(options, key))
        return Choice(option, f"{requested} was asked for: {option.why}", tuple(options))
    exact = [option for option in options if option.level in EXACT]
    if not exact:
        ways = "; ".join(f"{option.method}: {option.told}" for option in options)
        raise UserError(
            key, "auto", f"no exact way to forget task {task_id} is open ({ways})",
            f"Provide what is missing, or choose {typed(key, 'approximate:NAME')}, which is never exact",
        )  # fmt: skip
    best = max(rank(option.level) for option in exact)
    wanted = min(best, LEVELS.index(accept))
    fitting = [option for option in exact if rank(option.level) >= wanted]
    option = min(fitting, key=lambda o: (o.price.steps, len(o.price.tasks), -rank(o.level)))
    return Choice(option, _reason(option, options, LEVELS[wanted]), tuple(options))


def rank(level: str | None) -> int:
    """Place of a level among ``LEVELS``; -1 for none."""
    return -1 if level is None else LEVELS.index(level)


def level_on(device: str, exact: bool) -> str:
    """The level of an exact or inexact way on a kind of device: the same bytes are promised on a CPU alone."""
    if not exact:
        return "approximate"
    return "E-bit" if device == "cpu" else "E-law"


def _reason(option: Option, options: Sequence[Option], wanted: str) -> str:
    others = [other for other in options if other is not option]
    said = [f"{o.method} would be {o.level or 'impossible'}: {o.why}" for o in others]
    head = f"{option.method} reaches {option.level} ({option.why}) and is the cheapest way that reaches {wanted}"
    return "; ".join([head, *said])


def typed(key: str, value: str) -> str:
    """A value behind its key as one types it: ``--method drop``, ``unlearning.method=drop``."""
    return f"{key}{' ' if key.startswith('--') else '='}{value}"


def _other(options: Sequence[Option], key: str) -> str:
    ways = [option.method for option in options if option.level in EXACT]
    if ways:
        return f"Use {typed(key, ways[0])}"
    return f"Provide what is missing, or use {typed(key, 'approximate:NAME')}"
