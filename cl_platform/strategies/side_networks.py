"""A main network and side networks: each task is answered for by one of them, and frozen features choose which."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.backbones import Backbone
from cl_platform.batch import Batch
from cl_platform.heads import Head
from cl_platform.slots import PerTask, Slots
from cl_platform.strategies.base import Component, Context, Strategy
from cl_platform.strategies.routing import ELSEWHERE, nearest_set


class SideNetworks(Strategy):
    """Tasks share the main network, or have a side network each; every task has a head of its own.

    All networks start as copies of the trunk, which is never trained; where it is pretrained it chooses among them. A
    subclass trains them, and says in ``permanent`` whose the main network is. Its ``Config`` has ``metric``.
    """

    owns = frozenset({"features", "classification", "trainable", "prediction"})
    query = "answers"
    permanent: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.heads = Slots(parameters=("weight", "bias"), buffers=("classes",))
        self.router = Slots(buffers=("centroids",))
        self.sides = PerTask()
        self.register_buffer("permanent", torch.zeros(0, dtype=torch.int64))  # in the order in which they became so

    def attach(self, context: Context) -> None:
        """Start the main network as the trunk is."""
        super().attach(context)
        self.main = self._copy_of(context.backbone)
        self.routes = context.backbone.weights_from != "random"

    def _copy_of(self, network: Backbone) -> Backbone:
        own = copy.deepcopy(network)
        if own.compiled:
            own.compile_blocks()
        own.freeze()
        return own

    def _first_head(self, task_id: int, classes: Sequence[int]) -> dict[str, Tensor]:
        """A head's first numbers, keyed as those of the shared head's block."""
        shared = self.context.head
        own = Head(shared.feature_dim, shared.seed, shared.init)
        own.begin_task(task_id, classes)
        block = own.blocks.tasks[str(task_id)].state_dict()
        return {name: tensor.to(self.permanent.device) for name, tensor in block.items()}

    def _network(self, task_id: int) -> Backbone:
        """The network that answers for a task."""
        return cast(Backbone, self.sides.tasks[str(task_id)] if task_id in self.sides else self.main)

    def _logits(self, task_id: int, features: Tensor) -> Tensor:
        """(B, C) over the classes of a task, in the order of its head; one matrix product a task."""
        return F.linear(features, self.heads.get(task_id, "weight"), self.heads.get(task_id, "bias"))

    # -- answers ----------------------------------------------------------------------------------------------------

    def seen_classes(self) -> list[int]:
        """Classes of all tasks that are held, ascending."""
        return sorted({c for classes in self.heads.all("classes") for c in classes.tolist()})

    def _networks(self) -> list[tuple[Backbone, list[int]]]:
        """Every network that answers, with its tasks."""
        temporary = self.sides.task_ids
        main = [t for t in self.heads.task_ids if t not in temporary]
        nets = [(self.main, main)] if main else []
        return nets + [(self._network(t), [t]) for t in temporary]

    def predict(self, batch: Batch) -> Tensor:
        """Log-probabilities (B, S) within each network; far lower ones where an image was routed to another.

        Within the classes of a task they are in the order of its own network's logits.
        """
        seen = self.seen_classes()
        answers = torch.full((batch.labels.shape[0], len(seen)), -torch.inf, device=batch.images.device)
        places = torch.tensor(seen, device=answers.device)
        networks = self._networks()
        chosen = self._route(batch, networks)
        for number, (network, owned) in enumerate(networks):
            features = network(batch.images)
            logits = torch.full_like(answers, -torch.inf)
            for t in owned:
                columns = torch.searchsorted(places, self.heads.get(t, "classes"))
                logits[:, columns] = torch.maximum(logits[:, columns], self._logits(t, features).float())
            shares = logits.log_softmax(1)
            if chosen is not None:
                shares = torch.where((chosen == number)[:, None], shares, shares + ELSEWHERE)
            answers = torch.maximum(answers, shares)
        return answers

    def _route(self, batch: Batch, networks: list[tuple[Backbone, list[int]]]) -> Tensor | None:
        """Number (B,) of the network whose tasks hold the nearest centroid; ``None`` where all count alike."""
        if not self.routes or len(networks) < 2:
            return None
        nearest = nearest_set(
            batch.extra["query"], self.router.all("centroids"), 1.0 if self.config.metric == "l1" else 2.0
        )
        number = {t: k for k, (_, owned) in enumerate(networks) for t in owned}
        return torch.tensor([number[t] for t in self.router.task_ids], device=nearest.device)[nearest]


def component_of(room: str, module: Slots | PerTask, task_id: int, tasks: tuple[int, ...], kind: str) -> Component:
    """The record of what one task has in ``room``: a module of that name in the strategy."""
    tensors = dict(module.tasks[str(task_id)].state_dict())
    return Component(f"{room}.tasks.{task_id}", tasks, kind, tensors)
