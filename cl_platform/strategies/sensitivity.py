"""How much each module of the learner moves within a task and from task to task (Zhao et al., ICML 2023)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_platform.finetuning import STATISTICS
from cl_platform.heads import Head
from cl_platform.memory.host_state import HostState
from cl_platform.slots import Slots
from cl_platform.strategies.base import Context

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

SCORES = ("drift", "grad")
HEAD = "head"
PARTS_OF_AN_EPOCH = 4
"""Into so many parts a task of a single epoch is cut."""
GRADIENT_STEPS = 20
EPSILON = 1e-12
UNKNOWN = -1.0
"""In place of a number that was not measured; all measured ones are at least 0."""

Numbers = NDArray[np.float64]


@dataclass
class Unit:
    """What is measured and chosen as one.

    Attributes:
        name: of a module, or of a running statistic of one.
        tensors: by dotted name.
        norm: belongs to a normalisation layer.
        first_conv: the first convolution of the backbone.
        adapter: a prompt or an adapter.
    """

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    norm: bool = False
    first_conv: bool = False
    adapter: bool = False

    def held(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those of its tensors that ``names`` lists."""
        return {name: tensor for name, tensor in self.tensors.items() if name in names}


def units_of(parts: Mapping[str, nn.Module]) -> dict[str, Unit]:
    """Modules that hold parameters of their own, and every running statistic by itself, in the order of the network.

    Names are those of the backbone's own modules, ``head`` for all head rows together, and ``features.NAME`` for what a
    strategy computes the features with; all slots of the tasks are one unit.

    Args:
        parts: as in :class:`~cl_platform.strategies.base.Context`.
    """
    found: dict[str, Unit] = {}
    for part, root in parts.items():
        modules = dict(root.named_modules())
        wholes = [path for path, module in modules.items() if isinstance(module, Slots)]
        convolution = next((p for p, m in modules.items() if part == "backbone" and isinstance(m, nn.Conv2d)), None)
        for path in wholes:  # also those that are still empty: they can be asked for by name
            name = _shown(part, path, isinstance(root, Head))
            found[name] = Unit(name, adapter=part == "features")
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            path, _, leaf = name.rpartition(".")
            if not isinstance(tensor, nn.Parameter) and leaf not in STATISTICS:
                continue
            whole = next((w for w in wholes if path == w or path.startswith(f"{w}.")), path)
            shown = _shown(part, whole, isinstance(root, Head))
            shown = f"{shown}.{leaf}" if leaf in STATISTICS else shown
            unit = found.setdefault(shown, Unit(shown))
            unit.tensors[f"{part}.{name}"] = tensor
            unit.norm = _is_norm(modules[path])
            unit.first_conv = path == convolution
            unit.adapter = part == "features"
    return found


def _shown(part: str, path: str, head: bool) -> str:
    if head:
        return HEAD
    if part != "backbone":
        return f"{part}.{path}" if path else part
    path = path.removeprefix("model").removeprefix(".")
    return path if path and path != HEAD else f"backbone.{path}".rstrip(".")


def _is_norm(module: nn.Module) -> bool:
    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    return isinstance(module, known) or "norm" in type(module).__name__.lower()


