"""A request from its first check to its certificate, the same for a run in progress and for a folder on disk.

The engine knows run folders, learners and streams. What only a run can do (build a learner, relearn tasks, close its
files) it asks of a :class:`Site`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cl_platform.errors import UserError
from cl_platform.unlearning import certificate as certificates
from cl_platform.unlearning import forgotten as records
from cl_platform.unlearning import journal, rollback
from cl_platform.unlearning.approximately import approximate_option, approximated
from cl_platform.unlearning.audit import AuditLog
from cl_platform.unlearning.choice import Choice, Option, choose
from cl_platform.unlearning.closing import Work, commit, left_over, target_of
from cl_platform.unlearning.completion import finish
from cl_platform.unlearning.config import APPROXIMATE, UnlearningConfig, check_method
from cl_platform.unlearning.drop import METHOD as DROP
from cl_platform.unlearning.drop import drop, outcome, tried
from cl_platform.unlearning.forgotten import Forgotten, Record
from cl_platform.unlearning.pieces import Before
from cl_platform.unlearning.rollback import METHOD as ROLLBACK
from cl_platform.unlearning.rollback import Way, way_back

if TYPE_CHECKING:
    from torch import Tensor

    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import Stream

log = logging.getLogger("cl_platform")


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        task_id: the task to be forgotten.
        method: ``auto``, ``drop``, ``rollback`` or ``approximate:<name>``.
        trigger: ``in_stream``, ``sequence`` or ``command``.
        accept: level that ``auto`` is content with.
        purge_data_cache: whether the decoded images of the run's data set, outside the run, go as well.
        key: where the task stands, for messages.
        method_key: where the way stands.
    """

    task_id: int
    method: str = "auto"
    trigger: str = "command"
    accept: str = "E-bit"
    purge_data_cache: bool = False
    key: str = "--task"
    method_key: str = "--method"


@dataclass(frozen=True)
class Contents:
    """What a run leaves on disk at a bound between tasks.

    Attributes:
        position: of its newest checkpoint.
        tensors: of that.
        state: of that, plain JSON.
        files: further files of the run folder by name.
    """

    position: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    files: Mapping[str, str]


class Site(Protocol):
    """A run at a bound between two tasks, as its newest checkpoint has it."""

    @property
    def path(self) -> Path:
        """The run folder, locked."""

    @property
    def config(self) -> UnlearningConfig:
        """Keys of ``unlearning``."""

    @property
    def stream(self) -> Stream:
        """The run's stream by now."""

    @property
    def learner(self) -> ContinualLearner:
        """The live learner."""

    @property
    def record(self) -> Record:
        """What was forgotten by now."""

    @property
    def passed(self) -> int:
        """Tasks of the stream that were learnt, or learnt and forgotten in place."""

    @property
    def lineage(self) -> str:
        """Whether writes were held against the owner records: ``verified``, ``declared`` or ``violated``."""

    def data_cache(self) -> list[Path] | None:
        """Where the cache outside the run holds the decoded images of its data set; ``None`` where nobody can tell."""

    def facts(self) -> certificates.Run:
        """Which run it is."""

    def twin(self) -> ContinualLearner:
        """Another learner in the same state."""

    def price(self, way: Way) -> tuple[int, int]:
        """Training images and optimizer updates of a rollback's stages.

        Raises:
            UserError: data of a task are missing.
        """

    def spent(self) -> Mapping[str, Any]:
        """What the run has cost so far."""

    def take_note(self, record: Record, task_id: int) -> None:
        """The learner has forgotten a task: it leaves all results, in memory."""

    def contents(self) -> Contents:
        """What the run would write now."""

    def closed(self) -> AbstractContextManager[None]:
        """No file of the run is open inside the block."""

    def restored(self, folder: Path) -> ContinualLearner:
        """The learner of the newest checkpoint of a folder; one that learnt nothing where there is none."""

    def relearn(self, staging: Path, until: int) -> None:
        """Learn the stream of a folder up to a number of tasks, from its newest checkpoint."""


def check(site: Site, wish: Wish) -> None:
    """Refuse a task that cannot be forgotten.

    Raises:
        UserError: unknown, never learnt, already forgotten, or of a stream that tells of no tasks.
    """
    task_id, key = wish.task_id, wish.key
    order = [task.task_id for task in site.stream.tasks]
    learnt = [t for t in order[: site.passed] if t not in site.record.ids]
    known = f"Learnt are: {', '.join(map(str, learnt)) or 'none'}"
    if site.stream.hidden:
        raise UserError(
            key, task_id, "the bounds between tasks were hidden, so nothing tells what came from which",
            "Start a run with scenario.boundaries=shown",
        )  # fmt: skip
    if task_id in site.record.ids:
        raise UserError(key, task_id, "is forgotten already, and stays so", known)
    if task_id not in order:
        raise UserError(key, task_id, f"unknown; the stream has {', '.join(map(str, order))}", known)
    if task_id not in learnt:
        raise UserError(key, task_id, "was not learnt yet", known)
    check_method(wish.method, wish.method_key)


def plan(site: Site, wish: Wish) -> tuple[Choice, Way]:
    """What would be done, and the rollback that is one of the ways; nothing is changed.

    Raises:
        UserError: as :func:`check`, or no way is open.
    """
    check(site, wish)
    way = _way(site, wish.task_id)
    options: list[Option] = []
    if wish.method in ("auto", DROP):
        options.append(tried(site.twin(), wish.task_id, site.lineage))
    if wish.method in ("auto", ROLLBACK) or not options:
        kind = site.learner.device.type
        options.append(rollback.option(way, kind, site.price, site.spent()))
    if wish.method.startswith(APPROXIMATE):
        options.append(approximate_option(site, wish))
    return choose(wish.task_id, wish.method, options, wish.accept, wish.method_key), way


