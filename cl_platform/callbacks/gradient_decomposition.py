"""After each switch: how large are the gradients that learn and those that protect, and do they agree?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from cl_platform.files import AppendedFile, write_atomically
from cl_platform.metrics.continual_log import cut_after
from cl_platform.metrics.gradients import decompose
from cl_platform.metrics.matrix import Result

FILE = "gradients.csv"
HEADER = "global_step,position,task_id,plasticity_norm,stability_norm,cosine\n"


class GradientDecomposition(L.Callback):
    """Norms and cosine of the plasticity and the stability gradient in the first updates of each task.

    Taken on the graph of the running step, before its backward pass: no second forward, no draw, ``.grad`` untouched.
    Under gradient accumulation the first batch of an update speaks for it.

    Args:
        folder: the run's; numbers go into ``gradients.csv``, an undefined cosine as an empty cell.
        updates: updates after each switch that are looked at.
        publish: called with (step, values by name), for loggers.
    """

    def __init__(
        self,
        folder: Path,
        updates: int = 20,
        publish: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
    ) -> None:
        self.path, self.updates, self.publish = folder / FILE, updates, publish
        self._file: AppendedFile | None = None
        self._done = -1

    def open(self) -> None:
        """Start the file of a new run."""
        write_atomically(self.path, HEADER)
        self._file = AppendedFile(self.path)

    def reopen(self, position: int) -> None:
        """Go on behind the task at ``position``, without what was written about later ones."""
        text = self.path.read_text() if self.path.exists() else HEADER
        write_atomically(self.path, cut_after(text, position)[0])
        self._file = AppendedFile(self.path)

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()

    def on_before_backward(self, trainer: L.Trainer, learner: Any, loss: Tensor) -> None:
        """Decompose the step's loss."""
        step = learner.steps
        if learner.step_in_task >= self.updates or step == self._done or self._file is None:
            return
        self._done = step
        parameters = [p for p in learner.parameters() if p.requires_grad]
        protecting = learner.composition.stability
        plasticity = [value for name, value in learner.terms.items() if name not in protecting]
        stability = [value for name, value in learner.terms.items() if name in protecting]
        found = decompose(_gradient(plasticity, parameters), _gradient(stability, parameters))
        cosine = found.cosine.value if isinstance(found.cosine, Result) else None
        task = learner.task
        cells = (step + 1, task.position, task.task_id, found.plasticity_norm, found.stability_norm)
        shown = "" if cosine is None else str(cosine)
        self._file.append(",".join(map(str, cells)) + f",{shown}\n")
        values = {"grad/plasticity_norm": found.plasticity_norm, "grad/stability_norm": found.stability_norm}
        self.publish(step + 1, values if cosine is None else {**values, "grad/cosine": float(cosine)})  # type: ignore[arg-type]


def _gradient(terms: list[Tensor], parameters: list[Tensor]) -> list[Tensor | None]:
    """Gradient of the sum of ``terms``, ``None`` where it does not reach."""
    reached = [term.float() for term in terms if term.requires_grad]
    if not reached:
        return [None] * len(parameters)
    return list(torch.autograd.grad(torch.stack(reached).sum(), parameters, retain_graph=True, allow_unused=True))
