"""The trainings that the checks share, each made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from cl_platform.errors import UserError
from cl_platform.learner import ContinualLearner
from cl_platform.scenarios import Stream
from cl_platform.strategies.phases import Phase
from cl_platform.testing.failures import NotReady, cause
from cl_platform.testing.given import Given
from cl_platform.testing.small import BATCH, Watch, answers, images_of, learn, small_learner, small_stream
from cl_platform.testing.watches import (
    Draws,
    Evaluating,
    Frozen,
    Snapshot,
    Snapshots,
    Terms,
    Writes,
    tasks_in,
)

T = TypeVar("T")
SHORT, LONG = 1, 16
"""Epochs of a task, and updates of the last one, from which the learning is told."""


@dataclass
class Course:
    """A learner, and what was noted while it learnt.

    Attributes:
        learner: behind its last task.
        phases: what it was trained on.
        snapshots: one behind each phase.
    """

    learner: ContinualLearner
    phases: Sequence[Phase]
    snapshots: list[Snapshot]
    draws: Draws = field(default_factory=Draws)
    terms: Terms = field(default_factory=Terms)
    frozen: Frozen = field(default_factory=Frozen)
    writes: Writes = field(default_factory=Writes)
    evaluating: Evaluating | None = None

    @property
    def tasks(self) -> list[Any]:
        """All tasks that were learnt."""
        return [task for phase in self.phases for task in tasks_in(phase)]


class Trials:
    """What is looked at: a strategy on three small tasks, trained once, and again where a check compares.

    Args:
        given: the strategy and its keys.
    """

    def __init__(self, given: Given) -> None:
        self.given, self.stream = given, small_stream()
        self._made: dict[str, Any] = {}

    def new(self, seed: int = 0, stream: Stream | None = None) -> ContinualLearner:
        """A learner that has learnt nothing.

        Raises:
            UserError: strategies that cannot stand side by side, or keys that do not fit.
        """
        stream = self.stream if stream is None else stream
        return small_learner(self.given.composition(), stream, self.given.rule(), seed)

    def build(self) -> None:
        """Build the learner that :attr:`main` will train, unless it is there.

        Raises:
            UserError: strategies that cannot stand side by side, or keys that do not fit.
        """
        if "main" in self._made or "built" in self._made:
            return
        try:
            self._made["built"] = self.new()
        except UserError:
            raise
        except Exception:
            return  # told by what needs it

    def epochs(self, phases: Sequence[Phase]) -> list[int]:
        """How long the phases of the whole stream are trained: the last one is long enough to learn it."""
        return [SHORT] * (len(phases) - 1) + [-(-LONG * BATCH // len(phases[-1].task.train))]

    @property
    def main(self) -> Course:
        """All tasks, watched by what leaves no trace.

        Raises:
            NotReady: the training raised.
        """
        return self._once("main", "check_trains", self._main)

    def _main(self) -> Course:
        learner, shots = self._made.pop("built", None) or self.new(), Snapshots()
        phases = learner.composition.arrange(self.stream.tasks)
        course = Course(learner, phases, shots.taken)
        watches: list[Watch] = [course.draws, course.terms, course.frozen, course.writes, shots]
        learn(learner, phases, self.epochs(phases), watches)
        return course

    @property
    def watched(self) -> Course:
        """The first two phases once more, evaluated at every step."""
        return self._once(
            "watched", "check_evaluation_changes_nothing", lambda: self._first(2, [Evaluating(self.images)])
        )

    def take_watched(self) -> Course:
        """:attr:`watched`, to be changed: whoever asks for it next gets a new one."""
        course = self.watched
        del self._made["watched"]
        return course

    @property
    def again(self) -> Course:
        """The first two phases once more, exactly as they were."""
        return self._once("again", "check_seeds_reproduce", lambda: self._first(2))

    @property
    def other(self) -> Course:
        """The first phase with another seed."""
        return self._once("other", "check_seeds_reproduce", lambda: self._first(1, seed=1))

    @property
    def reproducible(self) -> bool:
        """Whether the same seed gives the same bytes, watched or not."""
        return self.same(self.watched) or self.same(self.again)

    def same(self, course: Course) -> bool:
        """Whether a course of the first phases went as the main one did."""
        return not differing(course.snapshots[-1], self.main.snapshots[len(course.phases) - 1])

    def _first(self, count: int, watches: Sequence[Watch] = (), seed: int = 0) -> Course:
        self.main  # noqa: B018  where that raises, nothing else is told
        learner, shots = self.new(seed), Snapshots()
        phases = learner.composition.arrange(self.stream.tasks)
        learn(learner, phases[:count], self.epochs(phases)[:count], [*watches, shots])
        evaluating = next((watch for watch in watches if isinstance(watch, Evaluating)), None)
        return Course(learner, phases[:count], shots.taken, evaluating=evaluating)

    def half_precision(self, watches: Sequence[Watch]) -> Course:
        """The second phase, or the only one, under ``bf16-mixed``."""
        phases = self.main.phases
        later = len(phases) > 1
        learner, chosen = (self.restored(0), slice(1, 2)) if later else (self.new(), slice(0, 1))
        learn(learner, phases[chosen], self.epochs(phases)[chosen], watches, "bf16-mixed")
        return Course(learner, phases[: chosen.stop], [])

    def restored(self, phase: int, stream: Stream | None = None) -> ContinualLearner:
        """A newly built learner with the state behind a phase of the main course, as a run goes on from a checkpoint.

        Raises:
            NotReady: the state does not load.
        """
        kept = self.main.snapshots[phase]
        learner = self.new(stream=stream)
        as_built = kept.frozen and not self.main.frozen.moved
        state = {n: t.clone() for n, t in kept.state.items() if not (as_built and n.startswith("backbone."))}
        try:
            learner.restore(state, kept.learnt, kept.frozen)
        except Exception as error:
            raise NotReady("check_state_is_restored", f"its state does not load: {cause(error)}", TRY) from error
        learner.further_updates = kept.further_updates
        return learner

    def go_on(self, learner: ContinualLearner, phase: int) -> ContinualLearner:
        """Train the next phase as the main course did."""
        phases = self.main.phases
        return learn(learner, phases[phase : phase + 1], self.epochs(phases)[phase : phase + 1])

    def refuse_draws(self) -> None:
        """Refuse to compare what differs between two trainings that are alike.

        Raises:
            NotReady: the same seed does not give the same bytes.
        """
        if not self.reproducible:
            raise NotReady("check_seeds_reproduce", "trained twice with one seed, other bytes came out", TRY)

    @property
    def images(self) -> Tensor:
        """Every third test image of the stream."""
        return self._once("images", "", lambda: images_of(self.stream)[::3].contiguous())

    def answers(self, learner: ContinualLearner) -> Tensor:
        """Logits of :attr:`images`."""
        return answers(learner, self.images)

    def _once(self, name: str, by: str, make: Callable[[], T]) -> T:
        if name not in self._made:
            try:
                self._made[name] = make()
            except Exception as error:
                self._made[name] = error
        found = self._made[name]
        if isinstance(found, NotReady):
            raise found
        if isinstance(found, Exception):
            raise NotReady(by, f"training raised {cause(found)}", TRY) from found
        return found


TRY = "Mend what raises"


def differing(one: Snapshot, other: Snapshot) -> list[str]:
    """Keys that only one side has, or whose bytes differ."""
    first, second = one.digests(), other.digests()
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))


def same_answers(one: Tensor, other: Tensor) -> bool:
    """Whether every bit is equal; a number that is none equals itself."""
    return one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
