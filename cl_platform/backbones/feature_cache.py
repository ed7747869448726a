"""Features of the frozen trunk under the evaluation transform, computed once per image."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cl_platform.backbones.base import Backbone
    from cl_platform.backbones.prefix import PromptedViT

READ_BATCH = 256
Key = tuple[str, str, int, str]


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
        self._backbone, self.evaluate, self._transform_id = backbone, evaluate, transform_id
        self.max_bytes, self.autocast = max_bytes, autocast
        self._kept: dict[Key, tuple[Tensor, Tensor]] = {}  # features and example ids of the rows
        self._digest = ""
        self._prefix_digests: dict[int, str] = {}
        self.images_forwarded = 0
        self.evictions = 0

    @property
    def bytes(self) -> int:
        """Size of everything kept."""
        return sum(t.element_size() * t.numel() for t, _ in self._kept.values())

    def refresh(self) -> None:
        """The trunk may have changed: its digest is read again when features are next asked for."""
        self._digest = ""
        self._prefix_digests = {}

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
        return self._look_up((self._digest, self._transform_id, task_id, split), image_set, self._backbone)

    def tokens(self, blocks: int, task_id: int, split: str, image_set: Any) -> Tensor | None:
        """Tokens (n, N, D) behind the first ``blocks`` blocks of a ViT, or ``None`` where they do not fit the bound.

        The key is the digest of the weights that made them: the embedding's and those blocks'.

        Args:
            blocks: how many blocks, at least 1; nothing may train them or change their work.
            task_id: owner of the images.
            split: name of the image set.
            image_set: where the images come from when they are not kept yet.
        """
        vit = cast("PromptedViT", self._backbone)
        if blocks not in self._prefix_digests:
            self._prefix_digests[blocks] = f"{vit.prefix_digest(blocks)}/{blocks}"
        key = (self._prefix_digests[blocks], self._transform_id, task_id, split)
        if key not in self._kept:
            one = self._forward(image_set.select(torch.arange(1)), lambda images: vit.run(vit.embed(images), 0, blocks))
            if self.bytes + len(image_set) * one.element_size() * one.numel() > self.max_bytes:
                return None
        return self._look_up(key, image_set, lambda images: vit.run(vit.embed(images), 0, blocks))

    def _look_up(self, key: Key, image_set: Any, compute: Callable[[Tensor], Tensor]) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or not torch.equal(kept[1], image_set.example_ids):
            kept = (self._forward(image_set, compute), image_set.example_ids.clone())
            self._kept.pop(key, None)  # the newest stands last
            self._kept[key] = kept
            self._evict(key)
        return kept[0]

    @torch.no_grad()
    def _forward(self, image_set: Any, compute: Callable[[Tensor], Tensor]) -> Tensor:
        was_training = self._backbone.training
        self._backbone.eval()
        device = next(self._backbone.parameters()).device
        parts = []
        try:
            for start in range(0, len(image_set), READ_BATCH):
                rows = torch.arange(start, min(start + READ_BATCH, len(image_set)))
                images = self.evaluate(image_set.images(rows).to(device))
                with self.autocast():
                    parts.append(compute(images).float())  # (b, D), or (b, N, D)
        finally:
            self._backbone.train(was_training)
        self.images_forwarded += len(image_set)
        return torch.cat(parts)

    def _evict(self, newest: Key) -> None:
        for key in list(self._kept):
            if self.bytes <= self.max_bytes:
                return
            if key != newest:
                del self._kept[key]
                self.evictions += 1
