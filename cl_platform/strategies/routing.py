"""Which task an image belongs to, by frozen features alone; heads that answer for one task each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.batch import Batch, constant
from cl_platform.errors import UserError
from cl_platform.heads import Head, cross_entropy
from cl_platform.random_streams import stream
from cl_platform.slots import Slots
from cl_platform.strategies.base import Context, Needs, ParameterGroup, Step, Strategy

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

ITERATIONS = 100
ELSEWHERE = -200.0
"""How far below the best answer of the part that an image was routed to those of all others stand: exactly 0 after a
softmax in fp32, and the order of a task's own classes can still be read from them, as task-incremental answers do."""


class RoutedStrategy(Strategy):
    """One part and one head per task, trained on that task alone; frozen features choose among them at test time.

    A subclass adds the part (prompt, adapter) in :meth:`add_part` and uses it in ``forward``. Training rows use the
    part of the current task. Nothing that a task owns depends on another task, so that dropping one leaves the bytes
    of a learner that never saw it. Its ``Config`` has ``router``, ``clusters`` and ``metric``.
    """

    needs = Needs(prompts=True)
    owns = frozenset({"features", "classification", "trainable", "prediction"})
    query = "answers"

    def __init__(self, config: Any, parts: tuple[str, ...]) -> None:
        super().__init__(config)
        self.bank = Slots(parameters=parts)
        self.heads = Slots(parameters=("weight", "bias"), buffers=("classes",))
        self.router = Slots(buffers=("centroids",))
        self._current = -1

    def add_part(self, task: Task) -> None:
        """Create the task's own part in ``bank``."""
        raise NotImplementedError

    def begin_task(self, task: Task) -> None:
        """Add the task's part, head and centroids.

        Raises:
            UserError: a replay buffer beside it: images of one task would train the part of another.
        """
        if self.context.buffer is not None:
            raise UserError("strategy", self.name, "each task trains a part of its own, without replay", "Use it alone")
        self._current = task.task_id
        if task.task_id in self.bank:
            return
        self.add_part(task)
        shared = self.context.head
        own = Head(shared.feature_dim, shared.seed, shared.init)  # keyed as the shared head's block
        own.begin_task(task.task_id, task.classes)
        device = next(self.bank.parameters()).device
        block = own.blocks.tasks[str(task.task_id)].state_dict()
        self.heads.add(task.task_id, **{name: tensor.to(device) for name, tensor in block.items()})
        self.router.add(task.task_id, centroids=self._centroids(task))

    def _centroids(self, task: Task) -> Tensor:
        return centroids_of(task, self.context, self.config)

    def trainable(self) -> Iterator[ParameterGroup]:
        """The current task's part and head."""
        parts, head = self.bank.parameters_of(self._current), self.heads.parameters_of(self._current)
        yield ParameterGroup([*(p for p in parts.values() if p.numel()), *head.values()])

    @torch.no_grad()
    def route(self, batch: Batch) -> Tensor:
        """Place (B,) among the ascending tasks of the one with the nearest centroid; ties go to the lowest."""
        norm = 1.0 if self.config.metric == "l1" else 2.0
        return nearest_set(batch.extra["query"], self.router.all("centroids"), norm)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy of the task's own head over its own classes."""
        classes = self.heads.get(self._current, "classes")
        logits = self._head(self._current, step.features).index_select(1, classes.argsort())
        own = sorted(self.heads.numbers(self._current, "classes"))
        return {"ce": cross_entropy(logits, step.batch.labels, own)}

    def _head(self, task_id: int, features: Tensor) -> Tensor:
        return F.linear(features, self.heads.get(task_id, "weight"), self.heads.get(task_id, "bias"))

    def seen_classes(self) -> list[int]:
        """Classes of all tasks, ascending."""
        return sorted({c for classes in self.heads.all_numbers("classes") for c in classes})

    def predict(self, batch: Batch) -> Tensor:
        """Logits (B, S) of the head an image was routed to; far lower ones of the other heads, in their own order.

        All heads read the features that the routed part gives: no other part sees the image.
        """
        features, rows = self(batch), self.route(batch)
        seen, tasks = self.seen_classes(), self.heads.task_ids
        places = constant(seen, features.device)
        columns = [torch.searchsorted(places, self.heads.get(t, "classes")) for t in tasks]
        answers = [self._head(t, features).float() for t in tasks]
        routed = [(rows == place)[:, None] for place in range(len(tasks))]
        best = torch.stack([own.amax(1) for own in answers], dim=1).gather(1, rows[:, None]).detach()
        logits = features.new_full((features.shape[0], len(seen)), -torch.inf, dtype=torch.float32)
        for own, there in zip(answers, columns, strict=True):
            logits[:, there] = torch.maximum(logits[:, there], best + ELSEWHERE + own.log_softmax(1))
        for own, there, mine in zip(answers, columns, routed, strict=True):  # last, where tasks share classes
            logits[:, there] = torch.where(mine, own, logits[:, there])
        return logits

    def inspect(self) -> dict[str, Any]:
        """Centroids of each task."""
        return {"centroids": {str(t): len(self.router.get(t, "centroids")) for t in self.router.task_ids}}


