"""A copy of a learner that can be changed without a trace in it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cl_platform.scenarios import ImageSet, Task

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner


def copied(learner: ContinualLearner, share_frozen: bool = False) -> ContinualLearner:
    """A learner of its own with the same numbers, outside any trainer, in float32 throughout.

    It shares with the original what nobody writes to: images, kept features, and tensors that a finished step left in
    the middle of a graph.

    Args:
        learner: stays as it is.
        share_frozen: a frozen trunk's weights as well; for copies that leave it frozen.
    """
    shared: list[Any] = [learner._trainer, learner.timed, learner.task, learner._train_query, learner._last_step]
    shared += [tensor for kept in learner.cache._kept.values() for tensor in kept]
    if share_frozen and learner.backbone.frozen:
        shared += [p for p in learner.backbone.parameters() if not p.requires_grad]
    for module in learner.modules():
        shared += [value for value in vars(module).values() if _is_shared(value)]
    memo: dict[int, Any] = {id(value): value for value in shared if value is not None}
    memo[id(learner.terms)] = {}
    twin = copy.deepcopy(learner, memo)
    twin._trainer, twin.timed, twin._last_step = None, nullcontext, None
    return twin


def _is_shared(value: Any) -> bool:
    return isinstance(value, (Task, ImageSet)) or (isinstance(value, Tensor) and value.grad_fn is not None)
