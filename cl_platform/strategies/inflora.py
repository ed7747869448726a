"""InfLoRA (Liang & Li, CVPR 2024): each adapter reads only directions in which earlier tasks' inputs do not lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from cl_platform.backbones import BlockExtras, PromptedViT
from cl_platform.backbones.lora import LoRALayout, layout_of
from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.adapters import AdapterStrategy, note_order, tasks_until
from cl_platform.strategies.base import Component, Context, Strategy
from cl_platform.strategies.gradient_memory import Span, design, extend_span
from cl_platform.strategies.prompting import learning_order

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

READ_BATCH = 256


@dataclass(frozen=True)
class InfLoRAConfig:
    """Keys of ``inflora``; symbols as in the paper."""

    rank: int = setting(10, doc="r, rank of an adapter", min=1)
    epsilon: float = setting(0.95, doc="share of a task's inputs that later adapters may not read", min=0, max=1)
    blocks: list[int] | str = setting("all", doc="blocks with adapters: all, or their numbers")


@strategies.register("inflora")
class InfLoRA(AdapterStrategy):
    """``W + sum_i B_i A_i`` at keys and values; ``A_t`` is designed before task t and frozen, ``B_t`` trained from 0.

    The rows of ``A_t`` are leading directions of the task's inputs to the layer, projected off the span ``M`` of the
    earlier tasks' inputs (or into what is left free, once that is smaller). After the task ``M`` takes in the task's
    inputs up to the share ``e_t = epsilon + (1 - epsilon) t / T`` of their energy, by DualGPM. Both passes see the
    images under the evaluation transform; the released code sees augmented ones. Rows of ``A_t`` in which there is
    nothing left to read are zero here; left as they come, they would be arbitrary and leave the allowed space.
    """

    name = "inflora"
    Config = InfLoRAConfig
    leaks = frozenset({"L-02", "L-03", "L-12"})

    basis: Tensor
    columns: Tensor
    free: Tensor

    def __init__(self, config: InfLoRAConfig) -> None:
        super().__init__(config)
        self.bank = Slots(parameters=("B_k", "B_v"), buffers=("A",))
        self.trained = Slots(buffers=("order",))
        self._current = -1

    def attach(self, context: Context) -> None:
        """Find the layers, and make room for the spans.

        Raises:
            UserError: a block that is not there.
        """
        Strategy.attach(self, context)
        config, vit = self.config, cast(PromptedViT, context.backbone)
        self.layout: LoRALayout = layout_of(vit, ["k", "v"], config.blocks, config.rank, 1.0, "strategy.inflora")
        count, width, device = len(self.layout.blocks), vit.width, next(vit.parameters()).device
        self.register_buffer("basis", torch.zeros(count, width, width, dtype=torch.float64, device=device))
        self.register_buffer("columns", torch.zeros(count, dtype=torch.int64, device=device))
        self.register_buffer("free", torch.zeros(count, dtype=torch.int64, device=device))

    def span(self, index: int) -> Span | None:
        """What is known of the inputs to the adapted block of the given index; ``None`` before the first task."""
        if not int(self.columns[index]) and not int(self.free[index]):
            return None
        basis = self.basis[index, :, : int(self.columns[index])].cpu().clone()
        return Span(basis, free=bool(self.free[index]))

    def begin_task(self, task: Task) -> None:
        """Design the task's ``A`` from a pass over its images."""
        super().begin_task(task)
        self._current = task.task_id
        if task.task_id in self.trained:
            return
        device = self.basis.device
        rows = [design(c, self.span(i), self.config.rank) for i, c in enumerate(self.input_moments(task))]
        first = self.layout.first(self.context.seed, task.task_id)
        self.bank.add(task.task_id, A=torch.stack(rows).float().to(device), B_k=first["B_k"], B_v=first["B_v"])
        note_order(self.trained, task.task_id, device)

    def end_task(self, task: Task) -> None:
        """Take the task's inputs, as the adapted network sees them, into the spans."""
        done = learning_order(self.trained).index(task.task_id)
        epsilon = self.config.epsilon
        tasks = self.context.num_tasks
        share = epsilon + (1 - epsilon) * min(done, tasks - 1) / tasks
        for index, moments in enumerate(self.input_moments(task)):
            grown = extend_span(self.span(index), moments, share)
            self.basis[index] = 0.0
            self.basis[index, :, : grown.basis.shape[1]] = grown.basis.to(self.basis.device)
            self.columns[index], self.free[index] = grown.basis.shape[1], int(grown.free)

    @torch.no_grad()
    def input_moments(self, task: Task) -> list[Tensor]:
        """``mean x x^T`` (D, D) float64 over the tokens x that enter each adapted block's attention, on the CPU."""
        vit = cast(PromptedViT, self.context.backbone)
        totals = [torch.zeros(vit.width, vit.width, dtype=torch.float64) for _ in self.layout.blocks]
        count = 0
        was_training = vit.training
        vit.eval()
        for rows in torch.arange(len(task.train)).split(READ_BATCH):
            batch = self.context.evaluated(task, rows)
            with self.context.autocast():
                seen = self._inputs(vit, batch)
            for total, x in zip(totals, seen, strict=True):
                x = x.flatten(0, 1).double().cpu()  # (B N, D)
                total += x.T @ x
            count += seen[0].shape[0] * seen[0].shape[1]
        vit.train(was_training)
        return [total / max(count, 1) for total in totals]

    def _inputs(self, vit: PromptedViT, batch: Batch) -> list[Tensor]:
        seen: dict[int, Tensor] = {}

        def watching(block: int, inner: Any) -> Any:
            def delta(x: Tensor) -> Tensor:
                seen[block] = x
                return inner(x) if inner else torch.zeros(*x.shape[:2], 3 * vit.attention_width, device=x.device)

            return delta

        adapted = self.extras(batch)
        extras = {}
        for block in self.layout.blocks:
            inner = (adapted[block].delta or {})["qkv"] if block in adapted else None
            extras[block] = BlockExtras(delta={"qkv": watching(block, inner)})
        vit.run(vit.embed(batch.images), stop=self.layout.blocks[-1] + 1, extras=extras)
        return [seen[block] for block in self.layout.blocks]

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The task's ``B`` of keys and of values."""
        return list(self.bank.parameters_of(self._current).values())

    def extras(self, batch: Batch) -> Mapping[int, BlockExtras]:
        """The sum of all adapters, for all images."""
        if not self.bank.task_ids:
            return {}
        down = torch.cat(self.bank.all("A"), dim=1)  # (blocks, T r, D)
        ups = {name: torch.cat(self.bank.all(name), dim=2) for name in ("B_k", "B_v")}
        return self.layout.extras({"A_k": down, "A_v": down, **ups})

    def components(self) -> Iterator[Component]:
        """An adapter was designed around the earlier tasks' inputs; the spans hold those of all."""
        for task_id in self.bank.task_ids:
            tensors = dict(self.bank.tasks[str(task_id)].state_dict())
            yield Component(f"bank.tasks.{task_id}", tasks_until(self.trained, task_id), "adapter", tensors)
        tasks = tuple(self.trained.task_ids)
        for name in ("basis", "columns", "free"):
            yield Component(name, tasks, "span", {name: getattr(self, name)})
        yield Component("trained", tasks, "lineage", dict(self.trained.state_dict()))

    def drop_task(self, task_id: int) -> None:
        """Remove the task's adapter. Spans and later adapters keep what they owe to it, and so does their lineage."""
        self.bank.drop(task_id)

    def inspect(self) -> dict[str, Any]:
        """Trained numbers of an adapter, rows of each task's ``A`` that read anything, directions closed by block."""
        width = self.basis.shape[1]
        closed = [width - c if free else c for c, free in zip(self.columns.tolist(), self.free.tolist(), strict=True)]
        used = {str(t): (self.bank.get(t, "A") != 0).any(2).sum(1).tolist() for t in self.bank.task_ids}
        trained = 2 * len(self.layout.blocks) * self.config.rank * self.layout.widths("k")[1]
        return {
            "adapter_parameters": trained,
            "share_of_trunk": self.layout.share(trained),
            "rows_used": used,
            "directions_closed": closed,
        }
