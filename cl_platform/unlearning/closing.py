"""From what was done to a learner to the plan on disk: every file's fate, and the certificate but for its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cl_platform.unlearning import certificate as certificates
from cl_platform.unlearning import purge
from cl_platform.unlearning.canonical import fingerprint
from cl_platform.unlearning.certificate import DATA_CACHE, NEVER_COVERED, NOT_MEASURED, Cost, Method, Target
from cl_platform.unlearning.lineage import BOOKKEEPING, learnt_state, undeclared
from cl_platform.unlearning.pieces import Before
from cl_platform.unlearning.redaction import Subject, shared_classes
from cl_platform.unlearning.reference import read_json
from cl_platform.unlearning.rollback import METHOD
from cl_platform.unlearning.scan import needles

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.unlearning.drop import Outcome
    from cl_platform.unlearning.engine import Site
    from cl_platform.unlearning.journal import Journal


@dataclass
class Work:
    """What was done to a learner.

    Attributes:
        before: the learner before it.
        outcome: what is left of the task.
        learner: after it.
        params: hyper-parameters of an approximate method.
        images: training images that it took.
        steps: optimizer updates that it took.
        rewrites: files of the run folder with new content that lies elsewhere -> where, relative to the run folder.
        removals: files of the run folder that go whatever they hold -> why.
    """

    before: Before
    outcome: Outcome
    learner: ContinualLearner
    params: dict[str, Any] = field(default_factory=dict)
    images: int = 0
    steps: int = 0
    rewrites: dict[str, str] = field(default_factory=dict)
    removals: dict[str, str] = field(default_factory=dict)


def target_of(site: Site, facts: Mapping[str, Any]) -> Target:
    """What is to be forgotten, counted while it is still there."""
    task = site.stream.task(facts["task_id"])
    buffer = site.learner.context.buffer
    held = 0 if buffer is None else int((buffer.contents.task_ids == task.task_id).sum())
    images = len(task.train) or _recorded_images(site, task.task_id)
    return Target(task.task_id, tuple(sorted(task.classes)), images, held, facts["trigger"])


def _recorded_images(site: Site, task_id: int) -> int:
    """Training images of a task as the run has noted them."""
    tasks = (read_json(site.path / "environment.json").get("dataset") or {}).get("tasks") or []
    return next((int(task["train"]) for task in tasks if task["task_id"] == task_id), 0)


def commit(site: Site, opened: Journal, work: Work, target: Target, seconds: float) -> dict[str, bytes]:
    """Put the plan on disk; gives what to search files for, by name of the tensor that is gone.

    Args:
        site: the run, its files closed.
        opened: the request, new contents staged.
        work: what was done.
        target: what was to be forgotten.
        seconds: that it took.
    """
    facts = opened.facts
    gone = needles(work.before.leads, learnt_state(work.learner))
    actions = purge.plan_purge(opened, subject_of(site, target), gone, work.rewrites, work.removals)
    outside = site.data_cache() if facts["purge_data_cache"] else None
    uncovered = NEVER_COVERED if outside is not None else (*NEVER_COVERED, DATA_CACHE)
    if not any(len(task.test) for task in site.stream.tasks):
        uncovered = (*uncovered, NOT_MEASURED)
    price = facts["price"]
    draft = certificates.draft(
        request_id=opened.request_id,
        created_utc=opened.created_utc,
        run=site.facts(),
        target=target,
        method=Method(facts["requested"], facts["method"], facts["reason"], work.params),
        level=work.outcome.level,
        lineage=_lineage(site, facts["method"]),
        leaks=work.outcome.leaks,
        fingerprint=fingerprint(site.learner.device),
        components=work.outcome.components,
        cost=Cost(seconds, images=work.images, optimizer_steps=work.steps),
        estimated=Cost(price["seconds"] or 0.0, images=price["images"], optimizer_steps=price["steps"]),
        not_covered=uncovered,
        bookkeeping_excluded=list(BOOKKEEPING),
    )
    opened.commit(actions, draft, outside or (), site.stream.class_names)
    return gone


def left_over(site: Site, target: Target, gone: Mapping[str, bytes]) -> list[str]:
    """A line for each file of the run folder that still holds a tensor which is gone, after all was purged."""
    hits = purge.leftovers(site.path, subject_of(site, target), gone)
    return [f"{hit.path} still holds {hit.name}, which was to go: delete it" for hit in hits]


def subject_of(site: Site, target: Target) -> Subject:
    """The task as the purge of files knows it."""
    classes = {task.task_id: task.classes for task in site.stream.tasks}
    shared = shared_classes(classes, target.task_id, site.record.ids)
    own = tuple(c for c in target.class_ids if c not in shared)
    names = tuple(site.stream.class_names[c] for c in own)
    position = site.stream.task(target.task_id).position
    return Subject(target.task_id, position, target.class_ids, own, names)


def _lineage(site: Site, method: str) -> str:
    """On what the level stands: whether writes were held against the owner records while the stream was learnt.

    What was relearnt without the task is exact whatever the records say.
    """
    found = "violated" if undeclared(site.learner) else site.lineage
    return "declared" if found == "violated" and method == METHOD else found
