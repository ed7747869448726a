"""Relearning (4.3.9): how many steps a model needs to learn the forgotten task again."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_platform.batch import Batch
from cl_platform.errors import UserError
from cl_platform.evaluation import spaces_of
from cl_platform.finetuning import Finetuning, run_finetuning
from cl_platform.metrics.forgetting import RELEARNING_STEPS, relearn_ratio, relearn_steps, relearn_target
from cl_platform.metrics.measured import Measured, undefined
from cl_platform.optimizers import build_optimizer
from cl_platform.random_streams import stream
from cl_platform.unlearning.figures import Sides
from cl_platform.unlearning.models import answers_to

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import Task

BATCH = 32
PURPOSE = "relearn"


def relearn(learner: ContinualLearner, task: Task, target: float) -> Measured:
    """Steps after which the test accuracy on ``task`` has reached ``target``, learning it as the run would.

    The parts of the task are made anew first, from the same keyed draws for every model; then the strategies' own
    losses are followed on batches of 32 of its training images, with the run's optimizer. Nothing is written.

    Args:
        learner: is used up: it learns the task, so it has to be a copy, and must not be kept.
        task: the forgotten one.
        target: see :func:`~cl_platform.metrics.forgetting.relearn_target`.
    """
    _renew(learner, task)
    if not learner.composition.needs_gradient or not any(group.parameters for group in learner.groups):
        return undefined("it is learnt in closed form, without steps")
    curve = [(0, _accuracy(learner, task))]
    optimizer = build_optimizer(learner.optimizer_config, learner.groups, BATCH)
    try:
        for number, (start, stop) in enumerate(pairwise(RELEARNING_STEPS)):
            if relearn_steps(curve, target).value is not None:
                break
            _leg(learner, task, optimizer, number, start, stop)
            curve.append((stop, _accuracy(learner, task)))
    except UserError as error:  # a loss that is not finite
        return undefined(f"relearning broke off: {error.allowed}")
    return relearn_steps(curve, target)


def relearning(found: Sides, target: Measured) -> dict[str, Sides]:
    """The two metrics of relearning, from the steps that each model needed."""
    return {
        "relearn_steps": found,
        "relearn_ratio": Sides(
            relearn_ratio(found.o, found.r), relearn_ratio(found.u, found.r), undefined("it is the reference itself")
        ),
    }


def target_of(o_forget_test: Measured) -> Measured:
    """The accuracy that counts as relearnt."""
    return relearn_target(o_forget_test)


def _renew(learner: ContinualLearner, task: Task) -> None:
    """Fresh parts for the task, whatever of it was there."""
    if task.task_id in learner.owners.learnt:
        learner.drop_task(task.task_id)
    per_epoch = -(-len(task.train) // BATCH)
    learner.begin_task(task, -(-RELEARNING_STEPS[-1] // per_epoch))
    learner.context.batches = per_epoch


def _leg(
    learner: ContinualLearner, task: Task, optimizer: torch.optim.Optimizer, number: int, start: int, stop: int
) -> None:
    seed, per_epoch = learner.options.seed, -(-len(task.train) // BATCH)

    def batch(step: int) -> tuple[Batch, int]:
        epoch, place = divmod(start + step, per_epoch)
        order = torch.randperm(len(task.train), generator=stream(seed, task.task_id, PURPOSE, epoch))
        rows = order[place * BATCH : (place + 1) * BATCH]
        chosen = task.train.select(rows)
        owner = torch.full_like(chosen.labels, task.task_id)
        made = Batch(
            images=chosen.images(slice(None)),
            labels=chosen.labels,
            example_ids=chosen.example_ids,
            task_ids=owner,
            is_replay=torch.zeros_like(owner, dtype=torch.bool),
            extra={"row": rows},
        )
        return made.to(learner.device), start + step

    def forward(drawn: tuple[Batch, int]) -> Tensor:
        return learner.training_step(*drawn)

    run_finetuning(
        learner,
        Finetuning(
            purpose=PURPOSE,
            seed=seed,
            task_id=task.task_id,
            number=number,
            steps=stop - start,
            parameters=[parameter for group in learner.groups for parameter in group.parameters],
            statistics=(),
            batch=batch,
            loss=lambda loss: loss,
            rate=lambda step: 0.0,
            key="optimizer.lr",
            optimizer=lambda: optimizer,
        ),
        forward,
        lambda loss: None,
        learner.precision_context,
    )


def _accuracy(learner: ContinualLearner, task: Task) -> float:
    with learner.answering():
        answers = answers_to(learner, task, "test", whole=False)
    return answers.correct[spaces_of(learner.setting)[0]] / len(answers.labels)
