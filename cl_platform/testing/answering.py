"""Checks of what is answered: of each image by itself, without being told its task."""

from __future__ import annotations

import torch

from cl_platform.batch import Batch
from cl_platform.testing.contract import promise
from cl_platform.testing.failures import Breach, NotReady, expected
from cl_platform.testing.small import answers
from cl_platform.testing.trials import Trials, same_answers
from cl_platform.testing.watches import tasks_in

RTOL, ATOL = 1e-4, 1e-5
"""Within these the same answer counts as equal: matrix products of other shapes differ in their last bits."""
ALONE = 5


@promise
def check_answers_are_logits_of_the_seen_classes(trials: Trials) -> None:
    """Answers are finite float32 logits, a column for each class seen so far, in ascending class id."""
    look_at_answers(trials)


def refuse_odd_answers(trials: Trials) -> None:
    """Refuse to judge by answers that are none.

    Raises:
        NotReady: they are no logits of the seen classes.
    """
    try:
        look_at_answers(trials)
    except NotReady:
        raise
    except Breach as breach:
        raise NotReady("check_answers_are_logits_of_the_seen_classes", breach.seen, breach.todo) from breach


def look_at_answers(trials: Trials) -> None:
    """Ask a trained learner.

    Raises:
        Breach: its answers are no logits of the seen classes.
    """
    learner = trials.main.learner
    seen = sorted({c for task in trials.main.tasks for c in task.classes})
    advice = "predict(batch) returns (B, S) over the seen classes, ascending; seen_classes() names the columns"
    if list(learner.seen_classes()) != seen:
        raise Breach(f"seen_classes() is {list(learner.seen_classes())} after tasks with the classes {seen}", advice)
    with expected("answering", advice):
        logits = trials.answers(learner)
    if tuple(logits.shape) != (len(trials.images), len(seen)):
        raise Breach(f"{len(trials.images)} images got answers of shape {tuple(logits.shape)}; {len(seen)} classes "
                     "were seen", advice)  # fmt: skip
    if logits.dtype != torch.float32 or not bool(torch.isfinite(logits).all()):
        raise Breach(f"answers are {logits.dtype}, or not finite", advice)


@promise
def check_an_answer_does_not_depend_on_its_batch(trials: Trials) -> None:
    """One image alone, in a batch, in another order and among copies of another image: the same answer within
    ``rtol=1e-4, atol=1e-5``."""
    learner, images = trials.main.learner, trials.images
    expected_ = answers(learner, images)
    backwards = torch.arange(len(images) - 1, -1, -1)
    few = torch.linspace(0, len(images) - 1, ALONE).long()
    crowd = torch.cat([images[:1], images[-1:].expand(24, -1, -1, -1)])
    ways = {
        "alone": (answers(learner, images[few], 1), expected_[few]),
        "in another order": (answers(learner, images[backwards]), expected_[backwards]),
        "in batches of 7": (answers(learner, images[:21], 7), expected_[:21]),
        "among copies of another image": (answers(learner, crowd)[:1], expected_[:1]),
    }
    for way, (found, wanted) in ways.items():
        off = ~torch.isclose(found, wanted, rtol=RTOL, atol=ATOL, equal_nan=True)
        if bool(off.any()):
            largest = float((found - wanted).abs()[off].max())
            raise Breach(
                f"{int(off.any(1).sum())} of {len(found)} images are answered otherwise {way} than in one batch of "
                f"{len(images)} (largest difference {largest:.2g})",
                "Decide for every image by itself: no mean, vote or normalisation over the batch in predict() or "
                "forward(); layers with running statistics in eval mode",
            )


@promise
def check_no_task_id_at_test_time(trials: Trials) -> None:
    """Answers stay the same whatever task ids, labels and example ids stand beside the images, or none at all."""
    learner = trials.main.learner
    images = trials.images
    advice = "Infer the task from the image; batch.task_ids, labels and example_ids are -1 when an answer is wanted"
    with learner.answering():
        ready = learner.transforms.evaluate(images)
        extra = {} if learner.composition.query == "none" else {"query": learner.backbone(ready).float()}
        nothing = torch.full((len(images),), -1, dtype=torch.int64)
        plain = Batch(ready, nothing, nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool), extra)
        with expected("answering without task ids", advice):
            without = learner.composition.predict(plain)
        last = tasks_in(trials.main.phases[-1])[-1]
        columns = {
            "task ids": [{"task_ids": torch.full_like(nothing, t)} for t in (0, last.task_id, 77)],
            "labels": [{"labels": torch.full_like(nothing, c)} for c in (0, last.classes[0])],
            "example ids": [{"example_ids": torch.arange(len(images))}],
        }
        for name, changes in columns.items():
            for change in changes:
                with expected(f"answering with other {name}", advice):
                    found = learner.composition.predict(plain.replace(**change))
                if not same_answers(found, without):
                    value = next(iter(change.values()))[0]
                    raise Breach(f"with {name} of {int(value)} beside the images the answers are others than without",
                                 advice)  # fmt: skip
