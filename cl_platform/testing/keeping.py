"""Checks that what is learnt is kept, goes on from what is kept, and depends on the seed and the data alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_platform.evaluation import count_correct
from cl_platform.learner import ContinualLearner
from cl_platform.testing.contract import promise
from cl_platform.testing.failures import Breach, cause, listed
from cl_platform.testing.trials import Trials, differing, same_answers
from cl_platform.testing.watches import Snapshot


@promise
def check_state_is_restored(trials: Trials) -> None:
    """``state_dict`` holds all that was learnt: a new learner that loads it has the same bytes and gives the same
    answers, bit for bit."""
    course = trials.main
    advice = (
        "Keep what is learnt in parameters, buffers or Slots; where a buffer grows, give it its size in "
        "_load_from_state_dict before it is filled"
    )
    if course.frozen.outside:
        shapes = listed([str(shape) for shape in course.frozen.outside])
        raise Breach(f"trainable() yields parameters that are in no module of the strategy, of shape {shapes}", advice)
    kept = course.snapshots[-1]
    other = trials.new()
    try:
        other.load_state_dict({name: tensor.clone() for name, tensor in kept.state.items()})
    except Exception as error:
        raise Breach(f"load_state_dict into a new learner raised {cause(error)}", advice) from error
    other.learnt = list(kept.learnt)
    changed = differing(Snapshot.of(other), kept)
    if changed:
        raise Breach(f"after load_state_dict into a new learner, {listed(changed)} has other bytes", advice)
    wanted = trials.answers(course.learner)
    try:
        found = trials.answers(other)
    except Exception as error:
        raise Breach(f"a new learner with the same state cannot answer: {cause(error)}", advice) from error
    if not same_answers(found, wanted):
        raise Breach(
            f"a new learner with the same state answers otherwise ({_share(found, wanted)}): something that answers "
            "is not in state_dict()", advice,
        )  # fmt: skip


def _share(found: Tensor, wanted: Tensor) -> str:
    if found.shape != wanted.shape:
        return f"{found.shape[1]} columns in place of {wanted.shape[1]}"
    return f"{int((found != wanted).any(1).sum())} of {len(found)} images"


@promise
def check_resuming_equals_never_stopping(trials: Trials) -> None:
    """A new learner that goes on from the state behind the first task ends the second with the same bytes."""
    course = trials.main
    if len(course.phases) < 2:
        return  # all tasks are trained on together
    learner = trials.restored(0)
    try:
        trials.go_on(learner, 1)
    except Exception as error:
        raise Breach(f"training on from a restored state raised {cause(error)}", GO_ON) from error
    changed = differing(Snapshot.of(learner), course.snapshots[1])
    if changed:
        trials.refuse_draws()
        raise Breach(
            f"after a restart behind the first task, {listed(changed)} ends the second with other bytes", GO_ON
        )


GO_ON = (
    "Counters, teachers, buffers and statistics that training reads belong into state_dict(); look parameters up in "
    "begin_task, and key draws by (seed, task id, purpose) instead of counting them"
)


@promise
def check_evaluation_changes_nothing(trials: Trials) -> None:
    """Training with evaluation at every step and without it ends with the same bytes; an evaluation leaves weights,
    modes, gradients and generators as they were."""
    advice = "predict() and forward() in eval mode must not write: no counters, statistics, draws or caches that train"
    watched = trials.watched
    if not trials.same(watched) and trials.same(trials.again):
        changed = differing(watched.snapshots[-1], trials.main.snapshots[len(watched.phases) - 1])
        raise Breach(f"trained with evaluation at every step, {listed(changed)} has other bytes than without", advice)
    learner, before = watched.learner, Snapshot.of(watched.learner)
    learner.train()
    facts = _facts(learner)
    count_correct(learner, watched.tasks)
    trials.answers(learner)
    changed = differing(Snapshot.of(learner), before)
    if changed and trials.reproducible:
        raise Breach(f"one evaluation changed {listed(changed)}", advice)
    for (name, value), (_, now) in zip(facts, _facts(learner), strict=True):
        if value != now:
            raise Breach(f"one evaluation changed {name}", advice)


def _facts(learner: ContinualLearner) -> list[tuple[str, object]]:
    gradients = [None if p.grad is None else float(p.grad.double().sum()) for p in learner.parameters()]
    return [
        ("the mode of a module", [module.training for module in learner.modules()]),
        ("what is in training", [p.requires_grad for p in learner.parameters()]),
        ("a gradient", gradients),
        ("the global generator", torch.get_rng_state().numpy().tobytes()),
        ("whether gradients are recorded", torch.is_grad_enabled()),
    ]


@promise
def check_seeds_reproduce(trials: Trials) -> None:
    """The same seed gives the same bytes; another gives other answers, unless the strategy says that it draws
    nothing."""
    if not trials.reproducible:
        changed = differing(trials.again.snapshots[-1], trials.main.snapshots[len(trials.again.phases) - 1])
        raise Breach(
            f"trained twice with one seed, {listed(changed)} has other bytes",
            "Draw from cl_platform.random_streams.stream(seed, task_id, purpose) alone; iterate over sorted things; "
            "keep nothing from one learner to the next in a class or module",
        )
    draws = any(strategy.draws for strategy in trials.main.learner.composition.strategies)
    assert trials.watched.evaluating is not None
    alike = same_answers(trials.watched.evaluating.answers[0], trials.answers(trials.other.learner))
    if draws and alike:
        raise Breach(
            "another seed gives the same answers",
            "Key draws by context.seed; where nothing is drawn at all, say draws = False",
        )
    if not draws and not alike:
        raise Breach("another seed gives other answers, and draws is False", "Leave draws out")


@promise
def check_no_draw_from_global_generators(trials: Trials) -> None:
    """Neither the bounds of a task nor a step draw from the global generators of torch, numpy or Python; a step may
    where the strategy has dropout."""
    for name, where in trials.main.draws.found.items():
        raise Breach(
            f"the global generator of {name} was drawn from in {where}",
            "Draw with generator=cl_platform.random_streams.stream(context.seed, task_id, purpose), in a step with "
            "context.step_stream(purpose); wrap what takes no generator in seeded_globals",
        )
