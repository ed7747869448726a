"""The learner: a backbone, a head and the strategies, trained by Lightning. No method's name appears here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_platform.backbones import Backbone
from cl_platform.backbones.feature_cache import FeatureCache
from cl_platform.batch import Batch
from cl_platform.errors import UserError
from cl_platform.finetuning import Finetuning, FollowsUpdates, run_finetuning
from cl_platform.heads import Head
from cl_platform.optimizers import OptimizerConfig, build_optimizer, schedule_factor
from cl_platform.owners import Owners
from cl_platform.ownership import Ownership
from cl_platform.random_streams import stream, stream_seed
from cl_platform.scenarios import Stream, Task, Transforms
from cl_platform.strategies.base import Context, ParameterGroup, Pass, Step
from cl_platform.strategies.composition import Composition


@dataclass(frozen=True)
class LearnerOptions:
    """What the learner needs beside its parts.

    Attributes:
        seed: the run's seed.
        batch_size: training images of an update, for learning rates that scale with it.
        head_init: see :class:`~cl_platform.heads.Head`.
        cache_bytes: bound on kept features.
        log_every: updates between two logged losses.
    """

    seed: int = 0
    batch_size: int = 16
    head_init: str = "trunc_normal"
    cache_bytes: int = 2**30
    log_every: int = 10


class ContinualLearner(Ownership):
    """Learns the tasks of a stream one after the other.

    Args:
        backbone: features of images; frozen in any task in which no strategy trains it.
        composition: the strategies.
        transforms: from uint8 images to the backbone's input.
        stream: facts about the scenario (classes, setting, length).
        optimizer: made anew for each task.
        options: see :class:`LearnerOptions`.
    """

    def __init__(
        self,
        backbone: Backbone,
        composition: Composition,
        transforms: Transforms,
        stream: Stream,
        optimizer: OptimizerConfig,
        options: LearnerOptions,
    ) -> None:
        super().__init__()
        self.backbone, self.composition, self.transforms = backbone, composition, transforms
        self.optimizer_config, self.options = optimizer, options
        self.setting = stream.setting
        self.owners = Owners()
        self.head = Head(backbone.feature_dim, options.seed, options.head_init)
        self.cache = FeatureCache(
            backbone, transforms.evaluate, transforms.id, options.cache_bytes, autocast=self.precision_context
        )
        context = Context(
            backbone=backbone,
            head=self.head,
            cache=self.cache,
            seed=options.seed,
            num_tasks=stream.planned,
            total_tasks=stream.total,
            length=len(stream.tasks),
            ends=stream.ends,
            num_classes=stream.num_classes,
            declared=stream.declared,
            setting=stream.setting,
            online=stream.online,
            boundaries=not stream.hidden,
            autocast=self.precision_context,
            prepare=self._replayed,
            step_stream=self._step_stream,
            optimizer=self._optimizer,
            run_finetuning=self._run_finetuning,
            image_shape=(3, *stream.image_shape[1:]),
            batch_size=options.batch_size,
            sgd_rate=optimizer.rate(options.batch_size) if optimizer.name == "sgd" else 0.0,
            behind=self.owners.behind,
            own_classes=self.owners.classes_of_none_but,
        )
        self.context = context
        composition.attach(context)
        self.task: Task | None = None
        self.learnt: list[int] = []
        self.groups: list[ParameterGroup] = []
        self.terms: dict[str, Tensor] = {}  # losses of the running step, between forward and backward
        self.epochs = 1
        self.step_in_task = 0
        self.forwards_train = 0  # image forwards, those of the query included
        self.images_forwarded = 0  # rows of training batches, replayed ones included
        self.further_updates = 0  # those outside Lightning's loop
        self.timed: Callable[[], AbstractContextManager[Any]] = nullcontext  # a stopwatch around them
        self._first_epoch, self._batch_idx = 0, 0
        self._draws: dict[str, int] = {}
        self._host: tuple[Tensor, Batch] | None = None  # labels of a moved batch, and its ids on the host
        self._last_step: Step | None = None
        self._all_finite = torch.ones((), dtype=torch.bool)
        self._train_query: Tensor | None = None
        self._first_scale: dict[str, Any] | None = None  # state of the gradient scaler before the first task

    # -- a task's life ----------------------------------------------------------------------------------------------

    def begin_task(self, task: Task, epochs: int, first_epoch: int = 0) -> None:
        """Grow head and strategies, and freeze whatever no strategy trains in this task.

        Args:
            task: what comes next.
            epochs: epochs it will be trained for.
            first_epoch: epochs that the run has behind it.
        """
        self.task, self.epochs, self._first_epoch, self.step_in_task = task, epochs, first_epoch, 0
        self.context.epochs, self.context.batches = epochs, 0
        self.head.begin_task(task.task_id, task.classes)
        behind = self.note_begin(task)
        self.composition.begin_task(task)
        self.groups = self.composition.trainable()
        self.note_trained(behind)
        trained = {id(p) for group in self.groups for p in group.parameters}
        if any(id(p) in trained for p in self.backbone.parameters()):
            self.backbone.unfreeze()
            self.backbone.train()  # it was built in eval mode, and the trainer leaves modes as they are
        else:
            self.backbone.freeze()
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        self.cache.refresh()
        self.context.kept_blocks = self._kept_blocks()
        self._train_query = None
        reads_kept = self.composition.query == "only" or self.transforms.deterministic
        if self.composition.query in ("beside", "only") and reads_kept and self.composition.needs_gradient:
            self._train_query = self.cache.features(task.task_id, "train", task.train)

    def _kept_blocks(self) -> int:
        """Leading blocks whose output is a constant of each evaluation image for as long as the task lasts."""
        changed = self.composition.first_block()
        frozen = self.backbone.frozen_blocks()
        return frozen if changed is None else min(frozen, changed)

    def end_task(self, task: Task) -> None:
        """Consolidate; the task counts as learnt from here on.

        Raises:
            UserError: a loss of the task was not finite.
        """
        self._refuse_infinite()
        self.composition.end_task(task)
        self.learnt.append(task.task_id)
        self._train_query = None
        self._last_step = None
        self.cache.refresh()

    def trainable_parameters(self) -> int:
        """Numbers that the current task trains."""
        return sum(p.numel() for group in self.groups for p in group.parameters)

    # -- Lightning --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """A new optimizer and schedule over what the current task trains, and the scale of losses at its start."""
        self._reset_scaler()
        optimizer = build_optimizer(self.optimizer_config, self.groups, self.options.batch_size)
        factor = schedule_factor(self.optimizer_config, self.epochs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; a frozen dataclass is not moved by Lightning itself. Its ids stay on the host as well."""
        moved = batch.to(device, non_blocking=True)
        passes = {name: column for name, column in batch.extra.items() if name == "pass"}
        self._host = (moved.labels, batch.replace(images=batch.images[:, :0], extra=passes))
        return moved

    def on_train_epoch_start(self) -> None:
        """Seed what draws from the global generator (dropout, drop path) by (task, epoch)."""
        assert self.task is not None
        seed = stream_seed(self.options.seed, self.task.task_id, "dropout", self.epoch_in_task)
        torch.manual_seed(seed)
        self.context.batches = int(self.trainer.num_training_batches)

    def _reset_scaler(self) -> None:
        """Losses in half precision are scaled anew in each task, by a factor that no other task has tuned."""
        scaler = getattr(getattr(self._trainer, "precision_plugin", None), "scaler", None)
        if scaler is None or not scaler.is_enabled():
            return
        if self._first_scale is None:
            self._first_scale = scaler.state_dict()
        scaler.load_state_dict(self._first_scale)

    @property
    def epoch_in_task(self) -> int:
        """Epoch inside the current task, from 0."""
        return self.current_epoch - self._first_epoch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step: transform, widen, forward, sum of the strategies' losses."""
        assert self.task is not None
        self._batch_idx, self._draws = batch_idx, {}
        host = self._host[1] if self._host is not None and self._host[0] is batch.labels else batch
        batch = self.composition.widen(self._prepared(batch, batch_idx))
        passes: list[Pass] = []
        seen = self.head.classes

        def forward(rows: Batch) -> Pass:
            features = self.composition.features(rows)
            self.images_forwarded += len(rows)
            passes.append(Pass(rows, features, self.head(features)))
            return passes[-1]

        forward(batch)
        step = Step(
            host=host,
            passes=passes,
            forward=forward,
            seen_classes=seen,
            candidates=self.composition.candidates(self.task, seen),
            task=self.task,
            epoch=self.epoch_in_task,
            step_in_task=self.step_in_task,
            global_step=self.steps,
        )
        self._last_step = step
        self.terms = terms = self.composition.losses(step)
        loss = torch.stack([value.float() for value in terms.values()]).sum()
        self._log_losses(loss, terms)
        return loss

    def _prepared(self, batch: Batch, batch_idx: int) -> Batch:
        assert self.task is not None
        query = self.composition.query
        if query != "only":
            generator = stream(self.options.seed, self.task.task_id, "augment", self.epoch_in_task, batch_idx)
            raw = batch.images
            batch = batch.replace(images=self.transforms.train(raw, generator)).with_extra(raw=raw)
            self.forwards_train += len(batch)
        if query in ("none", "answers"):
            return batch
        if self._train_query is not None:
            return batch.with_extra(query=self._train_query[batch.extra["row"]])
        with torch.no_grad():
            self.forwards_train += len(batch)
            return batch.with_extra(query=self.backbone(batch.images).float())

    def _step_stream(self, purpose: str) -> torch.Generator:
        assert self.task is not None
        number = self._draws[purpose] = self._draws.get(purpose, -1) + 1
        return stream(self.options.seed, self.task.task_id, purpose, self.epoch_in_task, self._batch_idx, number)

    def _optimizer(self) -> torch.optim.Optimizer | None:
        return next(iter(getattr(self._trainer, "optimizers", ())), None)

    def _replayed(
        self,
        images: Tensor,
        labels: Tensor,
        example_ids: Tensor,
        task_ids: Tensor,
        draws: torch.Generator | None = None,
    ) -> Batch:
        """A batch of replayed images: a fresh draw of the current task's augmentation, from a stream of its own."""
        raw = images.to(self.device, non_blocking=True)
        labels, example_ids, task_ids = (
            column.to(self.device, torch.int64, non_blocking=True) for column in (labels, example_ids, task_ids)
        )
        ready = self.transforms.train(raw, self._step_stream("replay.augment") if draws is None else draws)
        self.forwards_train += len(raw)
        extra = {"raw": raw, "row": torch.full_like(labels, -1)}
        if self.composition.query in ("beside", "only"):
            with torch.no_grad():
                self.forwards_train += len(raw)
                extra["query"] = self.backbone(ready).float()
        return Batch(ready, labels, example_ids, task_ids, torch.ones_like(labels, dtype=torch.bool), extra)

    def _log_losses(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        self._all_finite = self._all_finite.to(loss.device, non_blocking=True) & torch.isfinite(loss.detach())
        if self.steps % self.options.log_every:
            return
        self._refuse_infinite()
        if not self.trainer.loggers:
            return
        values = {"train/loss": loss, **{f"train/loss_{name}": value for name, value in terms.items()}}
        numbers = {name: float(value.detach()) for name, value in values.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers, step=self.steps)

    def _refuse_infinite(self) -> None:
        if not bool(self._all_finite):
            assert self.task is not None
            raise UserError(
                "optimizer.lr",
                self.optimizer_config.lr,
                f"the loss stopped being finite by step {self.steps}, in task {self.task.task_id}",
                "Lower it; resume=auto goes on after the last good task",
            )

    # -- updates outside Lightning's loop ---------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Optimizer updates of the run so far, those outside Lightning's loop included: the axis of all records."""
        return self.global_step + self.further_updates

    def _run_finetuning(self, plan: Finetuning) -> None:
        trainer = self._trainer

        def forward(batch: Batch) -> Pass:
            features = self.composition.features(batch)
            self.images_forwarded += len(batch)
            return Pass(batch, features, self.head(features))

        def after_update(loss: Tensor) -> None:
            self.further_updates += 1
            if trainer is None:
                return
            if self.steps % self.options.log_every == 0:
                for logger in trainer.loggers:
                    logger.log_metrics({f"train/loss_{plan.purpose}": float(loss)}, step=self.steps)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, FollowsUpdates):
                    callback.after_update(self, self.steps)

        scaled = trainer is not None and getattr(trainer.precision_plugin, "scaler", None) is not None
        with self.timed():
            run_finetuning(self, plan, forward, after_update, self.precision_context, scaled, self.backbone.compiled)

    def on_after_backward(self) -> None:
        """The graph of the step's losses is gone."""
        self.terms = {}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Strategies' gradient surgery: gradients are complete and un-scaled, and not clipped yet."""
        assert self._last_step is not None
        self.composition.after_backward(self._last_step)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Strategies' work after each batch; the step's graph is let go."""
        assert self._last_step is not None
        self.composition.after_batch(self._last_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The update, and the strategies' work right after it."""
        super().optimizer_step(*args, **kwargs)
        assert self._last_step is not None
        self.composition.after_update(self._last_step)
        self.step_in_task += 1

    # -- state ------------------------------------------------------------------------------------------------------

    def learnt_state(self) -> dict[str, Tensor]:
        """All that was learnt: the state without a frozen backbone's weights, which their digest stands for."""
        state = self.state_dict()
        if self.backbone.frozen:
            state = {name: value for name, value in state.items() if not name.startswith("backbone.")}
        return state

    def load_learnt_state(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`learnt_state` gave, in a newly built learner.

        Raises:
            UserError: keys are missing or left over.
        """
        result = self.load_state_dict(state, strict=False)
        missing = [k for k in result.missing_keys if not k.startswith("backbone.")]
        if missing or result.unexpected_keys:
            names = ", ".join([*missing, *result.unexpected_keys][:3])
            raise UserError("resume", names, "the checkpoint does not fit this configuration", "Start without resume")
        self.to(self.device)  # parts that loading created stand on the CPU

    def restore(self, tensors: Mapping[str, Tensor], learnt: Sequence[int], frozen: bool) -> None:
        """Take on the state of a checkpoint, in a newly built learner.

        Args:
            tensors: what :meth:`learnt_state` gave.
            learnt: ids of the tasks that it knows, in the order of learning.
            frozen: whether the backbone is as it was built.
        """
        if frozen:
            self.backbone.freeze()
        self.load_learnt_state(dict(tensors))
        self.learnt = list(learnt)
