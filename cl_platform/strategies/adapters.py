"""What strategies with low-rank adapters share: their keys, the forward pass, the loss, the record of learning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cl_platform.backbones import PromptedViT
from cl_platform.backbones.lora import LoRALayout, layout_of
from cl_platform.backbones.prefix import BlockExtras
from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.slots import Slots
from cl_platform.strategies.base import Context, Needs, ParameterGroup, Step, Strategy
from cl_platform.strategies.prompting import learning_order

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class LoRAConfig:
    """Keys that all strategies with LoRA have."""

    rank: int = setting(8, doc="r, rank of an adapter", min=1)
    alpha: float = setting(8.0, doc="adapters count alpha/rank", above=0)
    rslora: bool = setting(False, doc="adapters count alpha/sqrt(rank)")
    targets: list[str] = setting(factory=lambda: ["q", "v"], doc="layers with adapters: q, k, v, proj, fc1, fc2")
    blocks: list[int] | str = setting("all", doc="blocks with adapters: all, or their numbers")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def factor_names(targets: list[str]) -> tuple[str, ...]:
    """Names of an adapter's tensors."""
    return tuple(f"{part}_{target}" for target in targets for part in "AB")


class AdapterStrategy(Strategy):
    """A frozen transformer whose linear layers have trained low-rank adapters beside them."""

    needs = Needs(prompts=True)
    owns = frozenset({"features", "classification", "trainable"})
    layout: LoRALayout
    _head_rows: list[nn.Parameter]

    def attach(self, context: Context) -> None:
        """Find the layers.

        Raises:
            UserError: a target or a block that is not there.
        """
        super().attach(context)
        config, vit = self.config, cast(PromptedViT, context.backbone)
        key = f"strategy.{self.name}"
        self.layout = layout_of(vit, config.targets, config.blocks, config.rank, config.scale, key)

    def begin_task(self, task: Task) -> None:
        """Remember the head rows of the task's classes."""
        self._head_rows = self.context.head.parameters_for(task.classes)

    def let_go(self) -> None:
        """See :class:`Strategy`."""
        self._head_rows = []

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters that the current task trains."""
        raise NotImplementedError

    def trainable(self) -> Iterator[ParameterGroup]:
        """The current adapter, and the head rows of the task's classes."""
        yield ParameterGroup(self.adapter_parameters() + self._head_rows)

    def extras(self, batch: Batch) -> Mapping[int, BlockExtras]:
        """What each block gets for a batch."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """Features (B, D) of the adapted trunk."""
        vit = cast(PromptedViT, self.context.backbone)
        tokens, start = self.context.embed(batch)
        return vit.readout(vit.finish(vit.run(tokens, start, extras=self.extras(batch))))

    def first_block(self) -> int | None:
        """The first block with adapters."""
        return self.layout.blocks[0]

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy over the task's own classes."""
        return {"ce": step.cross_entropy()}

    def inspect(self) -> dict[str, Any]:
        """Numbers of one adapter, and their share of the trunk's."""
        return {"adapter_parameters": self.layout.numbers, "share_of_trunk": self.layout.share(self.layout.numbers)}


def note_order(trained: Slots, task_id: int, device: torch.device) -> bool:
    """Record that a task is learnt after those before it; false if it is known already."""
    if task_id in trained:
        return False
    trained.add(task_id, order=torch.tensor(len(trained.task_ids), device=device))
    return True


def tasks_until(trained: Slots, task_id: int) -> tuple[int, ...]:
    """Tasks learnt before ``task_id`` and itself, ascending: those that shaped what was trained on top of them."""
    order = learning_order(trained)
    return tuple(sorted(order[: order.index(task_id) + 1]))


def summed(bank: Slots, targets: Iterable[str]) -> dict[str, Tensor]:
    """Factors of one adapter that acts as the sum of all in ``bank``: their ranks stand beside one another."""
    found = {}
    for target in targets:
        found[f"A_{target}"] = torch.cat(bank.all(f"A_{target}"), dim=1)  # (blocks, T r, d_in)
        found[f"B_{target}"] = torch.cat(bank.all(f"B_{target}"), dim=2)  # (blocks, d_out, T r)
    return found
