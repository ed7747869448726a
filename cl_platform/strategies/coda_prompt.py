"""CODA-Prompt (Smith et al., CVPR 2023): prompts as attention-weighted sums of components that grow with the tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_platform.backbones import BlockExtras, PromptedViT
from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.random_streams import stream
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.base import Context, Needs, ParameterGroup, Step, Strategy
from cl_platform.strategies.prompting import check_layers

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

PARTS = ("prompt", "key", "attention")
INITS = ("span", "classical")


@dataclass(frozen=True)
class CODAPromptConfig:
    """Keys of ``coda_prompt``; symbols as in the paper."""

    num_components: int | None = setting(100, doc="M, all components; must divide by the tasks", min=1)
    components_per_task: int | None = setting(None, doc="components a task adds; instead of num_components", min=1)
    length: int = setting(8, doc="L, rows of a prompt: half become keys, half values; 0 switches prompts off", min=0)
    layers: list[int] = setting(factory=lambda: [0, 1, 2, 3, 4], doc="blocks that receive a prompt")
    mu: float = setting(0.0, doc="weight of the orthogonality penalty", min=0)
    ortho_init: str = setting("span", doc="new components orthogonal to all old rows, or as released", choices=INITS)


@strategies.register("coda_prompt")
class CODAPrompt(Strategy):
    """Per layer, the prompt of an image is ``sum_m cos(q(x) * A_m, K_m) P_m`` over the components of all learnt tasks.

    ``q(x)`` is the unprompted trunk's feature. A task adds a block of ``P``, ``K``, ``A`` orthogonal to the earlier
    rows and trains only that block and its head rows, by cross-entropy over its own classes. The released code
    projects new rows off each trained old row in turn, which misses the orthogonal complement once the old rows are
    no longer orthogonal; ``ortho_init=span`` projects off their span, ``classical`` does what was released.
    """

    name = "coda_prompt"
    Config = CODAPromptConfig
    needs = Needs(prompts=True)
    owns = frozenset({"features", "classification", "trainable"})
    query = "beside"
    leaks = frozenset({"L-02", "L-03"})
    stability = frozenset({"ortho"})

    def __init__(self, config: CODAPromptConfig) -> None:
        super().__init__(config)
        self.bank = Slots(parameters=PARTS)
        self._current = -1

    def attach(self, context: Context) -> None:
        """Check the components against the stream and the trunk.

        Raises:
            UserError: components do not divide by the tasks or exceed the width; no block, or one that is not there.
        """
        super().attach(context)
        config, key = self.config, "strategy.coda_prompt"
        if config.components_per_task is None:
            total = config.num_components
            if total is None:
                raise UserError(f"{key}.num_components", None, "one of it and components_per_task is needed", "Set one")
            if total % context.num_tasks:
                lower = total - total % context.num_tasks
                choices = " or ".join(str(n) for n in (lower, lower + context.num_tasks) if n)
                raise UserError(
                    f"{key}.num_components", total, f"must divide by the {context.num_tasks} tasks",
                    f"Set it to {choices}, or set {key}.components_per_task",
                )  # fmt: skip
            self.per_task = total // context.num_tasks
        else:
            self.per_task = config.components_per_task
        total, width = self.per_task * context.total_tasks, context.backbone.feature_dim
        if total > width:
            name = "num_components" if config.components_per_task is None else "components_per_task"
            raise UserError(
                f"{key}.{name}", getattr(config, name),
                f"all {context.total_tasks} tasks together may have at most {width} components, the trunk's width",
                "Lower it: no more rows can be orthogonal",
            )  # fmt: skip
        check_layers(f"{key}.layers", config.layers, context)
        if not config.layers:
            todo = f"Name one, or set {key}.length=0"
            raise UserError(f"{key}.layers", config.layers, "at least one block is needed", todo)
        if config.length % 2:
            raise UserError(f"{key}.length", config.length, "must be even: half are keys, half values", "Change it")

    def begin_task(self, task: Task) -> None:
        """Add the task's block, orthogonal to all earlier rows."""
        self._current = task.task_id
        self._head_rows = self.context.head.parameters_for(task.classes)
        if task.task_id in self.bank or self.config.length == 0:
            return
        generator = stream(self.context.seed, task.task_id, "coda_init")
        vit = cast(PromptedViT, self.context.backbone)
        device = next(vit.parameters()).device
        block: dict[str, Tensor] = {}
        for part in PARTS:
            dim = self.config.length * vit.attention_width if part == "prompt" else vit.feature_dim
            old = self._past(part)
            rows = [
                orthogonal_rows(o, self.per_task, dim, generator, self.config.ortho_init)
                for o in ([None] * len(self.config.layers) if old is None else old.flatten(2))
            ]
            block[part] = torch.stack(rows).to(device)  # (layers, m, dim)
        block["prompt"] = block["prompt"].unflatten(2, (self.config.length, vit.attention_width))  # (layers, m, L, D)
        self.bank.add(task.task_id, **block)

    def _past(self, part: str) -> Tensor | None:
        parts = self.bank.all(part)
        return torch.cat([p.detach().cpu() for p in parts], dim=1) if parts else None

    def trainable(self) -> Iterator[ParameterGroup]:
        """The task's own block and the head rows of its classes."""
        own = [] if self.config.length == 0 else list(self.bank.parameters_of(self._current).values())
        yield ParameterGroup(own + self._head_rows)

    def _stacked(self, part: str) -> Tensor:
        """All rows (layers, M, ...) of learnt tasks; only the current task's carry a gradient."""
        tensors = {t: self.bank.get(t, part) for t in self.bank.task_ids}  # ascending, whatever is being trained
        return torch.cat([t if task_id == self._current else t.detach() for task_id, t in tensors.items()], dim=1)

    def prompts(self, query: Tensor) -> Tensor:
        """Prompts (layers, B, L, D) for queries (B, D), in fp32."""
        with torch.autocast(device_type=query.device.type, enabled=False):
            prompt, key, attention = (self._stacked(part).float() for part in PARTS)
            alpha = component_weights(query.float(), key, attention)  # (layers, B, M)
            return torch.einsum("jbm,jmld->jbld", alpha, prompt)

    def forward(self, batch: Batch) -> Tensor:
        """Features (B, D) of the prompted trunk."""
        vit = cast(PromptedViT, self.context.backbone)
        tokens, start = self.context.embed(batch)
        extras = {}
        if self.config.length and len(self.bank.task_ids):
            half = self.config.length // 2
            for number, prompt in zip(self.config.layers, self.prompts(batch.extra["query"]), strict=True):
                extras[number] = BlockExtras(kv=(prompt[:, :half], prompt[:, half:]))  # each (B, L/2, D)
        return vit.readout(vit.finish(vit.run(tokens, start, extras=extras)))

    def first_block(self) -> int | None:
        """The first block with prompts."""
        return min(self.config.layers) if self.config.length else None

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropy over the task's own classes, and the orthogonality penalty if it has a weight."""
        terms = {"ce": step.cross_entropy()}
        if self.config.mu > 0 and self.config.length:
            terms["ortho"] = self.config.mu * self.penalty()
        return terms

    def let_go(self) -> None:
        """See :class:`Strategy`."""
        self._head_rows = []

    def penalty(self) -> Tensor:
        """``sum over layers and parts of mean((X X^T - I)^2)``; old rows are constants, so new rows move away."""
        total = torch.zeros((), device=next(self.parameters()).device)
        with torch.autocast(device_type=total.device.type, enabled=False):
            for part in PARTS:
                rows = self._stacked(part).flatten(2)  # (layers, M, dim)
                gram = rows @ rows.transpose(1, 2)
                total = total + (gram - torch.eye(rows.shape[1], device=rows.device)).square().mean(dim=(1, 2)).sum()
        return total


