"""What gradient surgery shares: gradients of remembered examples beside the step's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.heads import targets_among
from cl_platform.memory.build import BufferConfig
from cl_platform.strategies.base import Step
from cl_platform.strategies.replay import INSERTS, Replay

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class ReferenceConfig:
    """Keys of strategies that hold the step's gradient against those of remembered examples."""

    insert: str = setting("first_epoch", doc="offer an example once, or in every epoch", choices=INSERTS)
    head_slice: bool | str = setting(
        "auto", doc="each image's loss over its own task's classes only; auto: where the task is known at test time",
        choices=("auto", True, False),
    )  # fmt: skip
    buffer: BufferConfig = setting(factory=lambda: BufferConfig(policy="ring"), doc="the replay buffer")


class ReferenceGradients(Replay):
    """A strategy whose remembered examples say in which directions the step must not go.

    Reference gradients are those of plain cross-entropy on a fresh augmentation. They are computed beside the step's,
    which stay in ``.grad``. Their forward passes are training passes: batch norm normalises by the references' own
    statistics and takes them into its running ones, once a pass, as in released code; without that, answers about old
    tasks would be normalised by the newest task's statistics alone.

    Unless ``head_slice`` is false, the loss of the current images is this strategy's as well.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sliced = {"classification"} if config.head_slice is not False else set()
        self.owns = frozenset({"buffer", "gradient", *sliced})  # type: ignore[misc]

    @property
    def sliced(self) -> bool:
        """Whether an image's loss runs over its own task's classes only."""
        wish = self.config.head_slice
        return self.context.setting == "task" if wish == "auto" else bool(wish)

    def begin_task(self, task: Task) -> None:
        """Note which tasks are remembered, and which columns belong to whom."""
        super().begin_task(task)
        contents, blocks, seen = self.buffer.contents, self.context.head.blocks, self.context.head.classes
        self._past = sorted(self.buffer.owners() - {task.task_id})
        known = {task.task_id: set(task.classes)}
        for past in self._past:
            own = set(contents.labels[contents.task_ids == past].tolist())
            known[past] = own | set(blocks.get(past, "classes").tolist() if past in blocks else ())
        device = next(self.context.head.parameters()).device
        self._order = torch.tensor(sorted(known), device=device)
        allowed = [[c in known[task_id] for c in seen] for task_id in sorted(known)]
        self._allowed = torch.tensor(allowed, device=device)  # (tasks, S)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy of the batch, where it is not left to other strategies."""
        if "classification" not in self.owns:
            return {}
        return {"ce": step.cross_entropy(step.task.classes if self.sliced else step.seen_classes)}

    def moving(self) -> list[nn.Parameter]:
        """Parameters that the coming update moves, in the order of their names.

        One without a gradient has no part in any product and stays without: what holds for the projected gradient then
        holds for what the optimizer sees.
        """
        return [parameter for _, parameter in sorted(self.context.trained().items()) if parameter.grad is not None]

    def reference(self, step: Step, batch: Batch, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """Gradient of the cross-entropy of remembered images, ``None`` for parameters that it does not reach."""
        with torch.enable_grad(), self.context.autocast():
            logits = step.forward(batch).logits.float()
            if self.sliced:
                owner = torch.searchsorted(self._order, batch.task_ids)
                logits = logits.masked_fill(~self._allowed[owner], float("-inf"))
            loss = F.cross_entropy(logits, targets_among(batch.labels, step.seen_classes))
        return torch.autograd.grad(loss, list(parameters), allow_unused=True)
