"""The instructions of a stream: which tasks are learnt for good, which until further notice, which are forgotten."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from cl_platform.errors import UserError, as_typed

if TYPE_CHECKING:
    from cl_platform.strategies import Composition

KEY = "unlearning.sequence"
Instruction = Literal["R", "T", "F"]
Kind = Literal["learn", "promote", "forget"]
State = Literal["unseen", "temporary", "permanent", "forgotten"]

MOVES: dict[State, dict[Instruction, tuple[Kind, State]]] = {
    "unseen": {"R": ("learn", "permanent"), "T": ("learn", "temporary")},
    "temporary": {"R": ("promote", "permanent"), "F": ("forget", "forgotten")},
    "permanent": {},
    "forgotten": {},
}
"""What each instruction does to a task in each state, and the state after it (Liu, Liu and Stone, CoLLAs 2022)."""

MEANING: dict[State, str] = {
    "unseen": "has not been learnt",
    "temporary": "is held temporarily",
    "permanent": "is learnt for good",
    "forgotten": "is forgotten",
}


@dataclass(frozen=True)
class Stage:
    """What one token asks for.

    Attributes:
        token: its place in the sequence, from 1.
        kind: ``learn`` a task from its images, ``promote`` one that is held temporarily, or ``forget`` one.
        task_id: which task.
        instruction: ``R``, ``T`` or ``F``; a task is learnt for good by ``R``, temporarily by ``T``.
    """

    token: int
    kind: Kind
    task_id: int
    instruction: Instruction

    def __str__(self) -> str:
        return f"{self.instruction}{self.task_id}"


@dataclass(frozen=True)
class Instructions:
    """A legal sequence.

    Attributes:
        stages: in order, one per token.
    """

    stages: tuple[Stage, ...]

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    def __str__(self) -> str:
        return " ".join(map(str, self.stages))

    def states(self, tokens: int | None = None) -> dict[int, State]:
        """State of every task named in the first ``tokens`` tokens (all by default), in the order of its latest one."""
        found: dict[int, State] = {}
        for stage in self.stages[:tokens]:
            before = found.pop(stage.task_id, "unseen")
            found[stage.task_id] = MOVES[before][stage.instruction][1]
        return found

    def in_state(self, state: State, tokens: int | None = None) -> list[int]:
        """Task ids that are in ``state`` after the first ``tokens`` tokens, in the order in which they came there."""
        return [task_id for task_id, reached in self.states(tokens).items() if reached == state]

    @property
    def learnt(self) -> list[int]:
        """Task ids in the order in which they are learnt."""
        return [stage.task_id for stage in self.stages if stage.kind == "learn"]

    def without(self, task_ids: Collection[int]) -> Instructions:
        """The same without a word about ``task_ids``: the sequence of a run that never saw them."""
        return parse(" ".join(str(stage) for stage in self.stages if stage.task_id not in task_ids))


def parse(text: object, task_ids: Sequence[int] | None = None, key: str = KEY) -> Instructions:
    """A sequence from its text, such as ``R0 T1 R1 T2 F2``, checked as a whole.

    ``R3`` learns task 3 for good, or takes it over for good where ``T3`` came before; ``T3`` learns it temporarily;
    ``F3`` forgets it. A forgotten task stays forgotten: data that return get another task id. Tasks that the sequence
    does not name are not learnt.

    Args:
        text: tokens ``[RTF]<task id>`` separated by blanks.
        task_ids: those of the stream; ``None``: any.
        key: where the text stands in the configuration, for messages.

    Raises:
        UserError: the first token that cannot be obeyed, with its place, the task's state and the legal moves.
    """
    tokens = text.split() if isinstance(text, str) else []
    if not tokens and text != "":
        raise UserError(key, text, "must be a text of instructions", f"Write {key}='R0 T1 F1'")
    states: dict[int, State] = {}
    stages: list[Stage] = []
    for place, token in enumerate(tokens, start=1):
        instruction, task_id = _read(token, place, task_ids, text, key)
        state = states.get(task_id, "unseen")
        if instruction not in MOVES[state]:
            raise _illegal(Stage(place, "forget", task_id, instruction), state, stages, text, key)
        kind, states[task_id] = MOVES[state][instruction]
        stages.append(Stage(place, kind, task_id, instruction))
    return Instructions(tuple(stages))


def refuse_unable(instructions: Instructions, composition: Composition) -> None:
    """Refuse, before anything runs, to learn temporarily with strategies that could not take it back.

    Raises:
        UserError: the sequence holds a task temporarily, and a strategy cannot.
    """
    stage = next((stage for stage in instructions if stage.instruction == "T"), None)
    if stage is None:
        return
    for strategy in composition.strategies:
        if not strategy.holds_temporarily:
            strategy.instruct(stage.task_id, stage.instruction)  # refuses


def _read(token: str, place: int, task_ids: Sequence[int] | None, text: object, key: str) -> tuple[Instruction, int]:
    found = re.fullmatch(r"([RTF])(0|[1-9][0-9]*)", token)
    if found is None:
        close = re.fullmatch(r"([RTFrtf])[_-]?0*([0-9]+),?", token)
        todo = f"Did you mean {close[1].upper()}{close[2]}" if close else "Write R, T or F and a task id, such as T1"
        raise UserError(key, text, f"token {place} ({token}) is no instruction", todo)
    task_id = int(found[2])
    if task_ids is not None and task_id not in task_ids:
        listed = as_typed(list(task_ids)).strip("[]")
        raise UserError(
            key, text, f"token {place} ({token}) names a task that the stream does not have; it has {listed}",
            "Name one of them",
        )  # fmt: skip
    return cast(Instruction, found[1]), task_id


def _illegal(asked: Stage, state: State, before: Sequence[Stage], text: object, key: str) -> UserError:
    """Why a token cannot be obeyed, and what could stand there."""
    task_id = asked.task_id
    legal = [f"{instruction}{task_id} ({kind})" for instruction, (kind, _) in MOVES[state].items()]
    reason = (
        f"token {asked.token} ({asked}) cannot be obeyed: task {task_id} {MEANING[state]}; "
        f"legal for it: {' or '.join(legal) or 'nothing more'}"
    )
    if state == "permanent" and asked.instruction == "F":
        return UserError(key, text, reason, f"Hold it temporarily with T{task_id}, or {_rollback(task_id, before)}")
    if state == "forgotten":
        return UserError(key, text, reason, "Give data that return another task id")
    return UserError(key, text, reason, f"Write one of these, or leave {asked} out" if legal else f"Leave {asked} out")


def _rollback(task_id: int, before: Sequence[Stage]) -> str:
    """What forgetting a permanent task takes: everything learnt from it on, but for what is forgotten anyway."""
    sequence = Instructions(tuple(before))
    gone = {task_id, *sequence.in_state("forgotten")}
    start = min(place for place, stage in enumerate(before) if stage.task_id == task_id)
    again = list(dict.fromkeys(stage.task_id for stage in before[start:] if stage.task_id not in gone))
    price = f"relearns task{'s' * (len(again) > 1)} {', '.join(map(str, again))}" if again else "relearns nothing"
    return f"forget it after the run: python -m cl_platform unlearn RUN --task {task_id} --method rollback {price}"
