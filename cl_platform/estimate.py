"""How long a run will take, from one timed forward pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import Stream
    from cl_platform.strategies.phases import Phase

BACKWARD_FROZEN, BACKWARD_TRAINED = 1.0, 2.0
"""Cost of a backward pass in forwards: through activations only, or with weight gradients."""


def estimate_seconds(
    learner: ContinualLearner, phases: Sequence[Phase], stream: Stream, epochs: int, batch_size: int, images: int
) -> float:
    """Seconds of training and evaluation ahead; rough, and free of side effects on the learner.

    Args:
        learner: before the first of ``phases``.
        phases: those ahead.
        stream: the scenario's tasks.
        epochs: of each phase.
        batch_size: images of a training batch.
        images: that one epoch of each phase passes over, remembered ones included.
    """
    forward = seconds_per_image(learner, batch_size)
    query = learner.composition.query
    step = 1 + (BACKWARD_TRAINED if query == "none" else BACKWARD_FROZEN)
    if query == "beside" and not learner.transforms.deterministic:
        step += 1
    once = 0 if query == "none" else images + sum(len(task.test) for task in stream.tasks)
    if query == "only":
        return forward * once
    tests = sum(len(task.test) for phase in phases for task in stream.tasks[: phase.position + 1])
    return forward * (images * epochs * step + once + tests)


def seconds_per_image(learner: ContinualLearner, batch_size: int) -> float:
    """Seconds of one image's forward pass in a training batch, the better of two after a warm-up."""
    size = learner.backbone.input_size
    images = torch.zeros(batch_size, 3, size, size, device=learner.device)
    best = float("inf")
    with learner.answering(), learner.precision_context():
        for attempt in range(3):
            start = time.perf_counter()
            learner.backbone(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if attempt:
                best = min(best, time.perf_counter() - start)
    return best / batch_size
