"""Elastic weight consolidation (Kirkpatrick et al. 2017): what the Fisher information calls important moves little."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.heads import targets_among
from cl_platform.random_streams import stream
from cl_platform.registry import strategies
from cl_platform.strategies.anchoring import AnchoringStrategy, distance, weighted_distance
from cl_platform.strategies.base import Context, Step

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

log = logging.getLogger("cl_platform")

ESTIMATORS = ("exact", "sample", "empirical", "pred")
EXACT_UP_TO = 20
"""Seen classes up to which ``auto`` sums over all of them."""
CHUNK_NUMBERS, CHUNK_EXAMPLES = 2**26, 64
"""Bounds on what is held at once: numbers of per-example gradients, and examples."""

LogProbabilities = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class EWCConfig:
    """Keys of ``ewc``."""

    lambda_: float = setting(20.0, doc="weight of the penalty lambda/2 * sum F * distance^2", min=0)
    mode: str = setting("online", doc="one record of all tasks, or one per task", choices=("online", "separate"))
    gamma: float = setting(1.0, doc="online: factor on the Fisher information of earlier tasks", min=0, max=1,
                           only_with=("mode", ("online",)))  # fmt: skip
    fisher: str = setting(
        "auto", doc="whose log-probability is derived; auto: exact up to 20 seen classes, else sample",
        choices=("auto", *ESTIMATORS),
    )  # fmt: skip
    fisher_samples: int = setting(1000, doc="training images of a task that estimate it, drawn by the seed", min=1)


def penalty(
    parameters: Sequence[Tensor], anchors: Sequence[Tensor], fishers: Sequence[Tensor], strength: float
) -> Tensor:
    """``lambda/2 * sum_i F_i (theta_i - anchor_i)^2``.

    Other code leaves out the factor 1/2: mammoth's ``e_lambda`` and Avalanche's ``ewc_lambda`` are half of ours.
    """
    return 0.5 * strength * weighted_distance(parameters, anchors, fishers)


def merged(earlier: Mapping[str, Tensor], latest: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """``gamma * earlier + latest`` by name; a name that one side lacks counts as zero there."""
    total = {name: gamma * tensor for name, tensor in earlier.items()}
    return total | {name: total[name] + tensor if name in total else tensor for name, tensor in latest.items()}


def fisher_sums(
    log_probabilities: LogProbabilities, parameters: Mapping[str, Tensor], estimator: str, rows: Tensor,
    targets: Tensor, uniforms: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    """Sum over examples of the squared gradient of ``log p(y|x)``, squared for each example by itself.

    Args:
        log_probabilities: parameters by name and one row number -> log-probabilities (C,) of that example.
        parameters: by name.
        estimator: ``exact``: the mean over ``y ~ p(.|x)``; ``sample``: one draw of it; both estimate the Fisher
            information. ``empirical``: the true label; ``pred``: the likeliest.
        rows: (n,) int64 row numbers.
        targets: (n,) int64 columns of the true labels; read by ``empirical`` alone.
        uniforms: (n,) in [0, 1), one a row; read by ``sample`` alone.

    Returns:
        tensors of the parameters' names and shapes, all >= 0; divide by n.
    """

    def of_one(values: dict[str, Tensor], row: Tensor, target: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        logs, derive = vjp(lambda v: log_probabilities(v, row), values)  # type: ignore[misc]
        columns = torch.arange(len(logs), device=logs.device)
        if estimator == "exact":
            chosen = [(column, log_p.exp()) for column, log_p in zip(columns, logs, strict=True)]
        else:
            drawn = (logs.exp().cumsum(0) <= uniform).sum().clamp(max=len(logs) - 1)
            y = {"sample": drawn, "empirical": target, "pred": logs.argmax()}[estimator]
            chosen = [(y, torch.ones_like(logs[0]))]
        total = {name: torch.zeros_like(value) for name, value in values.items()}
        for y, weight in chosen:
            (gradient,) = derive((columns == y).to(logs.dtype) * weight.sqrt())  # one pass over memory, not three
            total = {name: torch.addcmul(total[name], gradient[name], gradient[name]) for name in total}
        return total

    values = {name: tensor.detach() for name, tensor in parameters.items()}
    with torch.no_grad():
        squared = vmap(of_one, in_dims=(None, 0, 0, 0))(values, rows, targets, uniforms)
        return {name: tensor.sum(0) for name, tensor in squared.items()}


@strategies.register("ewc")
class EWC(AnchoringStrategy):
    """Adds ``lambda/2 * sum F (theta - theta*)^2`` over the parameters that existed at the end of earlier tasks.

    At a task's end the Fisher information is estimated in eval mode, under the evaluation transform, with the softmax
    over the seen classes. ``online`` keeps one sum ``gamma * F + F_t`` around the latest parameters; ``separate`` keeps
    every task's own pair, and penalties add. Avalanche squares the gradient of a batch's mean instead, and mammoth
    weighs the squared gradient at the true label by its probability: other numbers under the same name.
    """

    name = "ewc"
    Config = EWCConfig
    leaks = frozenset({"L-01", "L-12"})
    stability = frozenset({"penalty"})
    _warned = False

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The penalty, from the second task on."""
        anchored = self.anchored() if self.config.lambda_ else []
        return {"penalty": 0.5 * self.config.lambda_ * distance(anchored)} if anchored else {}

    def end_task(self, task: Task) -> None:
        """Estimate what mattered to the task, and remember where the parameters stand."""
        latest = self.estimate(task)
        if self.config.mode == "separate":
            seen = self.tasks_behind(task.task_id)
            self.records.write(task.task_id, seen, importance=latest, anchor=self.positions())
            self._warn()
            return
        earlier = {n: t for old in self.records.task_ids for n, t in self.records.read(old, "importance").items()}
        anchor = self.positions(list(earlier))
        total = {n: t for n, t in merged(earlier, latest, self.config.gamma).items() if n in anchor}
        self.replace_records(task.task_id, importance=total, anchor=anchor)
        self._warn()

    def _warn(self) -> None:
        """Say once that plain gradient steps would jump over the anchor, further away than they came."""
        total: dict[str, Tensor] = {}
        for task_id in self.records.task_ids:
            total = merged(total, self.records.read(task_id, "importance"), 1.0)
        largest = max((float(tensor.max()) for tensor in total.values() if tensor.numel()), default=0.0)
        factor = self.context.sgd_rate * self.config.lambda_ * largest
        if factor > 1 and not self._warned:
            self._warned = True
            log.warning(
                "ewc: learning rate x lambda x largest Fisher information is %.3g, above 1: the penalty can diverge. "
                "Lower optimizer.lr or strategy.ewc.lambda", factor,
            )  # fmt: skip

    def drop_task(self, task_id: int) -> None:
        """Of ``separate`` records the task's own goes; a joint one stays unless no other task shaped it."""
        if self.config.mode == "separate":
            self.records.drop(task_id)
        super().drop_task(task_id)

    def estimate(self, task: Task) -> dict[str, Tensor]:
        """The Fisher information of each trained entry, by parameter name, from images of ``task``."""
        parameters, seen = self.context.trained(), self.context.head.classes
        generator = stream(self.context.seed, task.task_id, "fisher")
        count = min(len(task.train), self.config.fisher_samples)
        rows = torch.randperm(len(task.train), generator=generator)[:count].sort().values
        uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
        estimator = self.config.fisher
        if estimator == "auto":
            estimator = "exact" if len(seen) <= EXACT_UP_TO else "sample"
        size = min(CHUNK_EXAMPLES, max(1, CHUNK_NUMBERS // max(1, sum(p.numel() for p in parameters.values()))))
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        with _still(self.context) as whole:
            for part, drawn in zip(rows.split(size), uniforms.split(size), strict=True):
                batch = self.context.evaluated(task, part)
                here = torch.arange(len(batch), device=batch.labels.device)
                found = fisher_sums(
                    lambda values, row, b=batch: _log_probabilities(whole, values, b, row),  # type: ignore[misc]
                    parameters, estimator, here, targets_among(batch.labels, seen), drawn.to(here.device),
                )  # fmt: skip
                for name, tensor in found.items():
                    total[name] += tensor
        return {name: tensor.detach() / count for name, tensor in total.items()}


class _Whole(nn.Module):
    """All that answers as one module, so that parameters can be exchanged by name."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self._context = context
        for name, part in context.parts.items():
            self.add_module(name, part)

    def forward(self, batch: Batch) -> Tensor:
        return self._context.head(self._context.features(batch))


def _log_probabilities(whole: nn.Module, values: Mapping[str, Tensor], batch: Batch, row: Tensor) -> Tensor:
    """Log-probabilities (S,) of one row of a batch over the seen classes."""
    logits: Tensor = functional_call(whole, dict(values), (batch.select(row[None]),))
    return logits[0].float().log_softmax(0)


@contextmanager
def _still(context: Context) -> Iterator[nn.Module]:
    """What answers, in eval mode, uncompiled and without recomputed blocks; every mode is put back afterwards."""
    whole = _Whole(context)
    modules = list(whole.modules())
    modes = [(module, module.training) for module in modules]
    recomputing = [module for module in modules if getattr(module, "grad_checkpointing", False)]
    eager = torch.compiler.set_stance("force_eager") if context.backbone.compiled else nullcontext()
    try:
        whole.eval()
        for module in recomputing:
            module.grad_checkpointing = False  # type: ignore[assignment]
        with eager, sdpa_kernel(SDPBackend.MATH):  # fused kernels have no rule for batches of gradients
            yield whole
    finally:
        for module, mode in modes:
            module.training = mode
        for module in recomputing:
            module.grad_checkpointing = True  # type: ignore[assignment]
