"""The copy of a learner that a method changes: which of its numbers may move, and how images reach its answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.batch import Batch
from cl_platform.copies import copied
from cl_platform.errors import UserError
from cl_platform.evaluation import EVALUATION_BATCH, answered
from cl_platform.finetuning import STATISTICS
from cl_platform.random_streams import RUN_LEVEL, stream
from cl_platform.scenarios.mixture import concatenate
from cl_platform.unlearning.approximate.classes import Classes, check_images
from cl_platform.unlearning.approximate.copies import begin, trained_names

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import ImageSet
    from cl_platform.unlearning.approximate.base import ApproximateRequest

CHECKED = 1000
"""Images of a kept task on which its accuracy is measured before and after, at most."""

PROBED = 4
"""Images of the forward pass that tells which parameters the answers depend on."""

ELSEWHERE = -2
"""Task id under which kept features of surrogate images stand."""


@dataclass
class Counted:
    """What a request has cost so far: optimizer updates, and images that went forward."""

    steps: int = 0
    images: int = 0


@dataclass(frozen=True)
class Pool:
    """Images that batches are made of.

    Attributes:
        images: an image set.
        query: the frozen trunk's features (n, D) of all of them, where the learner reads these instead of images.
    """

    images: ImageSet
    query: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)


class Work:
    """What a method works with.

    Everything runs in eval mode and in float32. Only layers with running statistics follow batches, and only those
    that hold nothing but retained images: a batch with images to forget would move the statistics of kept classes.

    Args:
        learner: stays as it is until :meth:`replace`.
        request: see :class:`~cl_platform.unlearning.approximate.base.ApproximateRequest`.
        method: the method's name; all random streams are keyed by (seed, task id, ``unlearn/<method>``).

    Attributes:
        learner: the copy.
        parameters: by name, what the strategies trained and the answers depend on; nothing else may change.
        unreached: names of what they trained without such a dependence, as parts that wait for their own task.
        classes: which stay, and which an image is answered among.
        forget: images to forget; ``retain``: those of all kept tasks, ``None`` without any.
        pools: images of each kept task.
        surrogate: images from outside, ``None`` without any.
        counted: what was spent so far.
        moves_features: whether features can change at all, or the head alone.
        checked_split, checked_images: which images of kept tasks the checks read, and how many.

    Raises:
        UserError: the learner trains nothing by gradients, or knows no other class than those of the task.
    """

    def __init__(self, learner: ContinualLearner, request: ApproximateRequest, method: str) -> None:
        self.method, self.task, self.seed = method, request.task, request.seed
        self.device = torch.device(request.device)
        self.counted = Counted()
        check_images(learner, request)
        names = trained_names(learner, request.forget)
        if not names:
            raise self._nothing(learner)
        self.learner = copied(learner).to(self.device)
        twin = self.learner
        kept = [task_id for task_id in twin.owners.learnt if task_id != self.task.task_id]
        for task_id in kept[-1:]:  # live or restored, the copy has one and the same current part
            begin(twin, task_id, request.forget)
        self._set_up(names)
        self.forget = self._pool(request.task.task_id, request.forget)
        self.pools = {t: self._pool(t, images) for t, images in sorted(request.retain.items()) if len(images)}
        self.retain = self.joined(list(self.pools.values())) if self.pools else None
        self.surrogate = None if request.surrogate is None else self._pool(ELSEWHERE, request.surrogate)
        self._choose_path(names, learner)
        seen = twin.head.classes if self.by_head else twin.composition.seen_classes()
        self.classes = Classes(twin, self.task.task_id, seen, method)
        held_out = {t: images for t, images in sorted(request.validation.items()) if len(images)}
        self._checked = {t: self._pool(t, images, "validation") for t, images in held_out.items()} or self.pools
        self.checked_split = "validation" if held_out else "train" if self.pools else None
        self.checked_images = sum(min(CHECKED, len(pool)) for pool in self._checked.values())

    # -- what may change ----------------------------------------------------------------------------------------------

    def _set_up(self, names: list[str]) -> None:
        twin, wanted = self.learner, set(names)
        trunk = {f"backbone.{name}" for name, _ in twin.backbone.named_parameters()}
        if wanted & trunk:
            twin.backbone.unfreeze()
        else:
            twin.backbone.freeze()
        twin.eval()
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in wanted)
            parameter.grad = None
        recomputed = any(getattr(module, "grad_checkpointing", False) for module in twin.backbone.modules())
        self._following: list[nn.Module] = []
        if not twin.backbone.frozen and not recomputed:  # a recomputed pass would meet the other mode
            for module in twin.backbone.modules():
                if any(module._buffers.get(name) is not None for name in STATISTICS):
                    self._following.append(module)

    def _choose_path(self, names: list[str], learner: ContinualLearner) -> None:
        """Take the rule that answers, unless gradients reach more of what was trained through the head."""
        twin = self.learner
        named = dict(twin.named_parameters())
        trained = {name: named[name] for name in names}
        pools = [self.forget, *self.pools.values()]
        batches = [self.batch(pool, torch.arange(min(PROBED, len(pool)))) for pool in pools]
        found: list[str] = []
        ruled = twin.composition.owner("prediction") is not None
        for by_head in (False, True) if ruled and twin.head.classes else (not ruled,):
            self.by_head = by_head
            reached = self._reached(trained, batches)
            if _size(trained, reached) > _size(trained, found):
                found, chosen = reached, by_head
        if not found:
            raise self._nothing(learner)
        self.by_head = chosen
        self.parameters = {name: trained[name] for name in found}
        self.unreached = [name for name in names if name not in self.parameters]
        for name in self.unreached:
            trained[name].requires_grad_(False)
        self.moves_features = self.features(batches[0]).requires_grad

    def _reached(self, trained: dict[str, nn.Parameter], batches: list[Batch]) -> list[str]:
        found: set[str] = set()
        for batch in batches:
            logits = self.logits(batch)
            if not logits.requires_grad:
                continue
            slopes = torch.autograd.grad(logits.square().sum(), list(trained.values()), allow_unused=True)
            found |= {name for name, slope in zip(trained, slopes, strict=True) if slope is not None}
        return [name for name in trained if name in found]

    def _nothing(self, learner: ContinualLearner) -> UserError:
        members = f"[{','.join(learner.composition.members)}]"
        return UserError(
            "unlearning.method", f"approximate:{self.method}",
            f"strategy={members} trains nothing by gradients that its answers depend on",
            "Use unlearning.method=drop or rollback",
        )  # fmt: skip

    def frozen(self) -> Work:
        """The copy as it is now, for a method that looks back at it; it shares images and counters."""
        twin = copy.copy(self)
        twin.learner = copied(self.learner)
        twin.learner.eval().requires_grad_(False)
        twin._following, twin.parameters = [], {}
        return twin

    def finite(self) -> bool:
        """Whether every number that may have changed is finite."""
        changed = [*self.parameters.values(), *self._statistics(self.learner).values()]
        return bool(torch.stack([torch.isfinite(tensor).all() for tensor in changed]).all())

    @torch.no_grad()
    def replace(self, learner: ContinualLearner) -> None:
        """Give the learner what was trained, and the statistics that followed; all else keeps its bits.

        What was measured with the network is measured anew. What has changed was shaped by all images that were read,
        those to forget among them: its owner records say so.
        """
        live = dict(learner.named_parameters())
        for name, parameter in self.parameters.items():
            live[name].copy_(parameter)
        kept = self._statistics(learner)
        for name, statistic in self._statistics(self.learner).items():
            kept[name].copy_(statistic)
        learner.cache.refresh()
        self._note_owners(learner)
        learner.composition.remeasure()

    def _note_owners(self, learner: ContinualLearner) -> None:
        owners, readers = learner.owners, [self.task.task_id, *self.pools]
        changed = [name.split(".") for name in self.parameters]
        places = {int(parts[3]) for parts in changed if parts[:3] == ["head", "blocks", "tasks"]}
        if any(parts[0] == "backbone" for parts in changed):
            places.add(RUN_LEVEL)
        owners.add_shapers(sorted(places), readers)
        if any(parts[0] == "composition" for parts in changed):
            for task_id in owners.learnt:
                owners.begin(task_id, owners.classes(task_id), readers)

    def _statistics(self, learner: ContinualLearner) -> dict[str, Tensor]:
        if not self._following:
            return {}
        wanted = (*STATISTICS, "num_batches_tracked")
        return {n: b for n, b in learner.backbone.named_buffers() if n.rpartition(".")[2] in wanted}

    # -- images -------------------------------------------------------------------------------------------------------

    def _pool(self, task_id: int, images: ImageSet, split: str = "train") -> Pool:
        if self.learner.composition.query != "only":
            return Pool(images)
        return Pool(images, self.learner.cache.features(task_id, split, images).to(self.device))

    @staticmethod
    def joined(pools: list[Pool]) -> Pool:
        """Several pools as one, in their order."""
        queries = [pool.query for pool in pools if pool.query is not None]
        return Pool(concatenate([pool.images for pool in pools]), torch.cat(queries) if queries else None)

    def stream(self, purpose: str, *index: int) -> torch.Generator:
        """A generator of its own for one draw of the method."""
        return stream(self.seed, self.task.task_id, f"unlearn/{self.method}/{purpose}", *index)

    def batch(self, pool: Pool, rows: Tensor, augment: torch.Generator | None = None) -> Batch:
        """Some images as the network takes them, ids of tasks hidden from it as at test time.

        Args:
            pool: whose.
            rows: (b,) int64.
            augment: draws the training transform; without it the evaluation transform is applied.

        Returns:
            a batch; its column ``row`` (b,) says which images of the pool they are.
        """
        labels, ids = pool.images.labels[rows], pool.images.example_ids[rows]
        if pool.query is not None:
            query = pool.query[rows.to(self.device)]
            made = self._batch(torch.empty(len(rows), 0, device=self.device), labels, ids, query)
        else:
            made = self._batch(self.view(pool, rows, augment), labels, ids)
        return made.with_extra(row=rows.to(self.device))

    def view(self, pool: Pool, rows: Tensor, augment: torch.Generator | None = None) -> Tensor:
        """Normalised images (b, 3, S, S) under the training or the evaluation transform."""
        raw = pool.images.images(rows).to(self.device)
        transforms = self.learner.transforms
        return transforms.evaluate(raw) if augment is None else transforms.train(raw, augment)

    def seen_as(self, images: Tensor, like: Batch) -> Batch:
        """Normalised images with labels and ids of another batch; gradients with respect to them are possible."""
        return self._batch(images, like.labels, like.example_ids)

    def _batch(self, images: Tensor, labels: Tensor, ids: Tensor, query: Tensor | None = None) -> Batch:
        reads = self.learner.composition.query
        if query is None and reads != "none":
            with torch.set_grad_enabled(images.requires_grad):
                self.counted.images += len(images)
                query = self.learner.backbone(images).float()
            if reads == "only":
                images = images[:, :0, 0, 0]
        nobody = torch.full((len(labels),), -1, dtype=torch.int64, device=self.device)
        extra = {} if query is None else {"query": query}
        labels, ids = labels.to(self.device), ids.to(self.device)
        return Batch(images, labels, ids, nobody, torch.zeros_like(nobody, dtype=torch.bool), extra)

    def ordered(self, pool: Pool, size: int) -> Iterator[Batch]:
        """All images once, in their own order, under the evaluation transform."""
        for rows in torch.arange(len(pool)).split(size):
            yield self.batch(pool, rows)

    def shuffled(self, what: str, pool: Pool, epoch: int, size: int, augmented: bool = True) -> Iterator[Batch]:
        """All images once, in an order drawn for (``what``, ``epoch``), by default under the training transform."""
        order = torch.randperm(len(pool), generator=self.stream(f"{what}/shuffle", epoch))
        for number, rows in enumerate(order.split(size)):
            augment = self.stream(f"{what}/augment", epoch, number) if augmented else None
            yield self.batch(pool, rows, augment)

    def cycled(self, what: str, pool: Pool, epoch: int, size: int) -> Iterator[Batch]:
        """As :meth:`shuffled`, again and again in the same order, each time augmented anew."""
        parts = torch.randperm(len(pool), generator=self.stream(f"{what}/shuffle", epoch)).split(size)
        number = 0
        while True:
            yield self.batch(pool, parts[number % len(parts)], self.stream(f"{what}/augment", epoch, number))
            number += 1

    # -- answers ------------------------------------------------------------------------------------------------------

    def features(self, batch: Batch) -> Tensor:
        """Features (B, D) before the head."""
        self.counted.images += len(batch)
        return self.learner.composition.features(batch)

    def logits(self, batch: Batch, retained: bool = False) -> Tensor:
        """Logits (B, S) over the seen classes, in float32.

        Args:
            batch: from :meth:`batch`.
            retained: there are retained images alone in it, so that running statistics may follow.
        """
        composition = self.learner.composition
        with self._mode(retained and len(batch) > 1):
            if not self.by_head:
                self.counted.images += len(batch)
                return composition.predict(batch).float()
            logits: Tensor = self.learner.head(self.features(batch))
            return logits.float()

    def outputs(self, batch: Batch, retained: bool = False) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, S) of one batch."""
        with self._mode(retained and len(batch) > 1):
            features = self.features(batch)
            if self.by_head:
                return features, self.learner.head(features).float()
        return features, self.logits(batch)

    @contextmanager
    def _mode(self, follow: bool) -> Iterator[None]:
        for module in self._following:
            module.training = follow
        try:
            yield
        finally:
            for module in self._following:
                module.training = False

    def cross_entropy(
        self, batch: Batch, columns: Tensor | None = None, retained: bool = False, temperature: float = 1.0
    ) -> Tensor:
        """Mean cross-entropy of a batch.

        Args:
            batch: whose.
            columns: (B,) columns to teach instead of the labels'.
            retained: see :meth:`logits`.
            temperature: divides the logits.
        """
        logits = self.classes.competing(self.logits(batch, retained), batch.labels) / temperature
        return F.cross_entropy(logits, self.classes.columns(batch.labels) if columns is None else columns)

    # -- accuracy -----------------------------------------------------------------------------------------------------

    def forget_accuracy(self) -> float:
        """Share of the images to forget that are answered right, the rows of their classes being there."""
        own = self.classes.own if self.learner.setting == "task" else self.classes.seen
        self.learner.composition.remeasure()
        right, count = self._right(self.forget, len(self.forget), own)
        return right / count

    def retained_accuracy(self) -> float | None:
        """Share of kept tasks' images answered right among the classes that remain; ``None`` without such images."""
        right = count = 0
        self.learner.composition.remeasure()
        for task_id, pool in self._checked.items():
            more = self._right(pool, CHECKED, self.classes.among(task_id))
            right, count = right + more[0], count + more[1]
        return right / count if count else None

    @torch.no_grad()
    def _right(self, pool: Pool, most: int, among: list[int]) -> tuple[int, int]:
        composition = self.learner.composition
        order = torch.randperm(len(pool), generator=self.stream("check"))[:most].sort().values
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for rows in order.split(EVALUATION_BATCH):
            batch = self.batch(pool, rows)
            self.counted.images += len(rows)
            logits = composition.predict(batch).float()
            right += (answered(logits, composition.seen_classes(), among) == batch.labels).sum()
        return int(right), len(order)


def _size(trained: dict[str, nn.Parameter], names: list[str]) -> int:
    return sum(trained[name].numel() for name in names)
