"""Forgetting while a stream is learnt: requests and instructions are carried out between two tasks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import lightning as L

from cl_platform.errors import UserError
from cl_platform.unlearning import answers
from cl_platform.unlearning.engine import Site, Wish, forget, settle
from cl_platform.unlearning.lineage import WriteCheck
from cl_platform.unlearning.sequence import Instructions, Stage, refuse_unable

if TYPE_CHECKING:
    from cl_platform.metrics import Cell
    from cl_platform.scenarios import Stream, Task
    from cl_platform.unlearning.config import UnlearningConfig
    from cl_platform.unlearning.forgotten import Record

log = logging.getLogger("cl_platform")


class RunSite(Site, Protocol):
    """A run in progress, as the engine and the stages of a sequence see it."""

    def look_again(self) -> None:
        """Evaluate the newest task's row anew, and save."""

    def answers(self, anew: bool) -> dict[str, dict[int, Cell]]:
        """Right answers by prediction space, counted anew or those of the newest task's row."""

    def write(self, name: str, text: str) -> None:
        """Write a file of the run folder."""


class PrivateUnlearning(L.Callback):
    """Carries out what ``unlearning.requests`` or ``unlearning.sequence`` ask for, each at its place in the stream.

    Args:
        site: the run.
        config: keys of ``unlearning``.
        instructions: the sequence, if there is one.

    Attributes:
        replaced: the run folder holds another history than the one being learnt; the run goes on from its newest
            checkpoint.
        lineage: ``verified`` as long as no task has written outside what lists it as an owner, then ``violated``.
        stages_done: stages of the sequence that are behind the run.
        answered: after each of them, what the test images of the tasks held then were answered.

    Raises:
        UserError: a request that could never be carried out.
    """

    def __init__(self, site: RunSite, config: UnlearningConfig, instructions: Instructions | None) -> None:
        self._site, self._config, self._instructions = site, config, instructions
        self.replaced = False
        self.lineage = "verified"
        self.stages_done = 0
        self.answered: list[dict[str, Any]] = []
        self._writes = WriteCheck()
        check_requests(config, site.stream, site.record)
        if instructions is not None:
            refuse_unable(instructions, site.learner.composition)

    def settle(self, wish: Wish | None = None) -> None:
        """Before anything more is learnt: what a crash left open, what was asked for now, what is due by now."""
        if (found := settle(self._site)) is not None:
            self.replaced = found
        if not self.replaced and wish is not None:
            self.replaced = forget(self._site, wish)
        if not self.replaced and self._site.passed:
            self.end_task()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as plain JSON."""
        return {"lineage": self.lineage, "stages_done": self.stages_done, "answered": self.answered}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        self.lineage, self.stages_done = state["lineage"], state["stages_done"]
        self.answered = list(state.get("answered", ()))

    def learnt(self, task: Task) -> None:
        """Hold what changed while a task was learnt against the owner records."""
        parts = task.parts or (task,)
        writes = self._writes.after(self._site.learner, *(part.task_id for part in parts))
        if writes:
            self.lineage = "violated"
            log.warning("owner records: %s; nothing is forgotten exactly by deletion here", writes[0])

    def begin_task(self, task: Task) -> None:
        """Note what there is, and tell the strategies how the task is to be learnt."""
        self._writes.before(self._site.learner)
        if self._instructions is None:
            return
        stage = next(s for s in self._instructions if s.kind == "learn" and s.task_id == task.task_id)
        self._site.learner.composition.instruct(task.task_id, stage.instruction)

    def end_task(self) -> None:
        """What is due after the newest task."""
        for wish in due(self._config, self._site):
            self.replaced = forget(self._site, wish)
            if self.replaced:
                return
        if self._instructions is not None:
            self._note(self._last(self._instructions))
        for number, stage in self._stages():
            self.stages_done = number
            if stage.kind == "promote":
                self._site.learner.composition.promote(stage.task_id)
                self._site.look_again()
            elif stage.kind == "forget":
                key, purge = "unlearning.sequence", self._config.purge_data_cache
                wish = Wish(stage.task_id, "drop", "sequence", purge_data_cache=purge, key=key, method_key=key)
                forget(self._site, wish)
            self._note(stage)

    def _newest(self, instructions: Instructions) -> Stage:
        """The stage that learnt the newest task."""
        newest = self._site.stream.tasks[self._site.passed - 1].task_id
        return next(stage for stage in instructions if stage.kind == "learn" and stage.task_id == newest)

    def _last(self, instructions: Instructions) -> Stage:
        """The stage that is behind the run: that of the newest task, or one obeyed since, before an interruption."""
        return list(instructions)[max(self._newest(instructions).token, self.stages_done) - 1]

    def _note(self, stage: Stage) -> None:
        """Write down what is answered after a stage, and the averages over all stages so far."""
        told = answers.read(self._site.path)
        if any(entry["token"] == stage.token for entry in (*self.answered, *told)):
            self.answered = max(self.answered, told, key=len)
            return  # before the run was interrupted, or had ended
        self.answered.append(answers.entry(stage, self._site.answers(anew=stage.kind == "forget")))
        self._site.write(answers.FILE, answers.to_text(self.answered))

    def _stages(self) -> Iterator[tuple[int, Stage]]:
        """Stages from the newest task's own to the next one that learns, with their numbers, as far as not done yet."""
        if self._instructions is None:
            return
        stages = list(self._instructions)
        place = stages.index(self._newest(self._instructions))
        if self.stages_done <= place:
            self.stages_done = place + 1
        for number in range(place + 1, len(stages)):
            if stages[number].kind == "learn":
                return
            if number >= self.stages_done:
                yield number + 1, stages[number]


