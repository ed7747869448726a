"""S-LoRA (Wistuba et al. 2024, "Choice of PEFT Technique in Continual Learning"): an adapter and a head per task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from cl_platform.backbones import PromptedViT
from cl_platform.backbones.lora import LoRALayout, layout_of
from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.strategies.adapters import LoRAConfig, factor_names
from cl_platform.strategies.base import Context
from cl_platform.strategies.routing import RoutedStrategy

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

ROUTERS = ("auto", "kmeans", "class_mean")


@dataclass(frozen=True)
class SLoRAConfig(LoRAConfig):
    """Keys of ``s_lora``."""

    router: str = setting("auto", doc="centroids of a task; auto: kmeans for domains, else class_mean", choices=ROUTERS)
    clusters: int = setting(5, doc="K, centroids of a task under kmeans", min=1)
    metric: str = setting("l2", doc="distance to centroids", choices=("l2", "l1"))


@strategies.register("s_lora")
class SLoRA(RoutedStrategy):
    """S-Prompts with the prompt replaced by LoRA: each task trains a fresh adapter and a head of its own.

    At test time an image goes to the task with the nearest centroid of normalised features of the frozen trunk, by
    k-means of each task's training images alone (the paper) or by its class means; the adapters of a batch are
    gathered, one for each image, and run in one forward pass.
    """

    name = "s_lora"
    Config = SLoRAConfig
    layout: LoRALayout

    def __init__(self, config: SLoRAConfig) -> None:
        super().__init__(config, factor_names(config.targets))

    def attach(self, context: Context) -> None:
        """Find the layers.

        Raises:
            UserError: a target or a block that is not there.
        """
        super().attach(context)
        config, vit = self.config, cast(PromptedViT, context.backbone)
        self.layout = layout_of(vit, config.targets, config.blocks, config.rank, config.scale, "strategy.s_lora")

    def add_part(self, task: Task) -> None:
        """A fresh adapter that changes nothing yet."""
        self.bank.add(task.task_id, **self.layout.first(self.context.seed, task.task_id))

    def forward(self, batch: Batch) -> Tensor:
        """Features (B, D) with the current task's adapter in training, else with the one each image was routed to."""
        vit = cast(PromptedViT, self.context.backbone)
        tokens, start = self.context.embed(batch)
        extras = {}
        if self.training:
            extras = self.layout.extras(dict(self.bank.parameters_of(self._current)))
        elif self.bank.task_ids:
            stacked = {name: torch.stack(self.bank.all(name)) for name in factor_names(list(self.layout.targets))}
            extras = self.layout.extras(stacked, self.route(batch)[:, None])
        return vit.readout(vit.finish(vit.run(tokens, start, extras=extras)))

    def first_block(self) -> int | None:
        """The first block with adapters."""
        return self.layout.blocks[0]

    def inspect(self) -> dict[str, Any]:
        """Numbers of one adapter, their share of the trunk's, and the router's centroids."""
        numbers = self.layout.numbers
        return {"adapter_parameters": numbers, "share_of_trunk": self.layout.share(numbers), **super().inspect()}
