"""The growing linear head, and how its logits become a loss and a prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.batch import constant
from cl_platform.errors import UserError
from cl_platform.random_streams import seeded_globals
from cl_platform.slots import Slots

INITS = ("trunc_normal", "zeros", "linear")


class Head(nn.Module):
    """A linear block for the new classes of each task; its logits stand in ascending class id.

    One matrix product per block: the numbers of a block do not depend on how many others exist.

    Args:
        feature_dim: width D of the features.
        seed: the run's seed; the block of task t is drawn from (seed, t, ``head``).
        init: ``trunc_normal`` (std 0.02), ``zeros`` or ``linear`` (torch's default); the bias starts at zero
            except for ``linear``.
    """

    def __init__(self, feature_dim: int, seed: int, init: str = "trunc_normal") -> None:
        super().__init__()
        if init not in INITS:
            raise UserError("head.init", init, f"must be one of {', '.join(INITS)}", "Choose one of them")
        self.feature_dim, self.seed, self.init = feature_dim, seed, init
        self.blocks = Slots(parameters=("weight", "bias"), buffers=("classes",))

    def begin_task(self, task_id: int, classes: Sequence[int]) -> None:
        """Add a block for those of ``classes`` that the head does not know yet."""
        known = set(self.classes)
        new = [c for c in classes if c not in known]
        if not new:
            return
        with seeded_globals(self.seed, task_id, "head"):
            linear = nn.Linear(self.feature_dim, len(new))
            if self.init != "linear":
                nn.init.zeros_(linear.bias)
                if self.init == "zeros":
                    nn.init.zeros_(linear.weight)
                else:
                    nn.init.trunc_normal_(linear.weight, std=0.02)
        device = self.blocks._device()
        self.blocks.add(
            task_id,
            weight=linear.weight.detach().to(device),
            bias=linear.bias.detach().to(device),
            classes=torch.tensor(new, dtype=torch.int64, device=device),
        )

    @torch.no_grad()
    def drop(self, classes: Sequence[int]) -> None:
        """Remove the rows of some classes; a block that has no row left goes as a whole."""
        gone = set(classes)
        for task_id in self.blocks.task_ids:
            held = self.blocks.get(task_id, "classes").tolist()
            kept = [row for row, c in enumerate(held) if c not in gone]
            if not kept:
                self.blocks.drop(task_id)
            elif len(kept) < len(held):
                names = ("weight", "bias", "classes")
                self.blocks.add(task_id, **{name: self.blocks.get(task_id, name)[kept] for name in names})

    @property
    def classes(self) -> list[int]:
        """Seen class ids, ascending: the meaning of the columns of :meth:`forward`."""
        return sorted(c for block in self.blocks.all_numbers("classes") for c in block)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of all seen classes.

        Args:
            features: (B, D).

        Returns:
            (B, S), column k belongs to ``self.classes[k]``.
        """
        ids = self.blocks.task_ids
        parts = [F.linear(features, self.blocks.get(t, "weight"), self.blocks.get(t, "bias")) for t in ids]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (B, S) in block order
        order = torch.cat(self.blocks.all("classes")).argsort()
        return logits.index_select(1, order)

    def parameters_for(self, classes: Sequence[int]) -> list[nn.Parameter]:
        """Weights and biases of the blocks that hold any of ``classes``."""
        wanted = set(classes)
        ids = [t for t in self.blocks.task_ids if wanted & set(self.blocks.numbers(t, "classes"))]
        return [p for t in ids for p in self.blocks.parameters_of(t).values()]


def columns_of(classes: Sequence[int], seen: Sequence[int]) -> list[int]:
    """Columns at which ``classes`` stand among the ascending ``seen`` classes, ascending."""
    wanted = set(classes)
    return [column for column, c in enumerate(seen) if c in wanted]


def targets_among(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Global class ids (B,) int64 -> their index among the ascending ``classes``, for a loss over those only."""
    return torch.searchsorted(constant(sorted(classes), labels.device), labels)


def picked(logits: Tensor, columns: Sequence[int]) -> Tensor:
    """The given columns of logits (B, S), in their order."""
    return logits.index_select(1, constant(list(columns), logits.device, torch.int64))


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    seen: Sequence[int],
    over: Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy over some of the seen classes; the other columns get no gradient at all.

    Args:
        logits: (B, S), columns = ``seen`` (ascending class ids).
        labels: (B,) int64 global class ids, each in ``over``.
        seen: the classes of the columns.
        over: candidates of the softmax, all of ``seen`` by default.
        weights: (B,) the factor of each row in the sum that replaces the mean.

    Returns:
        a scalar, computed in fp32 also under autocast.
    """
    over = sorted(seen) if over is None else sorted(over)
    if len(over) != len(seen):
        logits = picked(logits, columns_of(over, seen))
    if weights is None:
        return F.cross_entropy(logits.float(), targets_among(labels, over))
    return (weights * F.cross_entropy(logits.float(), targets_among(labels, over), reduction="none")).sum()
