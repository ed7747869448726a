"""Fine-tuning of the modules that forget most on the replay buffer: what ``fpf`` and ``k_fpf`` share."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from cl_platform.batch import Batch
from cl_platform.config import setting
from cl_platform.errors import UserError, nearest
from cl_platform.finetuning import Finetuning, cosine_rate
from cl_platform.heads import cross_entropy
from cl_platform.memory.host_state import HostState
from cl_platform.memory.samplers import SAMPLERS
from cl_platform.strategies.base import Component, Context, Pass, Step
from cl_platform.strategies.der import logit_distance
from cl_platform.strategies.sensitivity import HEAD, SCORES, Sensitivity, Unit

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

COLUMNS = ("module", "entries", "intra", "inter", "score", "chosen")


@dataclass(frozen=True)
class ProneConfig:
    """Keys of a fine-tuning of chosen modules."""

    modules: str | list[str] = setting("default", doc="default, auto, or names of modules as shell patterns")
    score: str = setting("drift", doc="what auto goes by: movement of the weights, or of their gradients",
                         choices=SCORES)  # fmt: skip
    max_share: float = setting(0.05, doc="auto: share of what is trained that may be chosen", above=0, max=1)
    steps: int = setting(300, doc="updates of a fine-tuning", min=0)
    lr: float = setting(0.03, doc="learning rate of its first update, falling to 0 along a half cosine", above=0)
    momentum: float = setting(0.9, doc="momentum of its SGD", min=0, max=1)
    batch_size: int | None = setting(None, doc="replayed images of an update; null: trainer.batch_size", min=1)
    sampler: str = setting("class_balanced", doc="how rows are drawn", choices=SAMPLERS)
    kd: float = setting(0.0, doc="weight of the distance to stored logits", min=0)


class Prone(HostState):
    """Chooses modules, fine-tunes them, and keeps the table of how they were chosen.

    Only what the current task trains can be chosen, and the whole head: a frozen trunk stays as it is, and so do the
    prompts or adapters of earlier tasks. Rows are drawn from the buffer, augmented as in training; the loss is the
    cross-entropy over the seen classes, plus ``kd`` times the squared distance to stored logits.

    Args:
        name: the strategy's.
        config: its keys.
    """

    def __init__(self, name: str, config: ProneConfig) -> None:
        super().__init__()
        self.name, self.config = name, config
        self.sensitivity = Sensitivity(config.score)
        self.seen: list[int] = []  # tasks whose data shaped the numbers; a dropped one stays
        self.updates = 0  # on the stream's batches
        self.rounds = 0
        self._looked = False

    def attach(self, context: Context) -> None:
        """Take the learner's parts."""
        self.context = context
        self.sensitivity.follow(context)

    def check(self) -> None:
        """Refuse patterns that match no module, and ``kd`` without stored logits.

        Raises:
            UserError: either of them.
        """
        self._matching()
        stored = self.context.buffer is not None and self.context.buffer.num_logits is not None
        if self.config.kd > 0 and not stored:
            raise UserError(
                f"strategy.{self.name}.kd", self.config.kd, "the buffer keeps no logits",
                f"Use strategy=[der,{self.name}] or [derpp,{self.name}], or set strategy.{self.name}.kd=0",
            )  # fmt: skip

    # -- when ---------------------------------------------------------------------------------------------------------

    def begin_task(self, task: Task) -> None:
        """Get ready to measure."""
        self._task_id = task.task_id
        self.sensitivity.begin(task)
        self.seen = sorted({*self.seen, task.task_id})

    def before_batch(self) -> None:
        """Before each batch.

        Raises:
            UserError: nothing of what was chosen is trained.
        """
        if not self._looked:
            self._looked = True
            self.chosen()
        self.sensitivity.before_batch()

    def after_backward(self) -> None:
        """Before each update."""
        self.sensitivity.after_backward()

    def after_update(self) -> None:
        """After each update on the stream's batches."""
        self.updates += 1

    def after_batch(self, step: Step) -> None:
        """After each batch of the stream."""
        self.sensitivity.after_batch()

    def end_training(self, task: Task) -> None:
        """After the last batch of a task."""
        self.sensitivity.end(task)

    # -- what ---------------------------------------------------------------------------------------------------------

    def chosen(self) -> dict[str, dict[str, Tensor]]:
        """The chosen units and their tensors by dotted name.

        Raises:
            UserError: nothing of what was chosen is trained.
        """
        units, free = self.sensitivity.units(), self.sensitivity.selectable()
        names = self._automatic(units, free) if self.config.modules == "auto" else self._matching()
        held = {name: units[name].held(free) for name in names}
        found = {name: tensors for name, tensors in held.items() if tensors}
        if not found:
            known = sorted(unit.name for unit in units.values() if unit.held(free))[:5]
            raise UserError(
                f"strategy.{self.name}.modules", self.config.modules, "nothing of it is trained in this run",
                f"Choose among such as {', '.join(known)}",
            )  # fmt: skip
        return found

    def _matching(self) -> list[str]:
        units = self.sensitivity.units()
        if self.config.modules in ("default", "auto"):
            return [name for name, unit in units.items() if self._usual(unit)]
        names: set[str] = set()
        for pattern in [self.config.modules] if isinstance(self.config.modules, str) else self.config.modules:
            matched = fnmatch.filter(units, pattern)
            if not matched:
                near = nearest(pattern, units) or sorted(units)[:3]
                raise UserError(
                    f"strategy.{self.name}.modules", pattern, "matches no module of the learner",
                    f"Names look like {', '.join(near)}",
                )  # fmt: skip
            names.update(matched)
        return [name for name in units if name in names]

    def _usual(self, unit: Unit) -> bool:
        first = unit.first_conv and self.context.backbone.kind != "vit"
        return unit.name == HEAD or unit.norm or unit.adapter or first

    def _automatic(self, units: Mapping[str, Unit], free: Mapping[str, Tensor]) -> list[str]:
        """The head, then units in the order of their score as long as they fit; as by default before any score."""
        scores = {name: row[2] for name, row in self.sensitivity.table().items()}
        known = {name: score for name, score in scores.items() if score is not None}
        if not known:
            return [name for name, unit in units.items() if self._usual(unit)]
        sizes = {name: sum(t.numel() for t in unit.held(free).values()) for name, unit in units.items()}
        room = self.config.max_share * sum(sizes.values()) - sizes[HEAD]
        names = {HEAD}
        for name in sorted(known, key=lambda name: -known[name]):  # stable: the network's order where scores tie
            if name != HEAD and sizes[name] and sizes[name] <= room:
                names.add(name)
                room -= sizes[name]
        return [name for name in units if name in names]

    # -- how ----------------------------------------------------------------------------------------------------------

    def finetune(self, exclude_current: bool = False) -> None:
        """One fine-tuning; nothing while the buffer is empty."""
        if not self.config.steps or not len(self.context.buffer):
            return
        tensors = [tensor for unit in self.chosen().values() for tensor in unit.values()]
        wanted, exclude = self.config.batch_size or self.context.batch_size, exclude_current

        def batch(step: int) -> Batch:
            draws = plan.stream("buffer.sample", step), plan.stream("replay.augment", step)
            drawn = self.context.replay(wanted, self.config.sampler, exclude, *draws)
            if drawn is None:  # all rows are the current task's
                drawn = self.context.replay(wanted, self.config.sampler, False, *draws)
            assert drawn is not None
            return drawn

        plan = Finetuning(
            purpose=self.name,
            seed=self.context.seed,
            task_id=self._task_id,
            number=self.rounds,
            steps=self.config.steps,
            parameters=[t for t in tensors if isinstance(t, nn.Parameter)],
            statistics=[t for t in tensors if not isinstance(t, nn.Parameter)],
            batch=batch,
            loss=self._loss,
            rate=cosine_rate(self.config.lr, self.config.steps),
            momentum=self.config.momentum,
            key=f"strategy.{self.name}.lr",
        )
        self.rounds += 1
        with self.sensitivity.aside():
            self.context.run_finetuning(plan)

    def _loss(self, passed: Pass) -> Tensor:
        loss = cross_entropy(passed.logits, passed.batch.labels, self.context.head.classes)
        if self.config.kd > 0:
            stored, known = passed.batch.extra["stored"], passed.batch.extra["known"]
            loss = loss + self.config.kd * logit_distance(passed.logits, stored, known)
        return loss

    # -- records ------------------------------------------------------------------------------------------------------

    def table(self) -> str:
        """The sensitivity of all modules that are trained, as CSV; a cell is empty where nothing was measured."""
        units, free = self.sensitivity.units(), self.sensitivity.selectable()
        chosen = self.chosen()
        lines = [",".join(COLUMNS)]
        for name, numbers in self.sensitivity.table().items():
            entries = sum(tensor.numel() for tensor in units[name].held(free).values())
            if entries:
                cells = ["" if number is None else f"{number:.9g}" for number in numbers]
                lines.append(",".join([name, str(entries), *cells, str(int(name in chosen))]))
        return "\n".join(lines) + "\n"

    def components(self, prefix: str) -> Component:
        """The numbers belong to every task so far."""
        return Component(prefix, tuple(self.seen), "sensitivity", dict(self.state_dict()))

    def drop_task(self, task_id: int) -> None:
        """Remove the task's own numbers; it had a share in those of later tasks, and stays listed."""
        self.sensitivity.drop_task(task_id)

    def facts(self) -> dict[str, Any]:
        """Number of fine-tunings and of their updates."""
        return {"finetunings": self.rounds, "updates": self.rounds * self.config.steps}

    def host_state(self) -> dict[str, Any]:
        """Counters, and the tasks seen."""
        counters = {"updates": np.int64(self.updates), "rounds": np.int64(self.rounds)}
        return {**counters, "seen": np.array(self.seen, dtype=np.int64)}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`host_state` gave."""
        self.updates, self.rounds = int(state["updates"]), int(state["rounds"])
        self.seen = [int(t) for t in state["seen"]]
