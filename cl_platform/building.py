"""From a configuration to a learner, and what cannot be run refused before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cl_platform.backbones import build_backbone, refuse_prompts, supports_prompts
from cl_platform.errors import UserError
from cl_platform.learner import ContinualLearner, LearnerOptions
from cl_platform.scenarios import Stream, Transforms, as_told, build_extended
from cl_platform.strategies.composition import build_strategies
from cl_platform.trainer import batches_of
from cl_platform.unlearning import sequence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cl_platform.run_config import RunConfig, TrainerConfig
    from cl_platform.strategies.phases import Phase
    from cl_platform.unlearning.forgotten import Record
    from cl_platform.unlearning.sequence import Instructions


def instructions_of(config: RunConfig, record: Record) -> Instructions | None:
    """The run's sequence without a word about tasks that its stream leaves out by now; ``None`` for a plain stream."""
    if config.unlearning.sequence is None:
        return None
    return sequence.parse(config.unlearning.sequence).without(record.left_out)


def stream_of(config: RunConfig, record: Record, instructions: Instructions | None = None) -> Stream:
    """The scenario's stream and what was added to it, in the order of the run's instructions.

    Tasks that the run has forgotten since are not in it, unless they kept their place. Where the run's data are gone
    its tasks hold no images.

    Raises:
        UserError: as :func:`~cl_platform.scenarios.build_stream`, or an instruction about a task that is not there.
    """
    if config.bare is not None:
        return config.bare.without(record.left_out)
    skipped = tuple(sorted({*config.scenario.skip_tasks, *record.left_out}))
    stream = build_extended(config.scenario, config.data, config.seed, config.extensions, skipped, config.given)
    if instructions is None:
        return stream
    if stream.hidden:
        raise UserError(
            "unlearning.sequence", str(instructions), "names tasks, and hidden bounds tell of none",
            "Use scenario.boundaries=shown",
        )  # fmt: skip
    ids = [task.task_id for task in stream.tasks]
    sequence.parse(str(instructions), ids)  # refuses a task that the stream does not have
    named = instructions.learnt
    tasks = tuple(replace(stream.task(task_id), position=place) for place, task_id in enumerate(named))
    unnamed = {task_id for task_id in ids if task_id not in named}
    return replace(stream, tasks=tasks, left_out=tuple(sorted({*stream.left_out, *unnamed})))


def build_learner(config: RunConfig, stream: Stream) -> ContinualLearner:
    """Backbone, head and strategies as configured; refuses what cannot work together.

    Raises:
        UserError: a backbone that the strategy cannot use, or a key out of range.
    """
    composition = build_strategies(config.strategy)
    backbone = build_backbone(config.backbone, config.seed)
    if config.trainer.compile:
        backbone.compile_blocks()
    for strategy in composition.strategies:
        if strategy.needs.prompts and supports_prompts(backbone) is not None:
            raise refuse_prompts(backbone, strategy.name)
    transforms = Transforms.from_scenario(config.scenario, backbone.input_size, backbone.mean, backbone.std)
    options = LearnerOptions(
        seed=config.seed,
        batch_size=config.trainer.batch_size,
        head_init=config.head.init,
        cache_bytes=config.evaluation.cache_bytes,
    )
    return ContinualLearner(backbone, composition, transforms, as_told(stream), config.optimizer, options)


def check_future(config: RunConfig, stream: Stream) -> None:
    """Refuse to evaluate future tasks where these have no answer yet.

    Raises:
        UserError: the scenario is not domain-incremental.
    """
    if config.evaluation.future_tasks and stream.setting != "domain":
        raise UserError(
            "evaluation.future_tasks", True, "classes of later tasks are no candidates before they are learnt",
            "Use it with a domain-incremental scenario",
        )  # fmt: skip


def check_sizes(config: TrainerConfig, phases: Sequence[Phase], learner: ContinualLearner) -> None:
    """Refuse a batch that no task can fill.

    Raises:
        UserError: an epoch of a task would have no step.
    """
    if not learner.composition.needs_gradient or not any(len(phase.task.train) for phase in phases):
        return  # without gradients, or without data, from which nothing is learnt
    for phase in phases:
        if batches_of(len(phase.task.train), config) == 0:
            raise UserError(
                "trainer.batch_size", config.batch_size,
                f"task {phase.task.task_id} has {len(phase.task.train)} training images, so an epoch has no step",
                "Lower it, or set trainer.drop_last=false",
            )  # fmt: skip
