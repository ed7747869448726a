"""Synaptic intelligence (Zenke et al., ICML 2017): entries that lowered the loss move little afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cl_platform.config import setting
from cl_platform.registry import strategies
from cl_platform.strategies.anchoring import AnchoringStrategy, weighted_distance
from cl_platform.strategies.base import Step

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class SIConfig:
    """Keys of ``si``."""

    c: float = setting(0.5, doc="weight of the penalty c * sum Omega * distance^2", min=0)
    xi: float = setting(1.0, doc="added to the squared way of a task, so that no division is by zero", above=0)
    clamp_negative: bool = setting(False, doc="importances below zero count as zero")


def contribution(gradient: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """What each entry's move of one update took off the loss, to first order: ``-g * (after - before)``.

    An entry that did not move contributes 0, whatever its gradient: an update may be skipped as not finite.
    """
    moved = after - before
    return torch.where(moved == 0, torch.zeros_like(moved), -gradient * moved)


def importance(
    earlier: Tensor | None, path: Tensor, start: Tensor, end: Tensor, xi: float, clamp_negative: bool = False
) -> Tensor:
    """``Omega + w / ((end - start)^2 + xi)``; ``earlier`` is ``None`` for entries of the latest task alone."""
    total = path / ((end - start).square() + xi)
    total = total if earlier is None else earlier + total
    return total.clamp(min=0) if clamp_negative else total


def penalty(parameters: Sequence[Tensor], anchors: Sequence[Tensor], omegas: Sequence[Tensor], c: float) -> Tensor:
    """``c * sum_i Omega_i (theta_i - anchor_i)^2``, without a factor 1/2."""
    return c * weighted_distance(parameters, anchors, omegas)


def penalty_gradient(parameter: Tensor, anchor: Tensor, omega: Tensor, c: float) -> Tensor:
    """Gradient of :func:`penalty` by one parameter."""
    return 2.0 * c * omega * (parameter - anchor)


@strategies.register("si")
class SI(AnchoringStrategy):
    """Pulls by ``c * sum Omega (theta - theta*)^2``, with ``Omega`` from each update's gradient and move.

    The gradient of all other losses is read after backward, before clipping; that of the penalty is then added in
    closed form, so that it never counts as progress on the task. In the list of strategies it therefore stands before
    one that projects gradients. The move is the optimizer's real one. Released code sums up gradients that hold the
    penalty (Avalanche), or keeps only importances above zero.
    """

    name = "si"
    Config = SIConfig
    leaks = frozenset({"L-01", "L-12"})

    def __init__(self, config: SIConfig) -> None:
        super().__init__(config)
        self._forget_the_way()

    def _forget_the_way(self) -> None:
        self._start: dict[str, Tensor] = {}  # where a task began
        self._path: dict[str, Tensor] = {}  # w of the running task
        self._gradients: dict[str, Tensor] = {}  # of the task's losses, between backward and update
        self._before: dict[str, Tensor] = {}
        self._moving: dict[str, nn.Parameter] = {}

    def begin_task(self, task: Task) -> None:
        """Start a new way."""
        super().begin_task(task)
        self._forget_the_way()

    @torch.no_grad()
    def after_backward(self, step: Step) -> None:
        """Note the gradient and the place, then add the gradient of the penalty."""
        self._moving = {name: p for name, p in self.penalised().items() if p.grad is not None}
        for name, parameter in self._moving.items():
            if name not in self._start:
                self._start[name] = parameter.detach().clone()
                self._path[name] = torch.zeros_like(parameter)
        self._gradients = {name: p.grad.clone() for name, p in self._moving.items()}  # type: ignore[union-attr]
        self._before = {name: p.detach().clone() for name, p in self._moving.items()}
        if self.config.c:
            for parameter, anchor, omega in self.anchored():
                if parameter.grad is not None and omega is not None:
                    parameter.grad += penalty_gradient(parameter, anchor, omega, self.config.c)

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
        """Add what the update's moves took off the loss."""
        for name, parameter in self._moving.items():
            self._path[name] += contribution(self._gradients[name], self._before[name], parameter.detach())
        self._gradients, self._before, self._moving = {}, {}, {}

    def end_task(self, task: Task) -> None:
        """Turn the way into importances, and remember where the parameters stand."""
        earlier = {n: t for old in self.records.task_ids for n, t in self.records.read(old, "importance").items()}
        anchor = self.positions(list(earlier))
        total = {}
        for name, end in anchor.items():
            if name in self._path:
                start, path = self._start[name].to(end.device), self._path[name].to(end.device)
                total[name] = importance(
                    earlier.get(name), path, start, end, self.config.xi, self.config.clamp_negative
                )
            else:
                total[name] = earlier.get(name, torch.zeros_like(end))
        self.replace_records(task.task_id, importance=total, anchor=anchor)
        self._forget_the_way()
