"""O-LoRA (Wang et al., Findings of EMNLP 2023): a new adapter is pushed away from the directions of earlier ones."""

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
from cl_platform.strategies.adapters import (
    AdapterStrategy,
    LoRAConfig,
    factor_names,
    note_order,
    summed,
    tasks_until,
)
from cl_platform.strategies.base import Component, Step
from cl_platform.strategies.prompting import learning_order

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class OLoRAConfig(LoRAConfig):
    """Keys of ``olora``; symbols as in the paper."""

    lambda1: float = setting(0.5, doc="weight of the overlap with earlier tasks' directions", min=0)
    lambda2: float = setting(0.0, doc="weight of the norms of the task's own factors", min=0)
    orth: str = setting("abs", doc="overlap: sum of absolute values, or of squares", choices=("abs", "fro2"))


@strategies.register("olora")
class OLoRA(AdapterStrategy):
    """``W + s sum_i B_i A_i`` over the tasks so far, of which only the newest pair is trained.

    The loss adds ``lambda1 * sum over layers and earlier tasks of sum |A_i A_t^T|``, so that the new adapter reads
    other input directions than the earlier ones. The paper prints the matrices the other way round and its code for
    language models sums absolute values, which is done here; ``orth=fro2`` squares them. Answers use all adapters.
    """

    name = "olora"
    Config = OLoRAConfig
    leaks = frozenset({"L-03", "L-04"})
    stability = frozenset({"ortho"})

    def __init__(self, config: OLoRAConfig) -> None:
        super().__init__(config)
        self.bank = Slots(parameters=factor_names(config.targets))
        self.trained = Slots(buffers=("order",))
        self._current = -1

    def begin_task(self, task: Task) -> None:
        """Add the task's adapter, which changes nothing yet."""
        super().begin_task(task)
        self._current = task.task_id
        if task.task_id not in self.trained:
            self.bank.add(task.task_id, **self.layout.first(self.context.seed, task.task_id))
            note_order(self.trained, task.task_id, next(self.bank.parameters()).device)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The task's own factors."""
        return list(self.bank.parameters_of(self._current).values())

    def extras(self, batch: Batch) -> Mapping[int, BlockExtras]:
        """The sum of all adapters, for all images."""
        return self.layout.extras(summed(self.bank, self.layout.targets)) if self.bank.task_ids else {}

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy, and from the second task on the overlap; the norms if they have a weight."""
        terms = super().losses(step)
        earlier = [t for t in learning_order(self.trained) if t in self.bank and t != self._current]
        if earlier and self.config.lambda1:
            terms["ortho"] = self.config.lambda1 * self.overlap(earlier)
        if self.config.lambda2:
            own = self.bank.parameters_of(self._current).values()
            norms = torch.stack([torch.linalg.vector_norm(factor, dim=(1, 2)).sum() for factor in own])
            terms["norm"] = self.config.lambda2 * norms.sum()
        return terms

    def overlap(self, earlier: list[int]) -> Tensor:
        """``sum over layers and earlier tasks of sum_jk |A_i A_t^T|_jk``, or of the squares; one product a target."""
        total = torch.zeros((), device=next(self.bank.parameters()).device)
        with torch.autocast(device_type=total.device.type, enabled=False):
            for target in self.layout.targets:
                past = torch.cat([self.bank.get(t, f"A_{target}").detach() for t in earlier], dim=1)
                own = self.bank.get(self._current, f"A_{target}")
                products = past @ own.transpose(1, 2)  # (blocks, tasks * r, r)
                total = total + (products.abs() if self.config.orth == "abs" else products.square()).sum()
        return total

    def components(self) -> Iterator[Component]:
        """An adapter was pushed away from the earlier ones and trained on top of them."""
        for task_id in self.bank.task_ids:
            tensors = dict(self.bank.tasks[str(task_id)].state_dict())
            yield Component(f"bank.tasks.{task_id}", tasks_until(self.trained, task_id), "adapter", tensors)
        yield Component("trained", tuple(self.trained.task_ids), "lineage", dict(self.trained.state_dict()))

    def drop_task(self, task_id: int) -> None:
        """Remove the task's adapter. Later ones keep what they owe to it, and so does their lineage."""
        self.bank.drop(task_id)
