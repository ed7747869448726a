"""Remembering some images of a finished task: their features, and the policy's choice among all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_platform.backbones.feature_cache import READ_BATCH
from cl_platform.batch import Batch
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.memory.policies import Offers
from cl_platform.strategies.base import Context

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@contextmanager
def answering(context: Context) -> Iterator[None]:
    """What answers, in eval mode, uncompiled and without gradients; every module's mode is put back."""
    modes = [(module, module.training) for part in context.parts.values() for module in part.modules()]
    eager = torch.compiler.set_stance("force_eager") if context.backbone.compiled else nullcontext()
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), eager:
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def image_features(context: Context, images: Tensor, mirrored: bool = False) -> Tensor:
    """Features (b, D) float32 of uint8 images under the evaluation transform; call inside :func:`answering`."""
    ready = context.cache.evaluate(images.to(next(context.backbone.parameters()).device))
    ready = ready.flip(3) if mirrored else ready
    nothing = torch.full((len(ready),), -1, dtype=torch.int64, device=ready.device)
    with context.autocast():
        extra = {} if context.query == "none" else {"query": context.backbone(ready).float()}
        batch = Batch(ready, nothing, nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool), extra)
        return context.features(batch).float()


def offer_task(buffer: ReplayBuffer, task: Task, context: Context, step: int) -> None:
    """Offer all training images of a finished task at once, with their features where the policy chooses by them.

    Args:
        buffer: whose policy chooses.
        task: the one that ended.
        context: of the strategy that owns the buffer.
        step: update after which this happens.
    """
    images, features = task.train, None
    if buffer.policy.needs_features:
        with answering(context):
            parts = torch.arange(len(images)).split(READ_BATCH)
            features = torch.cat([image_features(context, images.images(rows)) for rows in parts]).cpu()
    owners = torch.full_like(images.labels, task.task_id)
    offers = Offers.of(images.labels, owners, images.example_ids, features)
    decision = buffer.decide(offers)
    buffer.write(decision, offers, images.images(torch.from_numpy(decision.sources)), step)