def due(config: UnlearningConfig, site: Site) -> list[Wish]:
    """Requests whose place in the stream is reached and that were not carried out, in their order."""
    if not config.requests or not site.passed:
        return []
    place = _places(site.stream)
    here = place[site.stream.tasks[site.passed - 1].task_id]
    found = []
    for number, request in enumerate(config.requests):
        if request.forget not in site.record.ids and place[request.after_task] <= here:
            at = f"unlearning.requests[{number}]"
            method, key = request.method, f"{at}.method"
            if method is None:
                method, key = config.method, "unlearning.method"
            accept, purge = config.accept, config.purge_data_cache
            found.append(Wish(request.forget, method, "in_stream", accept, purge, f"{at}.forget", key))
    return found


def check_requests(config: UnlearningConfig, stream: Stream, record: Record) -> None:
    """Refuse, before anything runs, what could never be carried out.

    Raises:
        UserError: a task that the stream does not have, one forgotten before it is learnt or twice, hidden bounds.
    """
    place = _places(stream)
    ids = [task.task_id for task in stream.tasks]
    seen: list[int] = []
    for number, request in enumerate(config.requests):
        key = f"unlearning.requests[{number}]"
        if stream.hidden:
            raise UserError(
                key, f"task {request.forget}", "hidden bounds tell of no tasks, so none can be forgotten",
                "Use scenario.boundaries=shown",
            )  # fmt: skip
        for name, task_id in (("after_task", request.after_task), ("forget", request.forget)):
            if task_id not in ids and task_id not in record.ids:
                raise UserError(
                    f"{key}.{name}", task_id, f"the stream has no such task; it has {', '.join(map(str, ids))}",
                    "Name one of them",
                )  # fmt: skip
        if place[request.forget] > place[request.after_task]:
            raise UserError(
                f"{key}.after_task", request.after_task, f"task {request.forget} is learnt later than that",
                f"Write after_task: {request.forget}, or a later task",
            )  # fmt: skip
        if request.forget in seen:
            raise UserError(f"{key}.forget", request.forget, "is forgotten by an earlier request", "Leave one out")
        seen.append(request.forget)


def _places(stream: Stream) -> dict[int, int]:
    """Place of every task of the scenario in the order of learning, of those left out as well."""
    ids: Sequence[int] = sorted([*(task.task_id for task in stream.tasks), *stream.left_out])
    return {task_id: number for number, task_id in enumerate(ids)}
