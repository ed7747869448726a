"""Online-LoRA (Wei et al., WACV 2025): one adapter, folded in whenever the loss has settled."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_platform.backbones import PromptedViT
from cl_platform.backbones.prefix import BlockExtras
from cl_platform.batch import Batch, constant
from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.heads import Head
from cl_platform.random_streams import RUN_LEVEL
from cl_platform.registry import strategies
from cl_platform.slots import Slots
from cl_platform.strategies.adapters import AdapterStrategy, LoRAConfig, note_order
from cl_platform.strategies.base import Component, Context, Needs, ParameterGroup, Step

if TYPE_CHECKING:
    from cl_platform.scenarios import Task

log = logging.getLogger("cl_platform")

MEAN_SHARE, VARIANCE_ROWS = 0.26, 1.28
"""Default thresholds of a plateau: the mean below 0.26 ln(classes seen), the variance below 1.28 / batch size."""

GROWING = ("recent", "folds", "hard_images", "hard_labels", "hard_ids", "hard_losses")
KINDS = {"hard": "buffer", "factors": "adapter", "folded": "adapter", "head": "head", "importance": "importance"}


@dataclass(frozen=True)
class OnlineLoRAConfig(LoRAConfig):
    """Keys of ``online_lora``."""

    rank: int = setting(4, doc="r, rank of the adapter", min=1)
    alpha: float = setting(4.0, doc="the adapter counts alpha/rank", above=0)
    penalty: float = setting(2000.0, doc="lambda, weight of the pull on factors that mattered", min=0)
    window: int = setting(5, doc="L, losses whose mean and variance tell a plateau", min=2)
    hard: int = setting(4, doc="H, examples with the largest losses that come again in each batch", min=0)
    mean_below: float | None = setting(None, doc="mean loss of a plateau; null: 0.26 ln(classes seen)", min=0)
    variance_below: float | None = setting(None, doc="variance of a plateau; null: 1.28 / batch size", min=0)


@strategies.register("online_lora")
class OnlineLoRA(AdapterStrategy):
    """``W + F + s B A``: when the loss has settled, ``s B A`` is added to the frozen sum ``F`` and a new pair starts.

    Nothing here knows where a task ends. The loss is the cross-entropy of the batch and that of the hardest examples
    so far, over the classes seen so far, plus ``penalty/2 * sum of importance * factor^2``: a pull to zero of the
    coordinates that carried the answers on the hard examples at earlier folds. The released code adds the factors of
    the two pairs, which is not the sum of their products, and starts with both factors at zero, which never learn;
    here a fold leaves the function as it is.

    The head is one linear layer over the declared classes. Head and adapter keep the optimizer's moments over tasks;
    a fold clears those of the adapter. Whether a plateau was reached is the one value that a step waits for.
    """

    name = "online_lora"
    Config = OnlineLoRAConfig
    needs = Needs(prompts=True, boundaries=False)
    owns = frozenset({"features", "classification", "trainable", "prediction"})
    leaks = frozenset({"L-01", "L-03", "L-12", "L-15"})
    stability = frozenset({"hard", "penalty"})
    waits = "whether the loss has settled"

    seen: Tensor
    recent: Tensor
    peak: Tensor
    level: Tensor
    folds: Tensor
    hard_images: Tensor
    hard_labels: Tensor
    hard_ids: Tensor
    hard_losses: Tensor

    def __init__(self, config: OnlineLoRAConfig) -> None:
        super().__init__(config)
        self.factors = nn.ParameterDict()
        self.folded, self.importance = nn.Module(), nn.Module()
        self.moments = Slots(buffers=None)  # of the optimizer, kept between tasks in one slot of the run
        self.trained = Slots(buffers=("order",))
        self._losses = torch.zeros(0)
        self._fresh_optimizer = False

    def attach(self, context: Context) -> None:
        """Draw the first adapter and the head; make room for the rest."""
        super().attach(context)
        for name, tensor in self.layout.first(context.seed, RUN_LEVEL).items():
            self.factors[name] = nn.Parameter(tensor)
            self.importance.register_buffer(name, torch.zeros_like(tensor))
        device = next(iter(self.factors.values())).device
        for target in self.layout.targets:
            shape = (len(self.layout.blocks), *reversed(self.layout.widths(target)))
            self.folded.register_buffer(target, torch.zeros(shape, device=device))  # (blocks, d_out, d_in)
        shared = context.head
        self.head = Head(shared.feature_dim, shared.seed, shared.init)
        self.head.begin_task(RUN_LEVEL, range(context.declared[0]))
        self.head.to(device)
        empty = {"dtype": torch.int64, "device": device}
        self.register_buffer("seen", torch.zeros(context.declared[0], dtype=torch.bool, device=device))
        self.register_buffer("recent", torch.zeros(0, device=device))  # losses, the newest last
        self.register_buffer("peak", torch.ones((), dtype=torch.bool, device=device))  # rose since the last fold
        self.register_buffer("level", torch.zeros(2, device=device))  # mean and variance at the last fold
        self.register_buffer("folds", torch.zeros(0, dtype=torch.int64))  # updates after which one was made
        images = torch.zeros(0, *context.image_shape, dtype=torch.uint8, device=device)
        self.register_buffer("hard_images", images)
        self.register_buffer("hard_labels", torch.zeros(0, **empty))  # type: ignore[call-overload]
        self.register_buffer("hard_ids", torch.zeros(0, **empty))  # type: ignore[call-overload]
        self.register_buffer("hard_losses", torch.zeros(0, device=device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("seen", *GROWING):
            if f"{prefix}{name}" in state_dict:
                here = getattr(self, name)
                setattr(self, name, torch.zeros_like(state_dict[f"{prefix}{name}"], device=here.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # -- a task's life, of which nothing is learnt --------------------------------------------------------------------

    def begin_task(self, task: Task) -> None:
        """Note that the task's images come.

        Raises:
            UserError: a replay buffer beside it, which would be a second one.
        """
        if self.context.buffer is not None:
            raise UserError("strategy", self.name, "brings its own hard examples", "Use it without another buffer")
        self._fresh_optimizer = True
        self._declare(task)
        note_order(self.trained, task.task_id, self.level.device)

    def _declare(self, task: Task) -> None:
        """Give the classes that came to the stream with this task their rows of the head, for all of its addition."""
        known, needed = len(self.seen), 1 + max(task.classes)
        if needed <= known:
            return
        bound = next(count for count in self.context.declared if count >= needed)
        self.head.begin_task(task.task_id, range(known, bound))
        self.head.to(self.seen.device)
        self.seen = torch.cat((self.seen, self.seen.new_zeros(bound - known)))

    def end_task(self, task: Task) -> None:
        """Keep the optimizer's moments: the next task's optimizer is a new one.

        Says so where the whole stream passed without a fold.
        """
        self.seen[torch.tensor(task.classes, device=self.seen.device)] = True  # as the batches have said
        optimizer = self.context.optimizer()
        kept: dict[str, Tensor] = {}
        for number, parameter in enumerate(self.trained_parameters()):
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            kept |= {f"{number}_{name}": value.detach() for name, value in state.items() if isinstance(value, Tensor)}
        self.moments.add(RUN_LEVEL, **kept)
        if not len(self.folds) and len(self.trained.task_ids) >= self.context.length:
            log.warning("%s: the loss never settled, no adapter was folded in; see mean_below", self.name)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Adapter and head."""
        return [*self.factors.values(), *self.head.parameters()]

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Both factors of every layer."""
        return list(self.factors.values())

    def trainable(self) -> Iterator[ParameterGroup]:
        """The current adapter and the whole head."""
        yield ParameterGroup(self.trained_parameters())

    # -- forward ------------------------------------------------------------------------------------------------------

    def widen(self, batch: Batch) -> Batch:
        """Append the hard examples, augmented anew."""
        if not len(self.hard_labels):
            return batch
        nobody = torch.full_like(self.hard_labels, -1)
        return batch.joined(self.context.prepare(self.hard_images, self.hard_labels, self.hard_ids, nobody))

    def dense(self) -> dict[str, Tensor] | None:
        """The sum of all folded pairs by target, ``None`` before the first fold."""
        return dict(self.folded.named_buffers()) if len(self.folds) else None

    def extras(self, batch: Batch) -> Mapping[int, BlockExtras]:
        """The same adapter for all images."""
        return self.layout.extras(dict(self.factors.items()), dense=self.dense())

    def seen_classes(self) -> list[int]:
        """Classes of the images so far, ascending."""
        return self.seen.nonzero()[:, 0].tolist()

    def predict(self, batch: Batch) -> Tensor:
        """Logits (B, S) over the classes seen."""
        return self.head(self(batch))[:, self.seen]

    def masked(self, features: Tensor) -> Tensor:
        """Logits (B, C) over the declared classes, minus infinity where a class was not seen yet."""
        return self.head(features).float().masked_fill(~self.seen, float("-inf"))

    # -- a step -------------------------------------------------------------------------------------------------------

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Cross-entropies of the batch and of the hard examples, and the pull."""
        labels, own = step.batch.labels, step.current
        self.seen[labels[:own]] = True
        each = F.cross_entropy(self.masked(step.features), labels, reduction="none")  # (B,)
        self._losses = each.detach()
        terms = {"ce": each[:own].mean()}
        if len(labels) > own:
            terms["hard"] = each[own:].mean()
        if len(self.folds) and self.config.penalty:
            weights = dict(self.importance.named_buffers())
            pulls = [(weights[name] * factor.square()).sum() for name, factor in self.factors.items()]
            terms["penalty"] = self.config.penalty / 2 * torch.stack(pulls).sum()
        return terms

    def after_backward(self, step: Step) -> None:
        """Hand a new task's optimizer the moments of the one before."""
        optimizer = self.context.optimizer()
        if not self._fresh_optimizer or optimizer is None:
            return
        self._fresh_optimizer = False
        if RUN_LEVEL not in self.moments:
            return
        parameters = self.trained_parameters()
        for key, value in self.moments.tasks[str(RUN_LEVEL)].named_buffers():
            number, name = key.split("_", 1)
            place = "cpu" if name == "step" else value.device  # where the optimizer expects its counter
            optimizer.state[parameters[int(number)]][name] = value.to(place, copy=True)

    @torch.no_grad()
    def after_update(self, step: Step) -> None:
        """Push the loss, and fold where it has settled."""
        loss = self._losses[: step.current].mean()
        self.recent = torch.cat((self.recent[1 - self.config.window :], loss[None]))
        if len(self.recent) < self.config.window:
            return
        now = torch.stack((self.recent.mean(), self.recent.var(correction=0)))
        self.peak, settled = plateau(now, self.level, self.peak, self.thresholds())
        if bool(settled):  # waits for the device: a fold is too rare and too dear to be worked out at every step
            self.fold(step)
            self.level, self.peak = now, torch.zeros_like(self.peak)

    def thresholds(self) -> Tensor:
        """Mean and variance (2,) of the loss below which it has settled."""
        mean, variance = self.config.mean_below, self.config.variance_below
        low = MEAN_SHARE * self.seen.sum().log() if mean is None else constant(mean, self.seen.device)
        narrow = VARIANCE_ROWS / self.context.batch_size if variance is None else variance
        return torch.stack((low.float(), torch.full_like(low, narrow, dtype=torch.float32)))

    @torch.no_grad()
    def fold(self, step: Step) -> None:
        """Update the importances, add the pair to the frozen sum, start a new pair; the function stays the same."""
        count = len(self.folds) + 1
        found = self.importances(step.batch, step.current)
        for name, kept in self.importance.named_buffers():
            kept.copy_(found[name] / count + (1 - 1 / count) * kept)
        for target, total in self.folded.named_buffers():
            down, up = self.factors[f"A_{target}"], self.factors[f"B_{target}"]
            total.copy_(total.double() + self.layout.scale * (up.double() @ down.double()))
        optimizer = self.context.optimizer()
        for name, tensor in self.layout.first(self.context.seed, RUN_LEVEL, count).items():
            self.factors[name].copy_(tensor)
            if optimizer is not None:
                optimizer.state.pop(self.factors[name], None)
        update = torch.tensor([step.global_step + 1], device=self.folds.device)
        self.folds = torch.cat((self.folds, update))
        log.info("%s: the loss has settled, adapter %d folded in after update %d", self.name, count, int(update))

    def importances(self, batch: Batch, start: int) -> dict[str, Tensor]:
        """Mean over the rows from ``start`` of the squared gradient of the log-probability of their answer, by factor.

        Each row has a copy of the factors of its own, so that one backward pass gives all rows' gradients.
        """
        rows = torch.arange(start, len(batch), device=batch.labels.device)
        if not len(rows):
            return {name: torch.zeros_like(factor) for name, factor in self.factors.items()}
        chosen, own = batch.select(rows), torch.arange(len(rows), device=rows.device)[:, None]
        with torch.enable_grad():
            copies = {
                name: factor.detach().expand(len(rows), *factor.shape).clone().requires_grad_()
                for name, factor in self.factors.items()
            }
            vit = cast(PromptedViT, self.context.backbone)
            with self.context.autocast():
                tokens, first = self.context.embed(chosen)
                extras = self.layout.extras(copies, own, self.dense())
                logits = self.masked(vit.readout(vit.finish(vit.run(tokens, first, extras=extras))))
            answered = logits.log_softmax(1).amax(1).sum()
            gradients = torch.autograd.grad(answered, list(copies.values()))
        return {name: found.square().mean(0) for name, found in zip(copies, gradients, strict=True)}

    @torch.no_grad()
    def after_batch(self, step: Step) -> None:
        """Keep the examples with the largest losses before the update, of equal ones those with smaller ids."""
        batch, raw = step.batch, step.batch.extra["raw"]
        order = batch.example_ids.argsort(stable=True)
        order = order[self._losses[order].argsort(descending=True, stable=True)][: self.config.hard]
        self.hard_images, self.hard_labels = raw[order], batch.labels[order]
        self.hard_ids, self.hard_losses = batch.example_ids[order], self._losses[order].float()

    # -- lineage ------------------------------------------------------------------------------------------------------

    def components(self) -> Iterator[Component]:
        """All is one mixture and belongs to every task so far."""
        tasks = tuple(self.trained.task_ids)
        for name in ("factors", "folded", "importance", "head", "moments"):
            tensors = dict(getattr(self, name).state_dict())
            if tensors:
                yield Component(name, tasks, KINDS.get(name, "statistics"), tensors)
        for name in ("seen", "peak", "level", *GROWING):
            yield Component(name, tasks, KINDS.get(name.split("_")[0], "statistics"), {name: getattr(self, name)})
        yield Component("trained", tasks, "lineage", dict(self.trained.state_dict()))

    @torch.no_grad()
    def drop_task(self, task_id: int) -> None:
        """Stop answering with the task's classes, draw their head rows anew, and remember no hard example.

        Nothing can be taken out of the mixture of all else: it keeps what it learnt, and so does its lineage.
        """
        if task_id not in self.trained:
            return
        for name in GROWING:
            if name.startswith("hard_"):
                setattr(self, name, getattr(self, name)[:0])
        own, shared = self.context.own_classes(task_id), self.context.head
        fresh = Head(shared.feature_dim, shared.seed, shared.init)
        for block in self.head.blocks.task_ids:
            classes = self.head.blocks.numbers(block, "classes")
            fresh.begin_task(block, classes)
            rows = [row for row, c in enumerate(classes) if c in own]
            for name, parameter in self.head.blocks.parameters_of(block).items() if rows else ():
                parameter[rows] = fresh.blocks.get(block, name)[rows].to(parameter.device)
                self._forget_moments(parameter, rows)
        self.seen[own] = False

    def _forget_moments(self, parameter: nn.Parameter, rows: list[int]) -> None:
        if RUN_LEVEL not in self.moments:
            return
        number = next(k for k, trained in enumerate(self.trained_parameters()) if trained is parameter)
        for key, value in self.moments.tasks[str(RUN_LEVEL)].named_buffers():
            if key.startswith(f"{number}_") and value.shape == parameter.shape:
                value[rows] = 0.0

    def inspect(self) -> dict[str, Any]:
        """After which updates an adapter was folded in, and the size of one."""
        return {**super().inspect(), "folds": self.folds.tolist()}


def plateau(now: Tensor, level: Tensor, peak: Tensor, below: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the loss rose since the last fold, and whether it has settled again.

    Args:
        now: mean and population variance (2,) of the losses in the window.
        level: the same at the last fold.
        peak: bool, whether it had risen before.
        below: mean and variance (2,) of a plateau.
    """
    peak = peak | (now[0] > level[0] + level[1].sqrt())
    return peak, peak & (now < below).all()
