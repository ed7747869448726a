"""Checks of who shaped what, and of what is left of a task once it is dropped."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

from torch import Tensor

from cl_platform.learner import ContinualLearner
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.strategies.base import LEAKS
from cl_platform.testing.answering import refuse_odd_answers
from cl_platform.testing.contract import promise
from cl_platform.testing.failures import Breach, expected, listed
from cl_platform.testing.small import learn, without
from cl_platform.testing.trials import Trials
from cl_platform.unlearning.canonical import digests
from cl_platform.unlearning.lineage import components, full_names, holders, learnt_state, undeclared


@promise
def check_lineage_is_true(trials: Trials) -> None:
    """Every learnt tensor is in one component, and whatever changes while a task is learnt lists the task."""
    course = trials.main
    learner = course.learner
    missing = undeclared(learner)
    if missing:
        raise Breach(
            f"{listed(missing)} is in no component",
            "Yield a Component(name, tasks, kind, tensors) for it from components(), or keep it in Slots",
        )
    _refuse_names(learner)
    wrong = [write for write in course.writes.found if write.name not in course.frozen.moved]
    if wrong:
        raise Breach(
            str(wrong[0]) + (f" ({len(wrong) - 1} more such)" if len(wrong) > 1 else ""),
            "List in Component.tasks every task whose images shaped the tensor, dropped ones included; "
            "context.behind(task_id) are those behind a task",
        )
    unknown = sorted({leak for s in learner.composition.strategies for leak in s.leaks if leak not in LEAKS})
    if unknown:
        raise Breach(f"leaks names {listed(unknown)}", f"Use the names {min(LEAKS)} to {max(LEAKS)} of LEAKS")


def _refuse_names(learner: ContinualLearner) -> None:
    """Refuse components whose names are not the keys of the state, that share a tensor, or list a task never begun."""
    found, known = components(learner), learner.owners.known() | set(learner.learnt)
    state = dict(learner.state_dict()) | dict(learner.named_buffers())
    names = [name for component in found for name in full_names(component)]
    advice = "name is the prefix of the keys in the strategy's state_dict(), and tensors holds the rest of each key"
    strange = [name for name in names if name not in state]
    if strange:
        raise Breach(f"components() names {listed(strange)}, which the state does not have", advice)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise Breach(f"{listed(twice)} is in two components", "Put it into one that lists all its tasks")
    for component in found:
        strangers = sorted(set(component.tasks) - known)
        if strangers:
            raise Breach(f"{component.name} lists task {strangers[0]}, which was never learnt", "List task ids")


@promise
def check_a_dropped_task_is_not_referenced(trials: Trials) -> None:
    """Behind ``drop_task`` its parts are gone from the state, from memory, from the answers and from the buffers."""
    refuse_odd_answers(trials)
    course = trials.take_watched()
    learner = course.learner
    gone = course.tasks[-1]
    own = {n: weakref.ref(t) for n, t in _tensors(learner).items() if f".tasks.{gone.task_id}." in n}
    classes = learner.owners.classes_of_none_but(gone.task_id)
    advice = (
        "drop_task(task_id) takes away all that the task owns, and calls super(); let_go() forgets references to its "
        "parameters outside the state"
    )
    with expected(f"drop_task({gone.task_id})", advice):
        learner.drop_task(gone.task_id)
        logits = trials.answers(learner) if learner.learnt else None
    left = set(learner.seen_classes()) & set(classes)
    if left or (logits is not None and logits.shape[1] != len(learner.seen_classes())):
        raise Breach(f"classes {sorted(left)} of the dropped task are answered still", advice)
    _refuse_references(learner, own, advice)
    declared = {n for c in components(learner) if gone.task_id in c.tasks for n in full_names(c)}
    keys = [n for n in learnt_state(learner) if f".tasks.{gone.task_id}." in n and n not in declared]
    if keys:
        raise Breach(f"{listed(keys)} is in the state still, and its component does not list the task", advice)
    for name, module in learner.named_modules():
        if isinstance(module, ReplayBuffer) and gone.task_id in module.owners():
            raise Breach(f"{name} holds images of the dropped task", f"{advice}, and buffer.drop_task(task_id)")


def _tensors(learner: ContinualLearner) -> dict[str, Tensor]:
    return dict(learner.named_parameters()) | dict(learner.named_buffers())


def _refuse_references(learner: ContinualLearner, own: dict[str, weakref.ref[Tensor]], advice: str) -> None:
    """Refuse tensors of the task that live on although the state does not hold them any more."""
    kept = {id(t) for t in _tensors(learner).values()}
    if any((tensor := ref()) is not None and id(tensor) not in kept for ref in own.values()):
        gc.collect()
    alive = {name: tensor for name, ref in own.items() if (tensor := ref()) is not None and id(tensor) not in kept}
    if not alive:
        return
    where = _holder(learner, next(iter(alive.values())))
    raise Breach(f"{listed(list(alive))} is referenced still{where}", advice)


def _holder(learner: ContinualLearner, tensor: Tensor) -> str:
    """Where a strategy keeps a reference, one level below an attribute at most."""
    for strategy in learner.composition.strategies:
        for key, value in vars(strategy).items():
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            flat = [part for entry in inner for part in (entry if isinstance(entry, (list, tuple)) else [entry])]
            if value is tensor or any(part is tensor for part in flat):
                return f", by {type(strategy).__name__}.{key}"
    return ""


@promise
def check_a_drop_claims_no_more_than_it_does(trials: Trials) -> None:
    """Where no component lists a dropped task any more, the bytes are those of a learner that never saw it."""
    course = trials.main
    if len(course.phases) < 2:
        return
    first, second = course.tasks[0], course.tasks[1]
    if not course.learner.composition.apart(first.task_id):
        return  # later tasks say that they are built on it
    learner = trials.restored(1)
    learner.drop_task(first.task_id)
    if holders(learner, first.task_id):
        return  # it says that something is left
    reduced = without(trials.stream, first.task_id)
    other = trials.new(stream=reduced)
    phases = other.composition.arrange(reduced.tasks)
    learn(other, phases[:1], trials.epochs(course.phases)[1:2])
    assert phases[0].task.task_id == second.task_id
    one, never = digests(learnt_state(learner)), digests(learnt_state(other))
    changed = sorted(n for n in {*one, *never} if one.get(n) != never.get(n))
    if changed:
        trials.refuse_draws()
        raise Breach(
            f"no component lists task {first.task_id} once it is dropped, yet {listed(changed)} has other bytes than "
            "in a learner that never saw it",
            "Name in leaks the channels through which tasks meet, or learn each task without a look at the others: own "
            "loss classes, own draws, no count of tasks",
        )
