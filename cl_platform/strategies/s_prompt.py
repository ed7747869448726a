"""S-Prompts (Wang et al., NeurIPS 2022), with images alone: prompt tokens and a head per task, chosen by k-means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from cl_platform.backbones import BlockExtras, PromptedViT
from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.random_streams import stream
from cl_platform.registry import strategies
from cl_platform.strategies.routing import RoutedStrategy
from cl_platform.strategies.s_lora import ROUTERS

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class SPromptConfig:
    """Keys of ``s_prompt``."""

    length: int = setting(10, doc="L, prompt tokens of a task; 0 switches prompts off", min=0)
    router: str = setting("kmeans", doc="centroids of a task; auto: class_mean unless for domains", choices=ROUTERS)
    clusters: int = setting(5, doc="K, centroids of a task under kmeans", min=1)
    metric: str = setting("l2", doc="distance to centroids; l1 as the released code", choices=("l2", "l1"))


@strategies.register("s_prompt")
class SPrompt(RoutedStrategy):
    """Each task trains prompt tokens, which enter behind the class token, and a head of its own.

    Positions are not added to prompts; the features are the trunk's own read-out, with the prompts cut out. At test
    time the nearest k-means centre of normalised frozen features, fitted on each task's images alone, names the task.
    The released code fits them on augmented images and measures L1 distances to them (``metric=l1``).
    """

    name = "s_prompt"
    Config = SPromptConfig

    def __init__(self, config: SPromptConfig) -> None:
        super().__init__(config, ("prompt",))

    def add_part(self, task: Task) -> None:
        """Tokens uniform in +-1/sqrt(D)."""
        vit = cast(PromptedViT, self.context.backbone)
        generator = stream(self.context.seed, task.task_id, "s_prompt_init")
        drawn = 2 * torch.rand(self.config.length, vit.width, generator=generator) - 1
        self.bank.add(task.task_id, prompt=drawn.to(next(vit.parameters()).device) / vit.width**0.5)

    def forward(self, batch: Batch) -> Tensor:
        """Features (B, D) with the current task's prompt in training, else with the one each image was routed to."""
        vit = cast(PromptedViT, self.context.backbone)
        tokens = vit.embed(batch.images)
        if not self.bank.task_ids or not self.config.length:
            return vit.readout(vit.finish(vit.run(tokens)))
        if self.training:
            prompts = self.bank.get(self._current, "prompt")[None]
        else:
            prompts = torch.stack(self.bank.all("prompt"))[self.route(batch)]  # (B, L, D)
        tokens = vit.finish(vit.run(tokens, extras={0: BlockExtras(tokens=prompts)}))
        return vit.readout(tokens, prompts.shape[1])