def forget(site: Site, wish: Wish, say: Callable[[str], None] = log.info) -> bool:
    """Forget a task: what holds it in the learner and in the run folder, with a certificate at the end.

    Args:
        site: see :class:`Site`.
        wish: what is asked for.
        say: takes lines for the user.

    Returns:
        whether the run folder holds another history now, of which the site knows nothing.

    Raises:
        UserError: as :func:`plan`; or what was to be done failed, and the request was given up or stays open.
    """
    choice, way = plan(site, wish)
    say(f"task {wish.task_id} is forgotten by {choice.option.method}: {choice.reason}")
    opened = journal.begin(site.path, _facts(wish, choice, way))
    audit = _audit(site)
    audit.append("request_opened", {"method": choice.option.method, "task_id": wish.task_id}, opened.request_id)
    return _carry_out(site, opened, say)


def settle(site: Site, say: Callable[[str], None] = log.info) -> bool | None:
    """Finish a request that a crash has left open.

    Returns:
        ``None`` where there is none, else as :func:`forget`.
    """
    opened = journal.find(site.path)
    if opened is None:
        return None
    say(f"a request to forget task {opened.facts['task_id']} was left open and is finished now")
    _audit(site).append("resumed_after_crash", {"task_id": opened.facts["task_id"]}, opened.request_id)
    if opened.ready:
        with site.closed():
            _finish(site, opened)
        return True  # what the site has read may be older
    opened.start_over()
    return _carry_out(site, opened, say)


def _carry_out(site: Site, opened: journal.Journal, say: Callable[[str], None]) -> bool:
    """Do what an open request asks for, up to its certificate."""
    facts = opened.facts
    method: str = facts["method"]
    start = time.perf_counter()
    before = Before.of(site.learner, opened.salt)
    target = target_of(site, facts)
    try:
        work = _relearnt(site, opened, before) if method == ROLLBACK else _changed(site, opened, before)
    except UserError as error:  # nothing of the run was touched
        why = {"key": error.key, "method": method, "task_id": facts["task_id"]}
        _audit(site).append("request_refused", why, opened.request_id)
        opened.destroy()
        raise
    with site.closed():
        gone = commit(site, opened, work, target, time.perf_counter() - start)
        _finish(site, opened)
        for line in left_over(site, target, gone):
            log.warning("%s", line)
    leaks = f"; left: {', '.join(work.outcome.leaks)}" if work.outcome.leaks else ""
    say(f"task {facts['task_id']} is forgotten: {work.outcome.level}{leaks}; unlearning/certificate.json says how")
    return method == ROLLBACK


def _changed(site: Site, opened: journal.Journal, before: Before) -> Work:
    """Drop, or an approximate method: the live learner is changed, and its newest checkpoint with it."""
    facts = opened.facts
    learner, task_id = site.learner, facts["task_id"]
    if facts["method"] == DROP:
        work = Work(before, drop(learner, task_id, before, site.lineage), learner)
    else:
        work = approximated(site, facts, before)
    record = site.record.with_entry(_entry(site, facts, work.outcome.level, in_place=True))
    site.take_note(record, task_id)
    made = site.contents()
    opened.stage_checkpoint(made.position, made.tensors, made.state)
    for name, text in made.files.items():
        opened.stage(name, text.encode())
    opened.stage(records.FILE, records.to_text(record).encode())
    return work


def _relearnt(site: Site, opened: journal.Journal, before: Before) -> Work:
    """Relearn beside the old history, to take its place."""
    facts = opened.facts
    way = Way.from_json(facts["way"])
    level = rollback.level(site.learner.device.type)
    record = site.record.with_entry(_entry(site, facts, level, in_place=False)).leaving_out()
    staging = opened.folder / rollback.STAGING
    rollback.prepare(site.path, staging, way, record)
    site.relearn(staging, way.until)
    _audit(site).append("stage_relearned", {"tasks": list(way.stages)}, opened.request_id)
    opened.stage(records.FILE, records.to_text(record).encode())
    relearnt = site.restored(staging)
    found = outcome(relearnt, facts["task_id"], before, changed="retrained")
    work = Work(before, replace(found, level=level, leaks=(), holders=()), relearnt)
    work.images, work.steps = facts["price"]["images"], facts["price"]["steps"]
    work.rewrites, work.removals = rollback.exchange(site.path, staging, way)
    return work


def _finish(site: Site, opened: journal.Journal) -> None:
    anchor = site.config.anchor
    finish(opened, _audit(site), site.stream.class_names, None if anchor is None else Path(anchor))


def _way(site: Site, task_id: int) -> Way:
    order = [task.task_id for task in site.stream.tasks]
    gone = {*site.record.ids, task_id}
    ended = site.passed == len(order)
    foresees, ends = site.learner.composition.foresees, site.stream.ends[:-1]
    return way_back(site.path, order, site.passed, sorted(gone), foresees, ended, ends)


def _facts(wish: Wish, choice: Choice, way: Way) -> dict[str, Any]:
    """What the journal has to know to work the request out again after a crash."""
    return {
        **asdict(wish),
        "requested": wish.method,
        "method": choice.option.method,
        "reason": choice.reason,
        "price": asdict(choice.option.price),
        "way": way.to_json(),
    }


def _entry(site: Site, facts: Mapping[str, Any], level: str, in_place: bool) -> Forgotten:
    newest = site.stream.tasks[site.passed - 1].task_id
    return Forgotten(facts["task_id"], facts["method"], level, newest, in_place)


def _audit(site: Site) -> AuditLog:
    return AuditLog(site.path / "unlearning" / "audit.jsonl", site.stream.class_names)
