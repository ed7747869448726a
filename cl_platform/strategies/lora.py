"""One LoRA adapter trained through all tasks: what plain training becomes behind a frozen transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cl_platform.backbones.prefix import BlockExtras
from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.adapters import AdapterStrategy, LoRAConfig, note_order
from cl_platform.strategies.base import Component, Context, Needs

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class SequentialLoRAConfig(LoRAConfig):
    """Keys of ``lora``."""

    mode: str = setting("continue", doc="train on, or fold in after each task", choices=("continue", "merge"))


@strategies.register("lora")
class SequentialLoRA(AdapterStrategy):
    """``W + s B A`` with one pair ``A``, ``B`` a layer, trained on each task in turn without protection.

    ``mode=continue`` never resets the pair. ``mode=merge`` adds ``s B A`` to a sum after each task and starts the next
    task with a new pair; the trunk's own weights stay as they were. Each task's head rows are trained by the
    cross-entropy over its own classes.
    """

    name = "lora"
    Config = SequentialLoRAConfig
    needs = Needs(prompts=True, boundaries=False)
    leaks = frozenset({"L-01"})

    def __init__(self, config: SequentialLoRAConfig) -> None:
        super().__init__(config)
        if config.mode == "merge":
            self.leaks = frozenset({"L-01", "L-03"})  # type: ignore[misc]
        self.factors = nn.ParameterDict()
        self.folded = nn.Module()
        self.trained = Slots(buffers=("order",))

    def attach(self, context: Context) -> None:
        """Make room for the adapter; its first values come with the first task."""
        super().attach(context)
        for name, tensor in self.layout.first(context.seed, -1).items():
            self.factors[name] = nn.Parameter(torch.zeros_like(tensor))
        if self.config.mode == "merge":
            for target in self.layout.targets:
                shape = (len(self.layout.blocks), *reversed(self.layout.widths(target)))
                device = self.factors[f"A_{target}"].device
                self.folded.register_buffer(target, torch.zeros(shape, device=device))  # (blocks, d_out, d_in)

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        """Draw the pair before the first task; with ``mode=merge`` before each."""
        super().begin_task(task)
        new = note_order(self.trained, task.task_id, next(iter(self.factors.values())).device)
        if new and (self.config.mode == "merge" or len(self.trained.task_ids) == 1):
            for name, tensor in self.layout.first(self.context.seed, task.task_id).items():
                self.factors[name].copy_(tensor)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """With ``mode=merge`` fold the pair into the sum; the function stays the same."""
        if self.config.mode == "merge":
            for target, total in self.folded.named_buffers():
                down, up = self.factors[f"A_{target}"], self.factors[f"B_{target}"]
                total.copy_(total.double() + self.layout.scale * (up.double() @ down.double()))
                up.zero_()

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Both factors of every layer."""
        return list(self.factors.values())

    def extras(self, batch: Batch) -> Mapping[int, BlockExtras]:
        """The same adapter for all images."""
        return self.layout.extras(dict(self.factors.items()), dense=self.dense())

    def dense(self) -> dict[str, Tensor] | None:
        """What was folded so far, by target."""
        return dict(self.folded.named_buffers()) or None

    def components(self) -> Iterator[Component]:
        """All belongs to every task so far."""
        tasks = tuple(self.trained.task_ids)
        yield Component("factors", tasks, "adapter", dict(self.factors.state_dict()))
        if self.config.mode == "merge":
            yield Component("folded", tasks, "adapter", dict(self.folded.named_buffers()))
        yield Component("trained", tasks, "lineage", dict(self.trained.state_dict()))

    def drop_task(self, task_id: int) -> None:
        """Nothing can be taken out of the one adapter: it keeps what it learnt, and so does its lineage."""
