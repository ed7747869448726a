"""GEM (Lopez-Paz & Ranzato, NeurIPS 2017): no step against any old task's gradient."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.registry import strategies
from cl_platform.strategies.base import Step
from cl_platform.strategies.reference import ReferenceConfig, ReferenceGradients

log = logging.getLogger("cl_platform")

Doubles = NDArray[np.float64]
Parts = Sequence[Tensor | None]


@dataclass(frozen=True)
class GEMConfig(ReferenceConfig):
    """Keys of ``gem``."""

    memory_strength: float = setting(0.5, doc="gamma, lower bound of every old task's weight in a correction", min=0)
    eps: float = setting(1e-3, doc="added to the diagonal of the products of old tasks' gradients", above=0)

    exclude_current: ClassVar[bool] = True  # no key: a memory is always an old task's
    batch_size: ClassVar[int | None] = None  # of a draw that another strategy asks for
    sampler: ClassVar[str] = "uniform"


@strategies.register("gem")
class GEM(ReferenceGradients):
    """The gradient closest to the step's that points against no old task's, each on its whole memory.

    Where any old task objects, a quadratic program over one weight per old task gives the correction. As in the
    released code, ``memory_strength`` bounds the weights from below, so that then every old task has a say. The
    program is solved on the host: the products of the gradients, and nothing else, are waited for.
    """

    name = "gem"
    Config = GEMConfig
    leaks = frozenset({"L-01"})
    waits = "the products of the gradients, for the solver"

    def __init__(self, config: GEMConfig) -> None:
        super().__init__(config)
        self._said = False

    def memories(self) -> list[Batch]:
        """All remembered images of each old task, augmented anew, in ascending task id."""
        owners = self.buffer.contents.task_ids
        rows = [np.flatnonzero(owners == task_id) for task_id in self._past]
        return [self.ready(self.buffer.read(slots)) for slots in rows if len(slots)]

    def after_backward(self, step: Step) -> None:
        """Correct the gradient of all losses together."""
        parameters = self.moving()
        references = [self.reference(step, batch, parameters) for batch in self.memories()]
        if not references or not parameters:
            return
        gradients = [parameter.grad for parameter in parameters]
        products = inner_products([gradients, *references]).cpu().numpy()  # the one wait for the device
        if not np.isfinite(products).all() or bool((products[0, 1:] >= 0).all()):
            return
        weights = dual(products[1:, 1:], products[0, 1:], self.config.memory_strength, self.config.eps)
        if weights is None:
            if not self._said:
                log.warning("gem: the quadratic program had no solution in step %d; that step is taken as it was",
                            step.global_step)  # fmt: skip
            self._said = True
            return
        add_weighted(gradients, references, weights)  # type: ignore[arg-type]


@torch.no_grad()
def inner_products(vectors: Sequence[Parts]) -> Tensor:
    """Products (k, k), float64, of k vectors that are given in parts.

    Args:
        vectors: equal numbers of parts, equally shaped; ``None`` stands for zeros, but not in all vectors at once.
    """
    total: Any = 0
    for parts in zip(*vectors, strict=True):
        given = next(part for part in parts if part is not None)
        rows = torch.stack([torch.zeros_like(given) if part is None else part for part in parts])
        rows = rows.flatten(1).double()
        total = total + rows @ rows.T
    return total


def dual(gram: Doubles, against: Doubles, gamma: float, eps: float) -> Doubles | None:
    """Weights ``v >= gamma`` that minimise ``v (G G' + eps I) v / 2 + (G g) v``.

    With ``gamma = eps = 0`` the corrected ``g + G' v`` is the vector closest to g with ``G x >= 0``.

    Args:
        gram: (t, t) ``G G'``, the products of old tasks' gradients.
        against: (t,) ``G g``, their products with the step's gradient.
        gamma: lower bound.
        eps: added to the diagonal.

    Returns:
        (t,), or ``None`` where the solver finds none.
    """
    with seeded_globals(0, RUN_LEVEL, "import"):  # some solvers draw from the global generator when imported
        import qpsolvers  # takes seconds where many solvers are installed, and no other strategy needs it

    unit = np.eye(len(against))
    matrix = np.asarray(gram, dtype=np.float64) + eps * unit
    try:
        return qpsolvers.solve_qp(
            matrix, np.asarray(against, dtype=np.float64), -unit, np.full(len(against), -gamma), solver="quadprog"
        )
    except qpsolvers.exceptions.QPError:
        return None


@torch.no_grad()
def add_weighted(gradients: Sequence[Tensor], references: Sequence[Parts], weights: Doubles) -> None:
    """``g + G' v`` in place."""
    for weight, parts in zip(weights.tolist(), references, strict=True):
        for gradient, part in zip(gradients, parts, strict=True):
            if part is not None:
                gradient.add_(part, alpha=weight)
