"""The optimizer updates of a method: one rule, counted, checked for finite losses once an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_platform.errors import UserError
from cl_platform.unlearning.approximate.base import TrainingConfig
from cl_platform.unlearning.approximate.work import Work


class Updates:
    """Updates of all that a method may change.

    Args:
        work: whose parameters.
        config: rule, rate, momentum and decay.
        clip: largest norm of the gradient; ``None``: any.
        more: further parameters of the method's own, such as a head row that goes at its end.
        mask: by name, which numbers (bool, shaped as the parameter) move; all where there is none. Those that do not
            keep their bits whatever decay and momentum would do.
    """

    def __init__(
        self,
        work: Work,
        config: TrainingConfig,
        clip: float | None = None,
        more: Sequence[nn.Parameter] = (),
        mask: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._work, self._config, self._clip = work, config, clip
        self._parameters = [*work.parameters.values(), *more]
        self.optimizer = _rule(self._parameters, config)
        self._masked: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name, moves in (mask or {}).items():
            parameter = work.parameters[name]
            self._masked.append((parameter, moves, parameter.detach().clone()))
        self._finite: Tensor | None = None

    def step(self, loss: Tensor) -> None:
        """One update along the gradient of a scalar; nothing waits for the device."""
        fine = torch.isfinite(loss.detach())
        self._finite = fine if self._finite is None else self._finite & fine
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter, moves, _ in self._masked:
            if parameter.grad is not None:
                parameter.grad.mul_(moves)
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self.optimizer.step()
        self._restore()
        self._work.counted.steps += 1

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter, moves, start in self._masked:
            parameter.copy_(torch.where(moves, parameter, start))
            for moment in self.optimizer.state.get(parameter, {}).values():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    moment.mul_(moves)

    def end_epoch(self) -> None:
        """Refuse losses that were not finite.

        Raises:
            UserError: with exit code 3.
        """
        if self._finite is not None and not bool(self._finite):
            key, steps = f"unlearning.{self._work.method}.lr", self._work.counted.steps
            raise UserError(
                key, self._config.lr, f"a loss was not finite by update {steps}; the model stays as it was",
                f"Lower {key}", exit_code=3,
            )  # fmt: skip


def _rule(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay)
    rule = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return rule(parameters, config.lr, weight_decay=config.weight_decay)
