"""What every matrix metric is called and means; the number is published beside the value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Definition:
    """One metric.

    Attributes:
        id: number of the definition; keys that share a quantity share it.
        key: name in ``metrics.json`` before the suffix of the prediction space.
        text: the definition in one line.
        unit: ``fraction`` for values in [0, 1] and for differences of such values.
        better: which direction is good.
    """

    id: str
    key: str
    text: str
    unit: str
    better: Literal["up", "down"]


def _define(number: str, key: str, better: Literal["up", "down"], text: str) -> Definition:
    return Definition(number, key, text, "fraction", better)


DEFINITIONS: tuple[Definition, ...] = (
    _define("1.1", "acc", "up", "Accuracy after the last task, mean over tasks."),
    _define("1.2", "acc_samples", "up", "Accuracy after the last task, all images pooled."),
    _define("1.3", "aia", "up", "Mean over all task ends of the mean accuracy over the tasks seen by then."),
    _define("1.4", "aia_samples", "up", "Mean over all task ends of the pooled accuracy on the images seen by then."),
    _define("1.5", "forgetting", "down", "Best accuracy before the last task minus final one, mean over old tasks."),
    _define("1.6", "forgetting_after", "down", "Forgetting (1.5) at every task end; none after the first task."),
    _define("1.7", "bwt", "up", "Final accuracy minus accuracy right after learning, mean over old tasks."),
    _define("1.8", "fwt_init", "up", "Accuracy just before a task is learnt minus that of the untrained model, mean."),
    _define("1.9", "fwt_chance", "up", "Accuracy just before a task is learnt minus the chance level, mean."),
    _define("1.10", "la", "up", "Accuracy on each task right after learning it, mean over tasks."),
    _define("1.11", "intransigence", "down", "Accuracy of joint training minus accuracy right after learning, mean."),
    _define("1.12", "cumulative_acc", "up", "After task i: images of tasks 0..t answered among the classes of 0..t."),
    _define("1.13", "cumulative_forgetting", "down", "Fall of the cumulative accuracy (1.12) until the end, mean."),
    _define("1.14", "bwt_all", "up", "Change since learning, mean over all pairs of an old task and a later task end."),
    _define("1.14", "rem", "up", "Remembering: 1 minus the size of a negative bwt_all."),
    _define("1.14", "bwt_plus", "up", "Positive backward transfer: bwt_all where positive, else 0."),
    _define("1.15", "forgetting_clipped", "down", "Best accuracy ever minus the final one, mean over old tasks; >= 0."),
    _define("1.16", "forgetting_step", "down", "Accuracy lost between task ends, mean over old tasks, then over ends."),
    _define("1.17", "acc_per_class", "up", "Share of each seen class's images answered right; mean over classes."),
)
"""All matrix metrics in the order of their numbers."""

BY_KEY: dict[str, Definition] = {definition.key: definition for definition in DEFINITIONS}
