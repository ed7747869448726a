"""Features of the frozen trunk under the evaluation transform, computed once per image."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cl_platform.backbones.base import Backbone

READ_BATCH = 256


class FeatureCache:
    """Pre-head features per (trunk digest, transform, task, split); a stale key is a miss, never a wrong answer.

    Other images under a known name are a miss as well: their ids are compared.

    Args:
        backbone: whose features are kept; its digest is part of the key.
        evaluate: the evaluation transform, uint8 (B, 3, H, W) -> float (B, 3, S, S).
        transform_id: text that identifies that transform.
        max_bytes: bound on what is kept; whole tasks are evicted, the oldest first.
        autocast: opens the run's precision.
    """

    def __init__(
        self,
        backbone: Backbone,
        evaluate: Callable[[Tensor], Tensor],
        transform_id: str,
        max_bytes: int = 2**30,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._backbone, self._evaluate, self._transform_id = backbone, evaluate, transform_id
        self.max_bytes, self.autocast = max_bytes, autocast
        self._kept: dict[tuple[str, str, int, str], tuple[Tensor, Tensor]] = {}  # features and example ids of the rows
        self._digest = ""
        self.images_forwarded = 0
        self.evictions = 0

    @property
    def bytes(self) -> int:
        """Size of everything kept."""
        return sum(t.element_size() * t.numel() for t, _ in self._kept.values())

    def refresh(self) -> None:
        """The trunk may have changed: its digest is read again when features are next asked for."""
        self._digest = ""

    def forget(self, task_id: int) -> None:
        """Delete all entries of one task."""
        self._kept = {key: value for key, value in self._kept.items() if key[2] != task_id}

    def features(self, task_id: int, split: str, image_set: Any) -> Tensor:
        """Features (n, D) float32 on the trunk's device, row k for image k of the set.

        Args:
            task_id: owner of the images.
            split: ``train``, ``validation`` or ``test``.
            image_set: where the images come from when they are not kept yet.
        """
        if not self._digest:
            self._digest = self._backbone.digest()
        key = (self._digest, self._transform_id, task_id, split)
        kept = self._kept.get(key)
        if kept is None or not torch.equal(kept[1], image_set.example_ids):
            kept = (self._compute(image_set), image_set.example_ids.clone())
            self._kept.pop(key, None)  # the newest stands last
            self._kept[key] = kept
            self._evict(key)
        return kept[0]

    @torch.no_grad()
    def _compute(self, image_set: Any) -> Tensor:
        was_training = self._backbone.training
        self._backbone.eval()
        device = next(self._backbone.parameters()).device
        parts = []
        try:
            for start in range(0, len(image_set), READ_BATCH):
                rows = torch.arange(start, min(start + READ_BATCH, len(image_set)))
                images = self._evaluate(image_set.images(rows).to(device))
                with self.autocast():
                    parts.append(self._backbone(images).float())  # (b, D)
        finally:
            self._backbone.train(was_training)
        self.images_forwarded += len(image_set)
        return torch.cat(parts)

    def _evict(self, newest: tuple[str, str, int, str]) -> None:
        for key in list(self._kept):
            if self.bytes <= self.max_bytes:
                return
            if key != newest:
                del self._kept[key]
                self.evictions += 1