class Sensitivity(HostState):
    """Measures units while tasks are trained, and remembers a number a unit and task.

    Of task t and unit l: ``intra``, the mean over its epochs from the second on of ``|theta_n - theta_(n-1)|_1 / n_l``;
    ``inter``, for later tasks, ``|theta_end - theta_start|_1 / n_l`` between the end of the task before, further
    training included, and its own. A task of one epoch is cut into four parts in their place. Head rows and slots that
    the task itself brought do not count in it, nor does what a fine-tuning moves.
    The score is ``mean_t inter / (mean_t intra + 1e-12)``.

    ``score=grad`` looks at gradients in their place: their mean size over the first 20 updates of a task over that of
    the last 20 of the task before.

    Args:
        score: ``drift`` or ``grad``.
    """

    def __init__(self, score: str) -> None:
        super().__init__()
        self.score = score
        self.task_ids: list[int] = []
        self._records: dict[str, list[Numbers]] = {name: [] for name in ("intra", "inter", "ratio", "late")}
        self._start: dict[str, Tensor] | None = None
        self._before: dict[str, Tensor] | None = None
        self._moved: list[Tensor] = []
        self._first: list[Tensor] = []
        self._last: deque[Tensor] = deque(maxlen=GRADIENT_STEPS)
        self._batches = 0
        self._held: list[dict[str, Tensor]] = []  # what is measured of each unit in the current task
        self._new: str | None = None

    def follow(self, context: Context) -> None:
        """Measure the parts of a learner."""
        self.context = context

    def units(self) -> dict[str, Unit]:
        """See :func:`units_of`."""
        return units_of(self.context.parts)

    def selectable(self) -> dict[str, Tensor]:
        """Tensors that may be chosen: what the current task trains, the whole head, statistics of a trained trunk."""
        names = dict(self.context.trained())
        found: dict[str, Tensor] = {}
        for unit in self.units().values():
            for name, tensor in unit.tensors.items():
                statistic = not isinstance(tensor, nn.Parameter)
                free = not self.context.backbone.frozen and name.startswith("backbone.") if statistic else name in names
                if free or unit.name == HEAD:
                    found[name] = tensor
        return found

    # -- while a task is trained --------------------------------------------------------------------------------------

    def begin(self, task: Task) -> None:
        """Forget what an unfinished task left; what the task brings does not count in it."""
        self._new = None if task.task_id in self.task_ids else f".tasks.{task.task_id}."
        self._start = self._before = None
        self._moved, self._first, self._batches = [], [], 0
        self._last.clear()

    def before_batch(self) -> None:
        """Copy what is about to be trained, before the first batch."""
        if self._start is None:
            counted = self._counted()
            self._held = [dict(sorted(unit.held(counted).items())) for unit in self.units().values()]
            self._start = self._copy()

    def after_backward(self) -> None:
        """Look at the gradients of an update, for ``score=grad``."""
        if self.score != "grad":
            return
        numbers = self._per_unit(lambda name, tensor: tensor.grad)
        if len(self._first) < GRADIENT_STEPS:
            self._first.append(numbers)
        self._last.append(numbers)

    def after_batch(self) -> None:
        """Measure how far all has moved since the part of the task before, where one ends."""
        self._batches += 1
        size = self.context.batches
        if not size or self._batches not in _bounds(self.context.epochs, size):
            return
        if self._before is not None:
            self._moved.append(self._distance(self._before))
        self._before = self._copy()

    def end(self, task: Task) -> None:
        """Note the task's numbers; nothing where it was not trained."""
        if self._start is None:
            return
        unknown = np.full(len(self._held), UNKNOWN)
        late = self._records["late"][-1] if self._records["late"] else unknown
        early = _mean(self._first, unknown)
        record = {
            "intra": _mean(self._moved, unknown),
            "inter": _host(self._distance(self._start)) if self.task_ids else unknown,
            "ratio": np.where((early >= 0) & (late >= 0), early / (np.maximum(late, 0) + EPSILON), UNKNOWN),
            "late": _mean(list(self._last), unknown),
        }
        for name, numbers in record.items():
            self._records[name].append(numbers)
        self.task_ids.append(task.task_id)
        self._start = self._before = None
        self._moved, self._first = [], []
        self._last.clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What moves inside the block does not count: a chosen unit must not look sensitive for having been chosen."""
        copies = [copy for copy in (self._start, self._before) if copy is not None]
        before = self._copy() if copies else {}
        yield
        after = self._copy() if copies else {}
        for copy in copies:
            for name, tensor in copy.items():
                copy[name] = tensor + (after[name] - before[name])

    def _counted(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.selectable().items() if self._new is None or self._new not in n}

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for held in self._held for name, tensor in held.items()}

    def _distance(self, since: Mapping[str, Tensor]) -> Tensor:
        return self._per_unit(lambda name, tensor: tensor.detach() - since[name])

    def _per_unit(self, what: Any) -> Tensor:
        """Mean size (U,) of the numbers that ``what`` gives for the tensors of each unit; on their device."""
        device, means = next(self.context.backbone.parameters()).device, []
        for held in self._held:
            found = [what(name, tensor) for name, tensor in held.items()]
            sizes = [value.abs().sum(dtype=torch.float32) for value in found if value is not None]
            entries = sum(value.numel() for value in found if value is not None)
            means.append(torch.stack(sizes).sum() / entries if entries else torch.full((), UNKNOWN, device=device))
        return torch.stack(means)

    # -- what was found -----------------------------------------------------------------------------------------------

    def table(self) -> dict[str, tuple[float | None, float | None, float | None]]:
        """Name -> (intra, inter, score), ``None`` where not measured."""
        names = list(self.units())
        intra, inter = self._over_tasks("intra", len(names)), self._over_tasks("inter", len(names))
        ratio = self._over_tasks("ratio", len(names))
        rows = {}
        for name, within, between, grown in zip(names, intra, inter, ratio, strict=True):
            drift = None if between is None else between / ((within or 0.0) + EPSILON)
            rows[name] = (within, between, grown if self.score == "grad" else drift)
        return rows

    def _over_tasks(self, name: str, units: int) -> list[float | None]:
        rows = [record for record in self._records[name] if len(record) == units]
        columns = np.array(rows).reshape(len(rows), units).T
        known = [column[column >= 0] for column in columns]
        return [float(column.mean()) if len(column) else None for column in known]

    # -- state --------------------------------------------------------------------------------------------------------

    def drop_task(self, task_id: int) -> None:
        """Remove the numbers of a task, and let go of what was measured last."""
        self._start, self._before, self._held = None, None, []
        if task_id in self.task_ids:
            at = self.task_ids.index(task_id)
            del self.task_ids[at]
            for records in self._records.values():
                del records[at]

    def host_state(self) -> dict[str, Any]:
        """Numbers of all tasks, a row a task."""
        rows = {name: np.array(records, dtype=np.float64) for name, records in self._records.items()}
        return {"tasks": np.array(self.task_ids, dtype=np.int64), **rows}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`host_state` gave."""
        self.task_ids = [int(t) for t in state["tasks"]]
        self._records = {name: list(state[name]) for name in self._records}


def _bounds(epochs: int, batches: int) -> set[int]:
    """Numbers of batches after which a part of a task ends: an epoch, or a quarter of the only one."""
    if epochs > 1:
        return {batches * epoch for epoch in range(1, epochs + 1)}
    return {-(-batches * part // PARTS_OF_AN_EPOCH) for part in range(1, PARTS_OF_AN_EPOCH + 1)}


def _mean(found: Sequence[Tensor], unknown: Numbers) -> Numbers:
    """Mean over measurements of what is known in all of them."""
    if not found:
        return unknown
    rows = torch.stack(list(found))
    return _host(torch.where((rows >= 0).all(0), rows.mean(0), UNKNOWN))


def _host(numbers: Tensor) -> Numbers:
    return numbers.double().cpu().numpy()