def centroids_of(task: Task, context: Context, config: Any) -> Tensor:
    """Centroids (k, D) float64 of a task's normalised frozen features, from its own training images alone.

    Args:
        task: whose images.
        context: of the strategy that routes.
        config: has ``router`` (``class_mean``, ``kmeans``, or ``auto``: kmeans for domains) and ``clusters``.
    """
    features = F.normalize(context.cache.features(task.task_id, "train", task.train).double(), dim=1)
    order = task.train.example_ids.argsort(stable=True)  # whatever order the images came in
    features, labels = features[order.to(features.device)], task.train.labels[order]
    chosen = config.router
    if chosen == "auto":
        chosen = "kmeans" if context.setting == "domain" else "class_mean"
    if chosen == "class_mean":
        return torch.stack([features[labels.to(features.device) == c].mean(0) for c in labels.unique().tolist()])
    return kmeans(features, config.clusters, stream(context.seed, task.task_id, "router"))


def nearest_set(query: Tensor, sets: list[Tensor], norm: float = 2.0) -> Tensor:
    """Index (B,) of the set of centroids (k, D) that holds the nearest one to each normalised query (B, D).

    Distances are summed entry by entry in float64: neither batch mates nor other sets change a bit of them.
    """
    points = F.normalize(query.double(), dim=1)
    mode = "donot_use_mm_for_euclid_dist"
    distances = torch.stack([torch.cdist(points, own, p=norm, compute_mode=mode).amin(1) for own in sets], dim=1)
    return (distances == distances.amin(1, keepdim=True)).int().argmax(1)  # the first of equal ones


def kmeans(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Centres (at most k, D) of points (n, D) by Lloyd's algorithm from a k-means++ start, in float64.

    Ends when no point changes its centre, or after 100 rounds. A centre without points goes to the point that is
    farthest from its own. With fewer different points than ``k``, as many centres.
    """
    centres = _plus_plus(points, k, generator)
    owner = torch.full((len(points),), -1, device=points.device)
    for _ in range(ITERATIONS):
        distances = _squares(points, centres)
        nearest = distances.argmin(1)
        if torch.equal(nearest, owner):
            break
        owner = nearest
        count = torch.bincount(owner, minlength=len(centres))
        centres = torch.zeros_like(centres).index_add_(0, owner, points) / count.clamp_min(1)[:, None]
        away = distances.amin(1)
        for empty in (count == 0).nonzero()[:, 0].tolist():
            farthest = int(away.argmax())
            centres[empty], away[farthest] = points[farthest], -1.0
    return centres


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    first = int(torch.randint(len(points), (1,), generator=generator))
    centres = points[first : first + 1]
    while len(centres) < min(k, len(points)):
        weights = _squares(points, centres).amin(1).cpu()
        if not float(weights.sum()) > 0:
            break
        chosen = int(torch.multinomial(weights, 1, generator=generator))
        centres = torch.cat([centres, points[chosen : chosen + 1]])
    return centres.clone()


def _squares(points: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
