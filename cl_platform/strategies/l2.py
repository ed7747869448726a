"""L2 towards the earlier parameters: the plainest of the penalties, with every entry equally important."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL
from cl_platform.registry import strategies
from cl_platform.strategies.anchoring import AnchoringStrategy, distance, weighted_distance
from cl_platform.strategies.base import Context, ParameterGroup, Step

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

ATTENTION = ("blocks.*.attn.qkv.weight", "blocks.*.attn.qkv.bias")


@dataclass(frozen=True)
class L2Config:
    """Keys of ``l2``."""

    lambda_: float = setting(1.0, doc="weight of the penalty lambda/2 * squared distance", min=0)
    anchor: str = setting(
        "previous", doc="end of the task before, or start of the run", choices=("previous", "pretrained")
    )
    scope: str | list[str] = setting("all", doc="what is held: all; qkv; or shell patterns of backbone parameters")


def penalty(parameters: Sequence[Tensor], anchors: Sequence[Tensor], strength: float) -> Tensor:
    """``lambda/2 * |theta - anchor|^2``."""
    return 0.5 * strength * weighted_distance(parameters, anchors, [None] * len(parameters))


@strategies.register("l2")
class L2(AnchoringStrategy):
    """Adds ``lambda/2 * |theta - theta*|^2``; ``theta*`` are the parameters at the previous task's end.

    It is :class:`~cl_platform.strategies.ewc.EWC` with a Fisher information of one. ``scope=all`` holds all that is
    trained, the head included. ``scope=qkv`` holds and trains the self-attention's query, key and value weights of a
    ViT, beside which the head alone is trained, without a pull; patterns do the same with what they match. Weight decay
    would pull to zero: held parameters of a narrow scope get none.
    """

    name = "l2"
    Config = L2Config
    leaks = frozenset({"L-01", "L-04", "L-14"})
    stability = frozenset({"penalty"})

    def __init__(self, config: L2Config) -> None:
        super().__init__(config)
        if config.scope != "all":
            self.owns = frozenset({"trainable"})  # type: ignore[misc]

    def attach(self, context: Context) -> None:
        """Find what is held, and remember where it stands if that is the anchor.

        Raises:
            UserError: a pattern matches no parameter of the backbone.
        """
        super().attach(context)
        scope = self.config.scope
        if isinstance(scope, str) and scope not in ("all", "qkv"):
            raise UserError("strategy.l2.scope", scope, "must be all, qkv or a list of patterns", f"Write [{scope}]")
        if isinstance(scope, list) and not scope:
            raise UserError("strategy.l2.scope", "[]", "holds nothing", "Write all, qkv or a list of patterns")
        patterns = {"all": ["*"], "qkv": ATTENTION}[scope] if isinstance(scope, str) else scope
        names = context.backbone.matching(patterns, "strategy.l2.scope")
        self._names = {f"backbone.model.{name}" for name in names}
        if self.config.anchor == "pretrained":
            live = {f"backbone.{name}": p.detach() for name, p in context.backbone.named_parameters()}
            self.records.write(RUN_LEVEL, [], anchor={n: p for n, p in live.items() if n in self._names})

    def trainable(self) -> Iterator[ParameterGroup]:
        """For a narrow scope what is held, without weight decay, and the head."""
        if self.config.scope != "all":
            model = cast(nn.Module, self.context.backbone)
            chosen = [p for name, p in model.named_parameters() if f"backbone.{name}" in self._names]
            yield ParameterGroup(chosen, weight_decay=0.0)
            yield ParameterGroup(list(self.context.head.parameters()))

    def penalised(self) -> dict[str, nn.Parameter]:
        """All that is trained, or the part that the scope names."""
        trained = self.context.trained()
        return trained if self.config.scope == "all" else {n: p for n, p in trained.items() if n in self._names}

    def losses(self, step: Step) -> dict[str, Tensor]:
        """The penalty, as soon as there is an anchor."""
        anchored = self.anchored() if self.config.lambda_ else []
        return {"penalty": 0.5 * self.config.lambda_ * distance(anchored)} if anchored else {}

    def drop_task(self, task_id: int) -> None:
        """Remove the anchor that was taken at the task's end, and the task's head rows from another one."""
        self.records.drop(task_id)
        super().drop_task(task_id)

    def end_task(self, task: Task) -> None:
        """Remember where the parameters stand, unless the anchor is the start of the run."""
        if self.config.anchor == "previous":
            held = [name for old in self.records.task_ids for name in self.records.read(old, "anchor")]
            self.replace_records(task.task_id, anchor=self.positions(held))
