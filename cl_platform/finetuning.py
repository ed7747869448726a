"""A short training outside Lightning: a plain loop with an optimizer of its own that leaves no other trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cl_platform.errors import UserError
from cl_platform.random_streams import seeded_globals, stream

STATISTICS = ("running_mean", "running_var")
"""Names of the buffers that follow the batches of a training."""


@dataclass(frozen=True)
class Finetuning:
    """What is trained, on which batches, and how.

    All that draws is keyed by (``seed``, ``task_id``, ``purpose``, ``number``).

    Attributes:
        purpose: what it is for; the first part of the names of its random streams.
        seed: the run's seed.
        task_id: whose streams are drawn from.
        number: of this training among those of its purpose and task.
        steps: updates.
        parameters: what the optimizer changes.
        statistics: running statistics of normalisation layers that follow the batches.
        batch: the batch of an update, by its number from 0.
        loss: from what the forward pass of that batch gave, a scalar.
        rate: learning rate of an update, by its number from 0.
        momentum: of SGD.
        weight_decay: of SGD.
        clip: largest norm of the gradient, ``None``: any.
        key: where the rate stands in the configuration, for a refusal.
        optimizer: makes the rule in place of SGD; its rates are its own.
    """

    purpose: str
    seed: int
    task_id: int
    number: int
    steps: int
    parameters: Sequence[nn.Parameter]
    statistics: Sequence[Tensor]
    batch: Callable[[int], Any]
    loss: Callable[[Any], Tensor]
    rate: Callable[[int], float]
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float | None = None
    key: str = "lr"
    optimizer: Callable[[], torch.optim.Optimizer] | None = None

    def stream(self, what: str, step: int) -> torch.Generator:
        """A generator for one draw of an update."""
        return stream(self.seed, self.task_id, f"{self.purpose}/{what}", self.number, step)


@runtime_checkable
class FollowsUpdates(Protocol):
    """Who wants to be told of every update, also of those outside Lightning's loop."""

    def after_update(self, learner: Any, step: int) -> None:
        """After update ``step`` of the run."""
        ...


def cosine_rate(rate: float, steps: int) -> Callable[[int], float]:
    """From ``rate`` at update 0 along a half cosine; 0 would be reached at update ``steps``."""
    return lambda step: 0.5 * rate * (1 + math.cos(math.pi * step / max(1, steps)))


def run_finetuning(
    network: nn.Module,
    plan: Finetuning,
    forward: Callable[[Any], Any],
    after_update: Callable[[Tensor], None],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    scaled: bool = False,
    compiled: bool = False,
) -> None:
    """Train as planned.

    Everything outside the plan's parameters and statistics keeps its bits; gradients, ``requires_grad``, modes and the
    global generators are put back. Layers with running statistics that are not in the plan stay in eval mode.

    Args:
        network: holds everything that takes part; its ``train`` decides what may be in training mode.
        plan: see :class:`Finetuning`.
        forward: a batch -> what the loss is computed from.
        after_update: called with the loss of each update.
        autocast: opens the run's precision.
        scaled: scale the loss, as half precision needs it.
        compiled: blocks are compiled; they run uncompiled here.

    Raises:
        UserError: a loss was not finite.
    """
    if plan.steps == 0:
        return
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    own_draws = seeded_globals(plan.seed, plan.task_id, f"{plan.purpose}/dropout", plan.number)
    with _lent(network, plan), torch.enable_grad(), own_draws, eager:
        _loop(plan, forward, after_update, autocast, scaled)


def _loop(
    plan: Finetuning,
    forward: Callable[[Any], Any],
    after_update: Callable[[Tensor], None],
    autocast: Callable[[], AbstractContextManager[Any]],
    scaled: bool,
) -> None:
    parameters = list(plan.parameters)
    optimizer = plan.optimizer() if plan.optimizer is not None else None
    if optimizer is None and parameters:
        optimizer = torch.optim.SGD(parameters, plan.rate(0), plan.momentum, weight_decay=plan.weight_decay)
    device = parameters[0].device if parameters else plan.statistics[0].device
    scaler = torch.amp.GradScaler(device.type, enabled=scaled)
    finite: Tensor | None = None
    for step in range(plan.steps):
        with autocast():
            loss = plan.loss(forward(plan.batch(step)))
        fine = torch.isfinite(loss.detach())
        finite = fine if finite is None else finite & fine
        if optimizer is not None:
            for group in optimizer.param_groups if plan.optimizer is None else ():
                group["lr"] = plan.rate(step)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if plan.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, plan.clip)
            scaler.step(optimizer)
            scaler.update()
        after_update(loss.detach())
    if finite is not None and not bool(finite):
        raise UserError(plan.key, plan.rate(0), f"a loss of {plan.purpose} was not finite", f"Lower {plan.key}")


@contextmanager
def _lent(network: nn.Module, plan: Finetuning) -> Iterator[None]:
    """The network with nothing but the plan's tensors free to change, and afterwards in the state in which it came."""
    wanted, following = {id(p) for p in plan.parameters}, {id(t) for t in plan.statistics}
    modes = [(module, module.training) for module in network.modules()]
    flags = [(p, p.requires_grad) for p in network.parameters()]
    gradients = [(p, p.grad) for p in plan.parameters]
    kept: list[tuple[Tensor, Tensor]] = []
    network.train()
    for module in network.modules():
        held = [b for name, b in module._buffers.items() if name in STATISTICS and b is not None]
        if not held:
            continue
        module.training = any(id(b) in following for b in held)
        if module.training:  # the counter of batches, and a statistic that must not move, would follow as well
            own = [b for b in module._buffers.values() if b is not None and id(b) not in following]
            kept += [(b, b.clone()) for b in own]
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in wanted)
    for parameter in plan.parameters:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode
