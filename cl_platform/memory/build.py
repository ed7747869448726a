"""A replay buffer from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cl_platform.config import setting
from cl_platform.errors import UserError
from cl_platform.memory.adapters import AvalanchePolicy, avalanche_storage
from cl_platform.memory.balanced import ClassBalanced, Greedy, ReservoirBalanced
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.memory.columns import slots_for_bytes
from cl_platform.memory.herding import Herding
from cl_platform.memory.policies import Policy, Reservoir, Ring
from cl_platform.random_streams import RUN_LEVEL, stream_seed
from cl_platform.registry import buffer_policies

for _policy in (Reservoir, ClassBalanced, ReservoirBalanced, Ring, Herding, Greedy, AvalanchePolicy):
    buffer_policies.register(_policy.name)(_policy)


@dataclass(frozen=True)
class BufferConfig:
    """Keys of a buffer, below the strategy that has it."""

    policy: str = setting("reservoir", choices=buffer_policies.names, doc="which examples stay")
    size: int = setting(200, min=1, doc="examples")
    bytes: int | None = setting(None, min=1, doc="room in bytes instead of size")
    per_task: int | None = setting(
        None, min=1, doc="ring: slots of each task; null divides size by the tasks", only_with=("policy", ("ring",))
    )
    fixed_classes: int | None = setting(
        None,
        min=1,
        doc="class_balanced, greedy with mode=first_k: divide the slots once among so many classes",
        only_with=("policy", ("class_balanced", "greedy")),
    )
    mode: str = setting("paper", choices=("paper", "first_k"), doc="greedy: as published, or as released",
                        only_with=("policy", ("greedy",)))  # fmt: skip
    avalanche: str = setting("ClassBalancedBuffer", doc="avalanche: class of avalanche.training.storage_policy",
                             only_with=("policy", ("avalanche",)))  # fmt: skip


def build_policy(
    config: BufferConfig,
    capacity: int,
    seed: int,
    task_id: int = RUN_LEVEL,
    num_tasks: int | None = None,
    total_tasks: int | None = None,
) -> Policy:
    """The policy that ``config`` names.

    Args:
        config: the buffer's keys.
        capacity: slots.
        seed: the run's seed; draws are from the stream ``buffer.insert``.
        task_id: the task that the buffer belongs to, if it is one task's alone.
        num_tasks: tasks of the stream, for a ring without ``per_task``.
        total_tasks: with the tasks that were added to the stream later: a ring gets slots of their own for them.

    Raises:
        UserError: an unknown policy, or keys that it cannot work with.
    """
    draws = stream_seed(seed, task_id, "buffer.insert")
    if config.policy == Reservoir.name:
        return Reservoir(capacity, draws)
    if config.policy == ClassBalanced.name:
        return ClassBalanced(capacity, draws, config.fixed_classes)
    if config.policy == ReservoirBalanced.name:
        return ReservoirBalanced(capacity, draws)
    if config.policy == Herding.name:
        return Herding(capacity)
    if config.policy == Greedy.name:
        mode: Literal["paper", "first_k"] = "first_k" if config.mode == "first_k" else "paper"
        return Greedy(capacity, draws, mode, config.fixed_classes)
    if config.policy == AvalanchePolicy.name:
        return AvalanchePolicy(avalanche_storage(config.avalanche, capacity), seed)
    if config.policy != Ring.name:
        made: Policy = buffer_policies.get(config.policy)(capacity, draws)  # a plug-in's
        return made
    per_task = config.per_task if config.per_task is not None else capacity // num_tasks if num_tasks else None
    if per_task is None:
        allowed = "is needed where the number of tasks is not known"
        raise UserError("buffer.per_task", None, allowed, "Set buffer.per_task")
    if num_tasks and 1 <= per_task <= capacity < per_task * num_tasks:
        allowed = f"{num_tasks} tasks need {per_task * num_tasks} slots, and the buffer has {capacity}"
        raise UserError("buffer.per_task", per_task, allowed, "Lower it, or raise buffer.size")
    if num_tasks and total_tasks and total_tasks > num_tasks:
        capacity = max(capacity, per_task * total_tasks)
    return Ring(capacity, per_task)


def build_buffer(
    config: BufferConfig,
    seed: int,
    image_shape: tuple[int, int, int],
    num_columns: int | None = None,
    num_tasks: int | None = None,
    task_id: int = RUN_LEVEL,
    total_tasks: int | None = None,
) -> ReplayBuffer:
    """An empty buffer of ``config.size`` examples, or of as many as fit into ``config.bytes``.

    Args:
        config: the buffer's keys.
        seed: the run's seed.
        image_shape: of the images to come, (3, H, W).
        num_columns: width of the logits to come, if they are stored.
        num_tasks: tasks of the stream.
        task_id: the task that the buffer belongs to, if it is one task's alone.
        total_tasks: with the tasks that were added to the stream later.
    """
    capacity = config.size
    if config.bytes is not None:
        keyed = buffer_policies.get(config.policy).keyed
        capacity = slots_for_bytes(config.bytes, image_shape, keyed, num_columns)
    policy = build_policy(config, capacity, seed, task_id, num_tasks, total_tasks)
    return ReplayBuffer(policy, num_columns, least=capacity)
