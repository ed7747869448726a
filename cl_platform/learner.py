"""The learner: a backbone, a head and the strategies, trained by Lightning. No method's name appears here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from cl_platform.backbones import Backbone
from cl_platform.backbones.feature_cache import READ_BATCH, FeatureCache
from cl_platform.batch import Batch
from cl_platform.errors import UserError
from cl_platform.heads import Head
from cl_platform.optimizers import OptimizerConfig, build_optimizer, schedule_factor
from cl_platform.random_streams import stream, stream_seed
from cl_platform.scenarios import ImageSet, Stream, Task, Transforms
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


class ContinualLearner(L.LightningModule):
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
        self.head = Head(backbone.feature_dim, options.seed, options.head_init)
        self.cache = FeatureCache(
            backbone, transforms.evaluate, transforms.id, options.cache_bytes, autocast=self.precision_context
        )
        context = Context(
            backbone=backbone,
            head=self.head,
            cache=self.cache,
            seed=options.seed,
            num_tasks=len(stream.tasks),
            num_classes=stream.num_classes,
            setting=stream.setting,
            autocast=self.precision_context,
            prepare=self._replayed,
            step_stream=self._step_stream,
            image_shape=(3, *stream.image_shape[1:]),
            batch_size=options.batch_size,
            sgd_rate=optimizer.rate(options.batch_size) if optimizer.name == "sgd" else 0.0,
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
        self._first_epoch = 0
        self._batch_idx = 0
        self._draws: dict[str, int] = {}
        self._host: tuple[Tensor, Batch] | None = None  # labels of a moved batch, and its ids on the host
        self._last_step: Step | None = None
        self._all_finite = torch.ones((), dtype=torch.bool)
        self._train_query: Tensor | None = None

    def precision_context(self) -> AbstractContextManager[Any]:
        """The run's autocast region, or none outside a trainer."""
        trainer = self._trainer
        return trainer.precision_plugin.forward_context() if trainer is not None else nullcontext()

    # -- a task's life ----------------------------------------------------------------------------------------------

    def begin_task(self, task: Task, epochs: int, first_epoch: int = 0) -> None:
        """Grow head and strategies, and freeze whatever no strategy trains in this task.

        Args:
            task: what comes next.
            epochs: epochs it will be trained for.
            first_epoch: epochs that the run has behind it.
        """
        self.task, self.epochs, self._first_epoch, self.step_in_task = task, epochs, first_epoch, 0
        self.head.begin_task(task.task_id, task.classes)
        self.composition.begin_task(task)
        self.groups = [] if not self.composition.needs_gradient else self.composition.trainable()
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
        """A new optimizer and schedule over what the current task trains."""
        optimizer = build_optimizer(self.optimizer_config, self.groups, self.options.batch_size)
        factor = schedule_factor(self.optimizer_config.schedule, self.epochs)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; a frozen dataclass is not moved by Lightning itself. Its ids stay on the host as well."""
        moved = batch.to(device, non_blocking=True)
        self._host = (moved.labels, batch.replace(images=batch.images[:, :0], extra={}))
        return moved

    def on_train_epoch_start(self) -> None:
        """Seed what draws from the global generator (dropout, drop path) by (task, epoch)."""
        assert self.task is not None
        seed = stream_seed(self.options.seed, self.task.task_id, "dropout", self.epoch_in_task)
        torch.manual_seed(seed)

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
            global_step=self.global_step,
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

    def _replayed(self, images: Tensor, labels: Tensor, example_ids: Tensor, task_ids: Tensor) -> Batch:
        """A batch of replayed images: a fresh draw of the current task's augmentation, from a stream of its own."""
        assert self.task is not None
        raw = images.to(self.device, non_blocking=True)
        labels, example_ids, task_ids = (
            column.to(self.device, torch.int64, non_blocking=True) for column in (labels, example_ids, task_ids)
        )
        ready = self.transforms.train(raw, self._step_stream("replay.augment"))
        self.forwards_train += len(raw)
        extra = {"raw": raw, "row": torch.full_like(labels, -1)}
        if self.composition.query in ("beside", "only"):
            with torch.no_grad():
                self.forwards_train += len(raw)
                extra["query"] = self.backbone(ready).float()
        return Batch(ready, labels, example_ids, task_ids, torch.ones_like(labels, dtype=torch.bool), extra)

    def _log_losses(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        self._all_finite = self._all_finite.to(loss.device) & torch.isfinite(loss.detach())
        if self.global_step % self.options.log_every:
            return
        self._refuse_infinite()
        if not self.trainer.loggers:
            return
        values = {"train/loss": loss, **{f"train/loss_{name}": value for name, value in terms.items()}}
        numbers = {name: float(value.detach()) for name, value in values.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers, step=self.global_step)

    def _refuse_infinite(self) -> None:
        if not bool(self._all_finite):
            assert self.task is not None
            raise UserError(
                "optimizer.lr",
                self.optimizer_config.lr,
                f"the loss stopped being finite by step {self.global_step}, in task {self.task.task_id}",
                "Lower it; resume=auto goes on after the last good task",
            )

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

    # -- answers ----------------------------------------------------------------------------------------------------

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Evaluation mode without gradients, uncompiled; every module's own mode is put back afterwards.

        Compiled code would be compiled once more for the other batch size, and training would go on with that.
        """
        modes = [(module, module.training) for module in self.modules()]
        eager = torch.compiler.set_stance("force_eager") if self.backbone.compiled else nullcontext()
        self.eval()
        try:
            with torch.no_grad(), eager:
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def logits_of(self, task_id: int, split: str, image_set: ImageSet, rows: Tensor) -> Tensor:
        """Logits (b, S) over :meth:`seen_classes` for some rows of an image set; call inside :meth:`answering`.

        The id names the cache entry of the images only; what answers never sees it.
        """
        extra = {}
        if self.composition.query != "none":
            extra["query"] = self.cache.features(task_id, split, image_set)[rows.to(self.device)]
        if self.composition.query == "only":
            images = torch.empty(len(rows), 0, device=self.device)
        else:
            images = self.transforms.evaluate(image_set.images(rows).to(self.device))
        return self.answer(images, extra)

    def kept_columns(self, task_id: int, split: str, image_set: ImageSet) -> dict[str, Tensor]:
        """What of an image set's answers need not be computed again, by name, a row an image.

        ``query``: the frozen trunk's features (n, D), where the strategies read them. ``tokens``: activations (n, N, D)
        behind the leading blocks that nothing changes in this task, where there are such blocks and the bound on kept
        bytes leaves room.
        """
        columns, names = {}, self.kept_names()
        if "query" in names:
            columns["query"] = self.cache.features(task_id, split, image_set)
        if "tokens" in names:
            tokens = self.cache.tokens(self.context.kept_blocks, task_id, split, image_set)
            if tokens is not None:
                columns["tokens"] = tokens
        return columns

    def logits_of_images(self, images: Tensor) -> Tensor:
        """Logits (b, S) for new uint8 images (b, 3, H, W)."""
        with self.answering():
            ready = self.transforms.evaluate(images.to(self.device))
            extra = {}
            if self.composition.query != "none":
                with self.precision_context():
                    extra["query"] = self.backbone(ready).float()
            return self.answer(ready, extra)

    def kept_names(self) -> set[str]:
        """Names of :meth:`kept_columns` where the bound on kept bytes leaves room for all."""
        query, blocks = self.composition.query, self.context.kept_blocks
        return {name for name, there in (("query", query != "none"), ("tokens", query != "only" and blocks)) if there}

    def features_of(self, image_set: ImageSet) -> Tensor:
        """Features (n, D) before the head as the learner computes them now, under the evaluation transform."""
        parts = []
        with self.answering():
            for start in range(0, len(image_set), READ_BATCH):
                rows = torch.arange(start, min(start + READ_BATCH, len(image_set)))
                ready = self.transforms.evaluate(image_set.images(rows).to(self.device))
                with self.precision_context():
                    extra = {} if self.composition.query == "none" else {"query": self.backbone(ready).float()}
                    parts.append(self.composition.features(self._unlabelled(ready, extra)).float())
        return torch.cat(parts)

    def answer(self, images: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Logits (b, S) for transformed images (b, 3, S, S); call inside :meth:`answering`.

        Args:
            images: of no size (b, 0) where ``extra`` stands for them.
            extra: columns of :meth:`kept_columns` for the same rows.
        """
        with self.precision_context():
            return self.composition.predict(self._unlabelled(images, extra)).float()

    @staticmethod
    def _unlabelled(images: Tensor, extra: dict[str, Tensor]) -> Batch:
        nothing = torch.full((len(images),), -1, dtype=torch.int64, device=images.device)
        return Batch(images, nothing, nothing, nothing, torch.zeros_like(nothing, dtype=torch.bool), extra)

    def seen_classes(self) -> list[int]:
        """Class ids of the columns of the logits, ascending."""
        return self.composition.seen_classes()

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
