"""What every metric of matrices and of forgetting is called and means; the number is published beside the value."""

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
        better: which direction is good; ``reference``: neither, the aim is the value of a model that never learnt.
    """

    id: str
    key: str
    text: str
    unit: str
    better: Literal["up", "down", "reference"]


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


def _of_forgetting(number: str, key: str, better: Literal["up", "down", "reference"], text: str) -> Definition:
    return Definition(f"4.3.{number}", key, text, _UNITS.get(key, "fraction"), better)


_UNITS = {
    **dict.fromkeys(("js_forget", "js_retain", "js_in", "js_across", "mia_eps_lower"), "nats"),
    **dict.fromkeys(("js_rel", "relearn_ratio", "aus"), "ratio"),
    "rte": "seconds",
    "relearn_steps": "updates",
    "dd": "distance",
}


FORGETTING_DEFINITIONS: tuple[Definition, ...] = (
    _of_forgetting("1", "forget_acc_train", "reference", "Accuracy on the forgotten task's training images."),
    _of_forgetting("1", "forget_acc_test", "reference", "Accuracy on the forgotten task's test images."),
    _of_forgetting("1", "retain_acc_train", "reference", "Accuracy on the kept tasks' training images."),
    _of_forgetting("1", "retain_acc_test", "reference", "Accuracy on the kept tasks' test images."),
    _of_forgetting("1", "retain_acc_test_tasks", "reference", "Accuracy on the kept test images, mean over tasks."),
    _of_forgetting("1", "test_acc", "reference", "Accuracy on all test images of the tasks that are kept."),
    _of_forgetting("2", "ua", "reference", "Unlearning accuracy: 1 minus accuracy on the forgotten training images."),
    _of_forgetting("2", "ra", "reference", "Retained accuracy: that on the kept training images."),
    _of_forgetting("2", "ta", "reference", "Test accuracy: that on the kept tasks' test images."),
    _of_forgetting("2", "mia_efficacy", "reference", "Forgotten training images that an attack takes for unseen ones."),
    _of_forgetting("2", "avg_gap", "down", "Mean distance to the reference in ua, ra, ta and mia_efficacy."),
    _of_forgetting("2", "rte", "down", "Seconds that the forgetting took."),
    _of_forgetting("3", "forget_probe_acc", "reference", "Accuracy of a linear probe on the forgotten images."),
    _of_forgetting("4", "aus", "up", "Adaptive unlearning score: kept accuracy against what is left of the task."),
    _of_forgetting("5", "tow", "up", "Tug of war: closeness to the reference on forgotten, kept and test images."),
    _of_forgetting("5", "tow_mia", "up", "Tug of war with mia_efficacy in place of the forgotten accuracy."),
    _of_forgetting("6", "js_forget", "down", "Divergence of answers from the reference's on forgotten test images."),
    _of_forgetting("6", "js_retain", "down", "Divergence of answers from the reference's on kept test images."),
    _of_forgetting("7", "js_in", "reference", "Divergence between references of different seeds."),
    _of_forgetting("7", "js_across", "reference", "Divergence between unlearnt models and references."),
    _of_forgetting("7", "js_rel", "down", "Distance of js_across from js_in, relative to js_in."),
    _of_forgetting("7", "js_within", "up", "Pairs across that are no farther apart than the farthest references."),
    _of_forgetting("8", "mia_auc_loss", "reference", "Members ranked above non-members by their loss."),
    _of_forgetting("8", "mia_auc_entropy", "reference", "Members ranked above non-members by the entropy, no label."),
    _of_forgetting("8", "mia_auc_msp", "reference", "Members ranked above non-members by the top probability."),
    _of_forgetting("8", "mia_adv", "reference", "Largest difference of true and false positive rate, in-sample."),
    _of_forgetting("8", "mia_tpr_at_1fpr", "reference", "Members found at a false positive rate of 1 %."),
    _of_forgetting("8", "mia_lira_auc", "reference", "Members ranked above non-members with the help of shadows."),
    _of_forgetting("8", "mia_lira_tpr_at_1fpr", "reference", "As mia_tpr_at_1fpr, with the help of shadow models."),
    _of_forgetting("8", "mia_lira_msp_auc", "reference", "As mia_lira_auc, by the likeliest common class, no label."),
    _of_forgetting("8", "mia_lira_msp_tpr_at_1fpr", "reference", "As mia_lira_tpr_at_1fpr, by the likeliest class."),
    _of_forgetting("8", "mia_eps_lower", "down", "Lower bound of epsilon, joint confidence 90 %; 0 proves nothing."),
    _of_forgetting("9", "relearn_steps", "reference", "Updates until 0.9 of the accuracy before forgetting is back."),
    _of_forgetting("9", "relearn_ratio", "reference", "Relearning steps over the reference's; below 1: remains."),
    _of_forgetting("10", "relapse", "down", "Rise of the probe over the reference's while later tasks are learnt."),
    _of_forgetting("11", "ag", "up", "Kept tasks' accuracy minus that of a run without forgetting, mean over tasks."),
    _of_forgetting("11", "dd", "down", "Mean cosine distance of features from the reference's on forgotten images."),
)
"""What verification of a forgotten task says, in the order of the numbers."""

FORGETTING_BY_KEY: dict[str, Definition] = {definition.key: definition for definition in FORGETTING_DEFINITIONS}
