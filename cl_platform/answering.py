"""How a learner answers: evaluation mode, kept features, logits of images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from cl_platform.backbones.feature_cache import READ_BATCH, FeatureCache
from cl_platform.batch import Batch

if TYPE_CHECKING:
    from cl_platform.backbones import Backbone
    from cl_platform.scenarios import ImageSet, Transforms
    from cl_platform.strategies.base import Context
    from cl_platform.strategies.composition import Composition


class Answering(L.LightningModule):
    """The part of a learner that answers. The names below are set by the learner itself."""

    backbone: Backbone
    composition: Composition
    transforms: Transforms
    cache: FeatureCache
    context: Context

    def precision_context(self) -> AbstractContextManager[Any]:
        """The run's autocast region, or none outside a trainer."""
        trainer = self._trainer
        return trainer.precision_plugin.forward_context() if trainer is not None else nullcontext()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Evaluation mode without gradients, uncompiled; every module's own mode is put back afterwards.

        Compiled code would be compiled once more for the other batch size, and training would go on with that.
        """
        modes = [(module, module.training) for module in self.modules()]
        eager = torch.compiler.set_stance("force_eager") if self.backbone.compiled else nullcontext()
        self.eval()
        try:
            with torch.no_grad(), eager:
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def logits_of(self, task_id: int, split: str, image_set: ImageSet, rows: Tensor) -> Tensor:
        """Logits (b, S) over :meth:`seen_classes` for some rows of an image set; call inside :meth:`answering`.

        The id names the cache entry of the images only; what answers never sees it.
        """
        extra = {}
        if self.composition.query != "none":
            extra["query"] = self.cache.features(task_id, split, image_set)[rows.to(self.device)]
        if self.composition.query == "only":
            images = torch.empty(len(rows), 0, device=self.device)
        else:
            images = self.transforms.evaluate(image_set.images(rows).to(self.device))
        return self.answer(images, extra)

    def kept_columns(self, task_id: int, split: str, image_set: ImageSet) -> dict[str, Tensor]:
        """What of an image set's answers need not be computed again, by name, a row an image.

        ``query``: the frozen trunk's features (n, D), where the strategies read them. ``tokens``: activations (n, N, D)
        behind the leading blocks that nothing changes in this task, where there are such blocks and the bound on kept
        bytes leaves room.
        """
        columns, names = {}, self.kept_names()
        if "query" in names:
            columns["query"] = self.cache.features(task_id, split, image_set)
        if "tokens" in names:
            tokens = self.cache.tokens(self.context.kept_blocks, task_id, split, image_set)
            if tokens is not None:
                columns["tokens"] = tokens
        return columns

    def logits_of_images(self, images: Tensor) -> Tensor:
        """Logits (b, S) for new uint8 images (b, 3, H, W)."""
        with self.answering():
            ready = self.transforms.evaluate(images.to(self.device))
            extra = {}
            if self.composition.query != "none":
                with self.precision_context():
                    extra["query"] = self.backbone(ready).float()
            return self.answer(ready, extra)

    def kept_names(self) -> set[str]:
        """Names of :meth:`kept_columns` where the bound on kept bytes leaves room for all."""
        query, blocks = self.composition.query, self.context.kept_blocks
        return {name for name, there in (("query", query != "none"), ("tokens", query != "only" and blocks)) if there}

    def features_of(self, image_set: ImageSet) -> Tensor:
        """Features (n, D) before the head as the learner computes them now, under the evaluation transform."""
        parts = []
        with self.answering():
            for start in range(0, len(image_set), READ_BATCH):
                rows = torch.arange(start, min(start + READ_BATCH, len(image_set)))
                ready = self.transforms.evaluate(image_set.images(rows).to(self.device))
                with self.precision_context():
                    extra = {} if self.composition.query == "none" else {"query": self.backbone(ready).float()}
                    parts.append(self.composition.features(self._unlabelled(ready, extra)).float())
        return torch.cat(parts)

    def answer(self, images: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Logits (b, S) for transformed images (b, 3, S, S); call inside :meth:`answering`.

        Args:
            images: of no size (b, 0) where ``extra`` stands for them.
            extra: columns of :meth:`kept_columns` for the same rows.
        """
        with self.precision_context():
            return self.composition.predict(self._unlabelled(images, extra)).float()

    @staticmethod
    def _unlabelled(images: Tensor, extra: dict[str, Tensor]) -> Batch:
        nothing = torch.full((len(images),), -1, dtype=torch.int64, device=images.device)
        return Batch(images, nothing, nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool), extra)

    def seen_classes(self) -> list[int]:
        """Class ids of the columns of the logits, ascending."""
        return self.composition.seen_classes()
