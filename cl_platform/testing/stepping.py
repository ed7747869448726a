"""Checks of a training step: what its losses reach, what moves, and what it waits for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cl_platform.learner import ContinualLearner
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.scenarios import Task, TaskLoader
from cl_platform.slots import Slots
from cl_platform.testing.contract import promise
from cl_platform.testing.failures import Breach, cause, listed
from cl_platform.testing.small import BATCH
from cl_platform.testing.trials import Trials, differing
from cl_platform.testing.watches import Snapshot

NOTHING = torch.device("meta")


@promise
def check_loss_terms_reach_what_is_trained(trials: Trials) -> None:
    """Each loss term is a finite scalar that moves the gradient of a trained parameter; each of these gets one."""
    course = trials.main
    if not course.learner.composition.needs_gradient:
        return
    terms = course.terms
    for name, what in terms.odd.items():
        raise Breach(f"the loss term {name} is no finite scalar ({what})", "Return the mean over the batch")
    idle = [name for name, moves in terms.moving.items() if not moves]
    if idle:
        raise Breach(
            f"the loss term {listed(idle)} moves the gradient of no trained parameter in any step",
            "Compute it from step.logits, step.features or trained parameters without detach() or no_grad(), and "
            "yield what it is to move from trainable(); leave a term out while there is nothing to compare with",
        )
    if not terms.moving:
        raise Breach(
            "no step has a loss term",
            "Return {name: scalar} from losses(), or say needs = Needs(gradient=False) and learn in end_task",
        )
    if terms.untouched:
        raise Breach(
            f"{listed(sorted(terms.untouched))} is to be trained, and no loss term reaches it",
            "Leave it out of trainable(), or use it in forward()",
        )


@promise
def check_a_buffer_changes_what_is_learnt(trials: Trials) -> None:
    """With its replay buffer emptied, the next task ends with other weights: what is remembered is used."""
    course = trials.main
    if len(course.phases) < 2:
        return
    held = {n: m for n, m in course.learner.named_modules() if isinstance(m, ReplayBuffer) and m.owners()}
    if not held:
        return
    rooms = tuple(f"{name}." for name in held)
    learner = trials.restored(0)
    for buffer in (module for module in learner.modules() if isinstance(module, ReplayBuffer)):
        for task_id in sorted(buffer.owners()):
            buffer.drop_task(task_id)
    trials.go_on(learner, 1)
    changed = [name for name in differing(Snapshot.of(learner), course.snapshots[1]) if not name.startswith(rooms)]
    if not changed:
        raise Breach(
            "with an empty buffer the next task ends with the same weights: what is remembered is never used",
            "Append a draw from the buffer in widen(), or use one in losses() or after_backward()",
        )


@promise
def check_frozen_weights_stay(trials: Trials) -> None:
    """While a task is trained, nothing moves but the parameters that ``trainable()`` yields."""
    moved = trials.main.frozen.moved
    if moved:
        task_id = next(iter(moved.values()))
        raise Breach(
            f"{listed(list(moved))} moved while task {task_id} was trained, and trainable() does not yield it",
            "Yield it from trainable(), or from further_parameters() where it moves outside the steps; else leave it",
        )


@promise
def check_a_step_does_not_wait_for_the_device(trials: Trials) -> None:
    """No step makes the host wait: it runs on a device without numbers, where reading one fails. ``waits`` declares an
    exception."""
    course = trials.main
    composition = course.learner.composition
    if not composition.needs_gradient or any(strategy.waits for strategy in composition.strategies):
        return
    later = len(course.phases) > 1
    learner = trials.restored(0) if later else trials.new()
    learner.trainer = course.learner.trainer
    phase = course.phases[1 if later else 0]
    try:
        _step_without_numbers(learner, phase.task)
    except (RuntimeError, NotImplementedError, Waits) as error:
        raise Breach(
            f"a step on a device without numbers raised {cause(error)}",
            "Keep numbers on the device: no item(), tolist(), nonzero(), if or index by a condition in a step; move "
            "host tensors with non_blocking=True (cl_platform.batch.constant). Where a value must be read, declare "
            "waits = 'what is read, and why'",
        ) from error


class Waits(Exception):
    """A copy for which the host waits."""


class NoBlockingCopies(TorchFunctionMode):
    """Refuses copies from the host for which it would wait."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``, and look at what it copied."""
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor") and made.device == NOTHING:
            raise Waits(f"torch.{name}(..., device=...) waits for its copy")
        moves = name in ("to", "copy_", "cuda") and isinstance(made, torch.Tensor) and made.device == NOTHING
        if moves and args[0].device != NOTHING and not kwargs.get("non_blocking"):
            raise Waits("a copy to the device without non_blocking=True")
        for index in args[1:] if name == "__getitem__" and args[0].device == NOTHING else ():
            for part in index if isinstance(index, tuple) else (index,):
                if isinstance(part, list) or (isinstance(part, torch.Tensor) and part.device != NOTHING):
                    raise Waits("an index from the host is copied while the host waits")
        return made


@contextmanager
def autocast_without_numbers() -> Iterator[None]:
    """Autocast regions of the device without numbers are those of the CPU, off as they are."""
    real = torch.autocast

    def autocast(device_type: str, **keys: Any) -> Any:
        return real("cpu" if device_type == "meta" else device_type, **keys)

    torch.autocast = autocast  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch.autocast = real  # type: ignore[misc]


def _step_without_numbers(learner: ContinualLearner, task: Task) -> None:
    """The first step of a task on the device without numbers; the rule's own arithmetic is left out."""
    learner.begin_task(task, 1)
    optimizer = without_numbers(learner)
    loader = TaskLoader(task.train, task.task_id, BATCH, learner.options.seed)
    moved = learner.transfer_batch_to_device(next(iter(loader)), NOTHING, 0)
    with autocast_without_numbers(), NoBlockingCopies():
        learner.training_step(moved, 0).backward()
        learner.on_after_backward()
        learner.on_before_optimizer_step(optimizer)
        learner.composition.after_update(learner._last_step)  # type: ignore[arg-type]
        learner.on_train_batch_end(None, moved, 0)


def without_numbers(learner: ContinualLearner) -> torch.optim.Optimizer:
    """Move a learner whose task has begun to the device without numbers; gives the task's update rule."""
    learner._refuse_infinite = lambda: None  # type: ignore[method-assign]  # asked at every tenth step only
    for slots in (module for module in learner.modules() if isinstance(module, Slots)):
        for task_id, slot in slots.tasks.items():  # whole numbers are read once, and kept on the host
            for key, tensor in slot.named_buffers():
                if tensor.dtype == torch.int64:
                    slots.numbers(int(task_id), key)
    learner.to(NOTHING)
    learner.groups = learner.composition.trainable()
    if learner._train_query is not None:
        learner._train_query = learner._train_query.to(NOTHING)
    optimizer: torch.optim.Optimizer = learner.configure_optimizers()["optimizer"]
    learner.context.optimizer = lambda: optimizer
    return optimizer
