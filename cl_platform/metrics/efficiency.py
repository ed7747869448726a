"""Efficiency 6.1 to 6.9: what the costs of a run are called, and two ratios over the sizes after each task."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined

EFFICIENCY_DEFINITIONS: tuple[Definition, ...] = (
    Definition("6.1", "params_total", "Parameters of backbone, head and strategies.", "parameters", "down"),
    Definition("6.1", "params_trainable", "Parameters that the task trains.", "parameters", "down"),
    Definition("6.1", "params_per_task", "Parameters that belong to one task alone, by task.", "parameters", "down"),
    Definition(
        "6.2", "flops_train_step", "Forward, backward and strategies' work of one training batch.", "FLOP", "down"
    ),
    Definition("6.2", "flops_eval_image", "Answering one image anew, nothing kept.", "FLOP", "down"),
    Definition("6.3", "forwards_train", "Images sent forward in training, replay included.", "image forwards", "down"),
    Definition("6.3", "forwards_eval", "Those of continual evaluation, parts as parts.", "image forwards", "down"),
    Definition("6.3", "eval_overhead", "Evaluation's forwards over three times training's.", "fraction", "down"),
    Definition("6.4", "buffer_bytes", "Tensors of the replay buffers.", "bytes", "down"),
    Definition("6.4", "cache_bytes", "Features and activations kept in memory.", "bytes", "down"),
    Definition("6.4", "model_bytes", "Parameters and buffers of backbone and head.", "bytes", "down"),
    Definition("6.4", "strategy_state_bytes", "Tensors of the strategies, by component.", "bytes", "down"),
    Definition("6.5", "peak_rss_bytes", "Largest resident size of the process.", "bytes", "down"),
    Definition("6.5", "peak_cuda_bytes", "Most memory that tensors held on the GPU.", "bytes", "down"),
    Definition("6.6", "seconds", "Wall-clock time of each phase, without the phases inside it.", "seconds", "down"),
    Definition("6.6", "first_update_seconds", "The first update of the run, with its warm-up.", "seconds", "down"),
    Definition("6.7", "samples_per_second", "Training images per second of training.", "images per second", "up"),
    Definition("6.7", "images_per_second", "The same with replayed images.", "images per second", "up"),
    Definition("6.8", "energy_joule", "What the machine's energy counters advanced by.", "joule", "down"),
    Definition("6.9", "model_size_efficiency", "Size after the first task over later sizes, mean.", "fraction", "up"),
    Definition("6.9", "storage_efficiency", "1 minus the buffer's share of the training data, mean.", "fraction", "up"),
)
"""Costs in the order of their numbers. FLOP counts a multiplication and an addition as 2, and matrix products,
convolutions and attention only."""


def model_size_efficiency(parameters: Sequence[int]) -> Outcome:
    """6.9, (0, 1]: ``min(1, mean_k P_0 / P_k)`` (Diaz-Rodriguez et al. 2018).

    Args:
        parameters: P_k, the learner's parameters after each task.

    Raises:
        ValueError: a size below 1.
    """
    if not parameters:
        return Undefined("empty")
    if min(parameters) < 1:
        raise ValueError(f"sizes {list(parameters)}: each must be at least 1")
    ratios = [Fraction(parameters[0], size) for size in parameters]
    return Result(float(min(Fraction(1), sum(ratios, Fraction(0)) / len(ratios))))


def storage_efficiency(buffer_bytes: Sequence[int], data_bytes: int) -> Outcome:
    """6.9, [0, 1]: ``1 - min(1, mean_k M_k / M_data)`` (Diaz-Rodriguez et al. 2018); 1 without a buffer.

    Args:
        buffer_bytes: M_k, the replay buffers' size after each task.
        data_bytes: size of all training data of the stream.

    Raises:
        ValueError: a negative size.
    """
    if min(buffer_bytes, default=0) < 0 or data_bytes < 0:
        raise ValueError(f"sizes {list(buffer_bytes)} of {data_bytes} bytes: none may be negative")
    if not buffer_bytes or not data_bytes:
        return Undefined("empty")
    share = Fraction(sum(buffer_bytes), len(buffer_bytes) * data_bytes)
    return Result(float(1 - min(Fraction(1), share)))
