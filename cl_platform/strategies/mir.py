"""MIR (Aljundi et al., NeurIPS 2019): replay what the coming update would hurt most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.heads import cross_entropy, targets_among
from cl_platform.memory.columns import Replay as Rows
from cl_platform.registry import strategies
from cl_platform.strategies.base import Component, Context, Needs, Step
from cl_platform.strategies.replay import Replay, ReplayConfig


@dataclass(frozen=True)
class MIRConfig(ReplayConfig):
    """Keys of ``mir``."""

    candidates: int = setting(50, doc="S, remembered images of a draw, of which batch_size are replayed", min=1)
    compare: str = setting(
        "now", doc="loss after the virtual update against the loss now or the smallest known", choices=("now", "best")
    )  # fmt: skip


@strategies.register("mir")
class MIR(Replay):
    """Of ``candidates`` remembered images those are replayed whose loss a virtual update would raise most.

    The virtual update is a plain SGD step along the gradient of the current images, with the optimizer's present rates,
    whatever the optimizer. The gradient of the replayed images' mean loss is then added, and one real update follows.
    Scores are taken on the view that is replayed, with batch statistics and without dropout, and leave no trace;
    released code lets them into batch norm's running statistics. ``compare=best`` takes the smaller of the loss now and
    the smallest loss at which the example has been scored.
    """

    name = "mir"
    Config = MIRConfig
    owns = frozenset({"buffer", "gradient"})
    leaks = frozenset({"L-01", "L-05", "L-10"})
    needs = Needs(boundaries=False)

    best_loss: Tensor
    best_id: Tensor

    def attach(self, context: Context) -> None:
        """Make room for the buffer, and for a loss beside each of its slots where these are compared with."""
        super().attach(context)
        if self.config.compare == "best":
            device = next(context.head.parameters(), torch.empty(0)).device
            size = self.buffer.capacity
            self.register_buffer("best_loss", torch.full((size,), float("inf"), device=device))
            self.register_buffer("best_id", torch.full((size,), -1, device=device))  # whose loss a slot's is

    def after_backward(self, step: Step) -> None:
        """Choose, and add the gradient of the chosen."""
        wanted = self.config.batch_size
        wanted = self.context.batch_size if wanted is None else wanted
        rows = self.drawn(self.config.candidates) if wanted else None
        if rows is None:
            return
        batch = self.ready(rows)
        if len(batch) > wanted:
            batch = batch.select(self.order(step, rows, batch)[:wanted])
        moving = [parameter for parameter in self.context.trained().values() if parameter.grad is not None]
        with torch.enable_grad(), self.context.autocast():
            loss = cross_entropy(step.forward(batch).logits, batch.labels, step.seen_classes)
        for parameter, gradient in zip(moving, torch.autograd.grad(loss, moving, allow_unused=True), strict=True):
            if gradient is not None:
                parameter.grad += gradient  # type: ignore[operator]

    def order(self, step: Step, rows: Rows, batch: Batch) -> Tensor:
        """Rows (S,) of the candidates from the one that loses most to the one that loses least; equals by slot."""
        by_slot = rows.slots.argsort().to(batch.labels.device, non_blocking=True)
        scores = self.scores(step, rows, batch)[by_slot]
        return by_slot[scores.argsort(descending=True, stable=True)]

    @torch.no_grad()
    def scores(self, step: Step, rows: Rows, batch: Batch) -> Tensor:
        """By how much the virtual update raises the cross-entropy of each candidate (S,)."""
        optimizer = self.context.optimizer()
        assert optimizer is not None
        rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        ahead = {
            name: parameter - rates[parameter] * parameter.grad
            for name, parameter in self.context.trained().items()
            if parameter.grad is not None
        }
        columns = targets_among(batch.labels, step.seen_classes)
        now = cross_entropies(self._logits(batch, {}), columns)
        if self.config.compare == "best":
            now = self._smallest(rows, batch, now)
        return cross_entropies(self._logits(batch, ahead), columns) - now

    def _logits(self, batch: Batch, parameters: Mapping[str, Tensor]) -> Tensor:
        whole = _Whole(self.context)
        tensors = {f"parts.{name}": tensor for name, tensor in parameters.items()}
        tensors |= {name: tensor.clone() for name, tensor in whole.named_buffers()}
        with _without_dropout(whole), self.context.autocast():
            return functional_call(whole, tensors, (batch,))

    def _smallest(self, rows: Rows, batch: Batch, now: Tensor) -> Tensor:
        slots = rows.slots.to(self.best_loss.device, non_blocking=True)
        owner = (batch.task_ids << 40) + batch.example_ids  # the same row of the data may come in several tasks
        known = torch.where(self.best_id[slots] == owner, self.best_loss[slots], float("inf"))
        smallest = torch.minimum(known, now)
        self.best_loss[slots], self.best_id[slots] = smallest, owner
        return smallest

    def components(self) -> Iterator[Component]:
        """The losses belong to whom the buffer belongs to."""
        for component in super().components():
            yield component
            if component.name == "buffer" and self.config.compare == "best":
                for name in ("best_loss", "best_id"):
                    yield Component(name, component.tasks, "bookkeeping", {name: getattr(self, name)})

    def drop_task(self, task_id: int) -> None:
        """Remove the task's rows and their losses; the others move up."""
        if self.config.compare == "best":
            kept = torch.from_numpy((self.buffer.contents.task_ids != task_id).nonzero()[0]).to(self.best_loss.device)
            loss, owner = self.best_loss[kept], self.best_id[kept]
            self.best_loss.fill_(float("inf"))
            self.best_id.fill_(-1)
            self.best_loss[: len(kept)], self.best_id[: len(kept)] = loss, owner
        super().drop_task(task_id)


def cross_entropies(logits: Tensor, columns: Tensor) -> Tensor:
    """Cross-entropy (S,) of each row of ``logits`` (S, C), in float32 at least; a score is a difference of two."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, columns, reduction="none")


class _Whole(nn.Module):
    """All modules that answer, as one, so that others can be put in the place of its tensors for a pass."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(context.parts)
        self._context = context

    def forward(self, batch: Batch) -> Tensor:
        return self._context.head(self._context.features(batch))


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Everything but normalisation layers in eval mode: no draw from a global generator, the same statistics."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            if not isinstance(part, _NormBase):
                part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