def component_weights(query: Tensor, key: Tensor, attention: Tensor) -> Tensor:
    """``cos(q * A_m, K_m)`` for every layer, image and component without the (B, M, D) product.

    Args:
        query: (B, D).
        key: (layers, M, D).
        attention: (layers, M, D).

    Returns:
        (layers, B, M) in [-1, 1].
    """
    key = F.normalize(key, dim=2)
    numerator = torch.einsum("bd,jmd->jbm", query, attention * key)
    norm = torch.einsum("bd,jmd->jbm", query.square(), attention.square()).clamp_min(1e-24).sqrt()
    return numerator / norm


def orthogonal_rows(old: Tensor | None, count: int, dim: int, generator: torch.Generator, how: str) -> Tensor:
    """New unit rows (count, dim) orthogonal to each other and to ``old`` (n, dim); drawn from ``generator``."""
    draw = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    if how == "classical":
        return _classical_gram_schmidt(old, draw)
    if old is not None and len(old):
        basis = torch.linalg.qr(old.double().T).Q  # (dim, n)
        for _ in range(2):  # twice is enough for full precision
            draw = draw - (draw @ basis) @ basis.T
    q, r = torch.linalg.qr(draw.T)  # (dim, count)
    return (q * torch.sign(torch.diagonal(r))).T.float().contiguous()


def _classical_gram_schmidt(old: Tensor | None, draw: Tensor) -> Tensor:
    rows = [] if old is None else [row.double() for row in old]
    fresh = []
    for vector in draw:
        original = vector
        for row in rows:
            vector = vector - (original @ row) / (row @ row) * row
        vector = vector / vector.norm()
        rows.append(vector)
        fresh.append(vector)
    return torch.stack(fresh).float()
