"""Size and arithmetic of a learner: parameters, FLOPs and bytes (efficiency 6.1, 6.2, 6.4)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cl_platform.copies import copied
from cl_platform.metrics.efficiency import model_size_efficiency, storage_efficiency
from cl_platform.metrics.matrix import Outcome, Result
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.scenarios import TaskLoader

if TYPE_CHECKING:
    from cl_platform.batch import Batch
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import Task

log = logging.getLogger("cl_platform")
BUFFER_KIND = "buffer"
"""Kind of the components that hold replayed examples."""


# -- a run's record ---------------------------------------------------------------------------------------------------


def task_flops(learner: ContinualLearner) -> dict[str, Any]:
    """FLOPs of the task that has begun, JSON-ready; the learner and all generators stay as they are.

    Returns:
        ``task_id``, ``flops_eval_image``, ``flops_train_step``, and ``reason`` where one of them is null:
        ``closed_form`` (no step trains), or ``not_countable`` (no copy of the learner can be made or fits into memory).
    """
    task = learner.task
    assert task is not None
    record: dict[str, Any] = {"task_id": task.task_id, "flops_eval_image": None, "flops_train_step": None}
    try:
        twin = _twin(learner)
        record["flops_eval_image"] = _answer_flops(twin, task.train.images(torch.arange(1)))
        if not learner.composition.needs_gradient:
            return {**record, "reason": "closed_form"}
        loader = TaskLoader(task.train, task.task_id, learner.options.batch_size, learner.options.seed)
        record["flops_train_step"] = _step_flops(twin, next(iter(loader)))
    except (TypeError, RuntimeError) as error:  # a figure is no reason to end a run
        log.warning("task %d: FLOPs not counted: %s", task.task_id, error)
        record["reason"] = "not_countable"
    return record


def trained_share(learner: ContinualLearner) -> str:
    """What the task that has begun trains, in words: numbers, and their share of all."""
    total, trained = numbers_in(list(learner.parameters())), learner.trainable_parameters()
    return f"trains {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)"


def task_sizes(learner: ContinualLearner) -> dict[str, Any]:
    """Sizes after a task, JSON-ready: ``params_total``, ``params_trainable`` and ``buffer_bytes``."""
    counts = parameter_counts(learner)
    names = ("params_total", "params_trainable")
    return {**{name: counts[name] for name in names}, "buffer_bytes": memory_bytes(learner)["buffer_bytes"]}


def summary(learner: ContinualLearner, records: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> dict[str, Any]:
    """What ``cost.json`` says about size and arithmetic.

    Args:
        learner: after its last task.
        records: for each task, :func:`task_flops` and :func:`task_sizes` in one object.
        tasks: all tasks of the stream, for the size of their training data.
    """
    sizes = [record["params_total"] for record in records]
    buffers = [record["buffer_bytes"] for record in records]
    return {
        **parameter_counts(learner),
        **memory_bytes(learner),
        "model_size_efficiency": _value(model_size_efficiency(sizes)),
        "storage_efficiency": _value(storage_efficiency(buffers, training_bytes(tasks))),
        "tasks": list(records),
    }


def _value(outcome: Outcome) -> Any:
    return outcome.value if isinstance(outcome, Result) else None


# -- parameters and bytes ---------------------------------------------------------------------------------------------


def parameter_counts(learner: ContinualLearner) -> dict[str, Any]:
    """6.1: numbers in all parameters, in those with ``requires_grad``, and in those of one task alone.

    Returns:
        ``params_total``, ``params_trainable``, and ``params_per_task`` by task id: parameters of the strategies' parts
        that a task brought or alone has shaped, and the head's blocks, each of the task that brought its classes.
    """
    parameters = list(learner.parameters())
    places = {(p.device, p.data_ptr()) for p in parameters if p.numel()}
    owned: dict[int, list[Tensor]] = {}
    for component in learner.composition.components():
        *_, room, last = ["", *component.name.split(".")]
        slot = [int(last)] if room == "tasks" and last.isdigit() else list(component.tasks)
        if len(slot) == 1:
            own = [t for t in component.tensors.values() if (t.device, t.data_ptr()) in places]
            owned.setdefault(slot[0], []).extend(own)
    blocks = learner.head.blocks
    for task_id in blocks.task_ids:
        owned.setdefault(task_id, []).extend(blocks.parameters_of(task_id).values())
    return {
        "params_total": numbers_in(parameters),
        "params_trainable": numbers_in(p for p in parameters if p.requires_grad),
        "params_per_task": {task_id: numbers_in(tensors) for task_id, tensors in sorted(owned.items()) if tensors},
    }


def memory_bytes(learner: ContinualLearner) -> dict[str, Any]:
    """6.4: bytes of all tensors by what they are for; what two of them share counts for the first.

    Returns:
        ``model_bytes`` (backbone and head, and the records of who shaped them), ``buffer_bytes`` (components of the
        kind ``buffer``), ``cache_bytes``, and ``strategy_state_bytes``: the other components by name, and
        ``undeclared`` for what is in none.
    """
    model = [*_tensors(learner.backbone), *_tensors(learner.head), *_tensors(learner.owners)]
    seen, total, replayed = list(model), bytes_in(model), 0
    sizes = {"model_bytes": total, "buffer_bytes": 0, "cache_bytes": learner.cache.bytes}
    parts: dict[str, int] = {}
    for component in learner.composition.components():
        seen.extend(component.tensors.values())
        grown = bytes_in(seen)
        if component.kind == BUFFER_KIND:
            replayed += grown - total
        else:
            parts[component.name] = grown - total
        total = grown
    rest = bytes_in([*seen, *_tensors(learner.composition)]) - total
    if rest:
        parts["undeclared"] = rest
    return {**sizes, "buffer_bytes": replayed, "strategy_state_bytes": parts}


def training_bytes(tasks: Sequence[Task]) -> int:
    """Bytes of the training images at their stored size, as a buffer would hold them, and of their int64 labels."""
    total = 0
    for task in tasks:
        if len(task.train):
            image = task.train.images(torch.arange(1))  # (1, 3, H, W) uint8
            total += len(task.train) * (bytes_in([image]) + task.train.labels.element_size())
    return total


def numbers_in(tensors: Iterable[Tensor]) -> int:
    """Numbers that tensors hold; those that several tensors share count once."""
    by_size: dict[int, list[Tensor]] = {}
    for tensor in tensors:
        by_size.setdefault(tensor.element_size(), []).append(tensor)
    return sum(bytes_in(group) // size for size, group in by_size.items())


def bytes_in(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold; memory that several tensors share counts once."""
    spans = sorted((str(t.device), t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors if t.numel())
    total, where, reach = 0, "", 0
    for device, start, stop in spans:
        if device != where:
            where, reach = device, 0
        total += max(0, stop - max(start, reach))
        reach = max(reach, stop)
    return total


def _extent(tensor: Tensor) -> int:
    """Bytes behind a tensor's first number; an expanded tensor has fewer than its shape says."""
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return min(tensor.numel(), span) * tensor.element_size()


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def flops_train_step(learner: ContinualLearner, batch: Batch) -> int | None:
    """6.2: forward, backward and the strategies' own work on one batch, by a copy of the learner in a begun task.

    A multiplication and an addition are 2; matrix products, convolutions and attention count. The backward pass counts
    what ran: less behind a frozen trunk, and the scores once more where a fused attention kernel computes them again.

    Args:
        learner: untouched, as are all random generators.
        batch: as the task's loader gives it.

    Returns:
        the count, or ``None`` where all strategies learn in closed form.
    """
    if not learner.composition.needs_gradient:
        return None
    return _step_flops(_twin(learner), batch)


def flops_eval_image(learner: ContinualLearner, images: Tensor) -> int:
    """6.2: answering one image with nothing kept, query pass included.

    Args:
        learner: untouched.
        images: (b, 3, H, W) uint8; their mean is taken.
    """
    return _answer_flops(_twin(learner), images)


def _own_draws(twin: ContinualLearner) -> AbstractContextManager[None]:
    return seeded_globals(twin.options.seed, RUN_LEVEL, "flops")


def _step_flops(twin: ContinualLearner, batch: Batch) -> int:
    with _own_draws(twin), flop_counter(twin.device) as counter, torch.enable_grad():
        with twin.precision_context():
            loss = twin.training_step(batch.to(twin.device), 0)
        loss.backward()
        twin.on_after_backward()
        assert twin._last_step is not None
        twin.composition.after_update(twin._last_step)
    return int(counter.get_total_flops())


def _answer_flops(twin: ContinualLearner, images: Tensor) -> int:
    with _own_draws(twin), flop_counter(twin.device) as counter:
        twin.logits_of_images(images)
    return round(counter.get_total_flops() / len(images))


class FlopCounter(TorchDispatchMode):
    """Adds up torch's formulas over the operators that run inside; torch's own counter, without its table by module.

    That table costs more than half of its time. What has no formula counts 0, unless it is made of operators that do.
    """

    def __init__(self) -> None:
        super().__init__()
        self._total = 0
        self._known: dict[Any, tuple[bool, Any]] = {}  # operator -> made of others, formula

    def get_total_flops(self) -> int:
        """Multiplications and additions so far."""
        return self._total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        composite, formula = self._known.get(func) or self._look_up(func)
        if composite:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self._total += formula(*args, **kwargs, out_val=out)
        return out

    def _look_up(self, func: Any) -> tuple[bool, Any]:
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        composite = key in func.py_kernels or func.has_kernel_for_dispatch_key(key)
        self._known[func] = found = (composite, flop_registry.get(func.overloadpacket))
        return found


@contextmanager
def flop_counter(device: torch.device) -> Iterator[FlopCounter]:
    """Counts the FLOPs of what runs inside.

    Of the fused attention kernels torch has formulas for those of CUDA only; elsewhere they would count 0, so that
    attention runs as plain matrix products there.
    """
    plain = nullcontext() if device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounter() as counter:
        yield counter


def _twin(learner: ContinualLearner) -> ContinualLearner:
    """A copy of a learner, with a stand-in for its trainer."""
    twin, trainer = copied(learner, share_frozen=True), learner._trainer
    stand_in = SimpleNamespace(loggers=[], current_epoch=learner.current_epoch, global_step=learner.global_step)
    precision = nullcontext if trainer is None else trainer.precision_plugin.forward_context
    stand_in.precision_plugin = SimpleNamespace(forward_context=precision)
    twin.trainer = cast(Any, stand_in)
    return twin
