"""One object of every kind, each as small as it can be."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cl_platform.backbones import Backbone, BackboneConfig
from cl_platform.config import setting
from cl_platform.memory.policies import Decision, Policy
from cl_platform.metrics import AccuracyMatrix
from cl_platform.registry import backbones, buffer_policies, metrics, scenarios, strategies, unlearning_methods
from cl_platform.scenarios import ScenarioConfig, build_stream
from cl_platform.strategies import Needs, Step, Strategy
from cl_platform.unlearning.approximate.base import ApproximateMethod

CL_PLATFORM_API = 1


@dataclass(frozen=True)
class PatientConfig:
    """Keys of ``patient``."""

    smoothing: float = setting(0.1, doc="share of the target spread over all candidates", min=0, max=1)
    lambda_: float = setting(1.0, doc="weight of the loss", min=0)


@strategies.register("patient", defaults="patient.yaml")
class Patient(Strategy):
    """Smoothed labels on the whole network (Nobody et al., 2026)."""

    Config = PatientConfig
    needs = Needs(boundaries=False)
    owns = frozenset({"classification"})
    leaks = frozenset({"L-01", "L-05", "L-07"})

    def losses(self, step: Step) -> dict[str, torch.Tensor]:
        place = {class_id: column for column, class_id in enumerate(step.seen_classes)}
        wanted = torch.tensor([place[int(label)] for label in step.batch.labels])
        loss = F.cross_entropy(step.logits, wanted, label_smoothing=self.config.smoothing)
        return {"ce": self.config.lambda_ * loss}


@dataclass(frozen=True)
class StripesConfig(ScenarioConfig):
    """Keys of ``striped_digits``: those of every scenario, and one more."""

    stripe: int = setting(2, doc="rows between two black ones", min=1)


@scenarios.register("striped_digits", config=StripesConfig, defaults={"num_tasks": 2, "train_per_class": 8})
def striped_digits(scenario: StripesConfig, data, seed):
    """Handwritten digits behind bars."""
    stream = build_stream(
        ScenarioConfig(kind="split_digits", num_tasks=scenario.num_tasks, train_per_class=scenario.train_per_class),
        data,
        seed,
    )
    return replace(stream, name="striped_digits", source=f"{stream.source}, a bar in every {scenario.stripe} rows")


@dataclass(frozen=True)
class PixelsConfig(BackboneConfig):
    """Keys of ``pixels``."""

    width: int = setting(16, doc="features", min=1)


@backbones.register("pixels", config=PixelsConfig)
def pixels(config: PixelsConfig, seed: int) -> Backbone:
    """One layer on the pixels."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(3 * 8 * 8, config.width)
    layer.weight.data.normal_(0, 0.1, generator=generator)
    layer.bias.data.zero_()
    return Backbone(nn.Sequential(nn.Flatten(), layer, nn.ReLU()), "other", config.width, 8)


@metrics.register("first_task_left")
def first_task_left(matrix: AccuracyMatrix) -> float | None:
    """What is left of the first task at the end."""
    return matrix.accuracy(matrix.num_trained - 1, 0) if matrix.num_trained else None


@buffer_policies.register("newest")
class Newest(Policy):
    """Keeps the newest examples, one after the other round and round."""

    name = "newest"

    def decide(self, offers, contents):
        index = self._count(offers)[-self.capacity :]
        return Decision(index % self.capacity, np.arange(len(offers))[-self.capacity :])


@dataclass(frozen=True)
class FadeConfig:
    """Keys of ``fade``."""

    share: float = setting(0.5, doc="what all trained weights lose", min=0, max=1)


@unlearning_methods.register("fade")
class Fade(ApproximateMethod):
    """All trained weights shrink."""

    name = "fade"
    Config = FadeConfig

    def unlearn(self, work):
        with torch.no_grad():
            for parameter in work.parameters.values():
                parameter.mul_(1 - self.config.share)
        return {"share": self.config.share}
