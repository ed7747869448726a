"""The numbers of a verification: those of the model before forgetting, after it and of the reference side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_platform.metrics import attacks, forgetting
from cl_platform.metrics.divergence import js_common
from cl_platform.metrics.forgetting import Accuracies, accuracy, gap
from cl_platform.metrics.measured import Measured, combined, undefined
from cl_platform.random_streams import stream
from cl_platform.unlearning.models import Answers, TaskAnswers

SCORES = ("loss", "entropy", "msp")
ITSELF = "it is the reference itself"


@dataclass
class Sides:
    """One metric of the three models.

    Attributes:
        o: before forgetting.
        u: after it.
        r: never learnt.
    """

    o: Measured
    u: Measured
    r: Measured

    @property
    def gap(self) -> Measured:
        """u minus r."""
        return gap(self.u, self.r)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, the gap beside the three."""
        return {name: getattr(self, name).to_json() for name in ("o", "u", "r", "gap")}


@dataclass
class Models:
    """Answers of the models; ``None``, with a reason, where there is no such model.

    Attributes:
        u: of the model that forgot.
        o: of the model before.
        r: of the model that never learnt the task.
        no_o: why there is no ``o``.
        no_r: why there is no ``r``.
        seed: of the run.
        recorded: accuracies of the model before that the run has kept, by name, where the model itself is gone.
    """

    u: Answers
    o: Answers | None = None
    r: Answers | None = None
    no_o: str = forgetting.NO_ORIGINAL
    no_r: str = forgetting.NO_REFERENCE
    seed: int = 0
    recorded: Mapping[str, Measured] = field(default_factory=dict)

    def sides(self, of: Callable[[Answers], Measured]) -> Sides:
        """One metric of each model."""
        return Sides(
            o=undefined(self.no_o) if self.o is None else of(self.o),
            u=of(self.u),
            r=undefined(self.no_r) if self.r is None else of(self.r),
        )

    def against(self, of: Callable[[Answers, Answers], Measured]) -> Sides:
        """One metric of each model against the reference."""
        missing = None if self.r is not None else undefined(self.no_r)
        original = undefined(self.no_o) if self.o is None else None
        return Sides(
            o=original or missing or of(self.o, self.r),  # type: ignore[arg-type]
            u=missing or of(self.u, self.r),  # type: ignore[arg-type]
            r=missing or undefined(ITSELF),
        )


def figures(models: Models) -> dict[str, Sides]:
    """All metrics that need nothing but answers, by key; those of a prediction space carry its suffix."""
    found: dict[str, Sides] = {}
    for space in models.u.spaces:
        for name, (split, forgotten) in SETS.items():
            found[f"{name}_{space}"] = models.sides(lambda m, s=space, w=(split, forgotten): _accuracy(m, s, *w))  # type: ignore[misc]
        found[f"retain_acc_test_tasks_{space}"] = models.sides(lambda m, s=space: _macro(m, s))  # type: ignore[misc]
        found[f"test_acc_{space}"] = found[f"retain_acc_test_{space}"]
    primary = models.u.spaces[0]
    for name, value in models.recorded.items():
        if found[f"{name}_{primary}"].o.value is None:
            found[f"{name}_{primary}"].o = value
    found["mia_efficacy"] = models.sides(lambda m: _efficacy(m, models.seed))
    found |= _scores(found, primary)
    found["forget_probe_acc"] = _probe(models)
    found["js_forget"] = models.against(lambda m, r: _divergence([m.forgotten("test")], [r.forgotten("test")]))
    found["js_retain"] = models.against(lambda m, r: _divergence(m.kept("test"), r.kept("test")))
    found |= _attacks(models)
    found["ag"] = _gain(models, primary)
    found["dd"] = models.against(lambda m, r: forgetting.dd(m.features["test"], r.features["test"]))
    return found


SETS = {
    "forget_acc_train": ("train", True),
    "forget_acc_test": ("test", True),
    "retain_acc_train": ("train", False),
    "retain_acc_test": ("test", False),
}
"""Accuracy -> split, and whether it is of the forgotten task."""


def _accuracy(model: Answers, space: str, split: str, forgotten: bool) -> Measured:
    parts = [model.forgotten(split)] if forgotten else model.kept(split)
    right, total = sum(p.correct[space] for p in parts), sum(len(p.labels) for p in parts)
    return accuracy(right, total, in_space=bool(right) or any(p.answerable[space] for p in parts))


def _macro(model: Answers, space: str) -> Measured:
    return forgetting.mean([accuracy(p.correct[space], len(p.labels)) for p in model.kept("test")])


def _gain(models: Models, space: str) -> Sides:
    """u and r against the model before forgetting, which stands for the run without it."""

    def of(model: Answers) -> Measured:
        if models.o is None:
            return undefined(models.no_o)
        pairs = [(model.by["test"], models.o.by["test"])]
        kept = sorted(task_id for task_id in model.by["test"] if task_id != model.target)
        each = [[accuracy(s[t].correct[space], len(s[t].labels)) for t in kept] for pair in pairs for s in pair]
        return forgetting.ag(*each)

    return Sides(
        undefined("it is the run without forgetting itself" if models.o else models.no_o),
        of(models.u),
        undefined(models.no_r) if models.r is None else of(models.r),
    )


def _scores(found: Mapping[str, Sides], space: str) -> dict[str, Sides]:
    """Scores over accuracies, in the primary space."""
    names = [f"{name}_{space}" for name in SETS] + ["mia_efficacy"]
    o, u, r = (Accuracies(*(getattr(found[name], side) for name in names)) for side in ("o", "u", "r"))
    itself = undefined(ITSELF)

    def each(of: Callable[[Accuracies], Measured]) -> Sides:
        return Sides(of(o), of(u), of(r))

    return {
        "ua": each(forgetting.ua),
        "ra": each(forgetting.ra),
        "ta": each(forgetting.ta),
        "avg_gap": Sides(forgetting.avg_gap(o, r), forgetting.avg_gap(u, r), itself),
        "aus": each(lambda model: forgetting.aus(o, model)),
        "tow": Sides(forgetting.tow(o, r), forgetting.tow(u, r), forgetting.tow(r, r)),
        "tow_mia": Sides(forgetting.tow_mia(o, r), forgetting.tow_mia(u, r), forgetting.tow_mia(r, r)),
    }


def _probe(models: Models) -> Sides:
    def of(model: Answers) -> Measured:
        labels = [model.forgotten(split).labels for split in ("train", "test")]
        value = forgetting.forget_probe_acc(model.features["train"], labels[0], model.features["test"], labels[1])
        if value.value is not None and model.shared_trunk:
            return Measured(value.value, by_construction=True)
        return value

    return models.sides(of)


def _divergence(one: list[TaskAnswers], other: list[TaskAnswers]) -> Measured:
    """Mean over all images of all tasks; every task with its own candidates."""
    each = []
    for a, b in zip(one, other, strict=True):
        assert a.logits is not None
        assert b.logits is not None
        each.append((js_common(a.logits, a.classes, b.logits, b.classes), len(a.labels)))
    if not each:
        return undefined(forgetting.NO_IMAGES)
    total = sum(count for _, count in each)
    return combined(
        lambda *values: sum(v * n for v, (_, n) in zip(values, each, strict=True)) / total, *(v for v, _ in each)
    )


# -- attacks --------------------------------------------------------------------------------------------------------


def _efficacy(model: Answers, seed: int) -> Measured:
    """Equally many members and non-members: a keyed sample of the larger side."""
    train, test = [p.likelihood for p in model.kept("train")], [p.likelihood for p in model.kept("test")]
    if any(part is None for part in (*train, *test)):
        return attacks.mia_efficacy(None, None, None)
    if not train or not test:
        return undefined(forgetting.NO_IMAGES)
    sides = [torch.cat(part) for part in (train, test)]  # type: ignore[arg-type]
    count = min(map(len, sides))
    chosen = [
        side[torch.randperm(len(side), generator=stream(seed, model.target, "attack", number))[:count]]
        for number, side in enumerate(sides)
    ]
    return attacks.mia_efficacy(chosen[0], chosen[1], model.forgotten("train").likelihood)


def score_of(answers: TaskAnswers, score: str) -> Tensor | None:
    """Membership scores (n,) of a task's images; ``None`` where the score needs labels that are no answers."""
    assert answers.logits is not None
    if not answers.classes:
        return None
    if score == "loss":
        return attacks.loss_scores(answers.logits, answers.classes, answers.labels)
    return (attacks.entropy_scores if score == "entropy" else attacks.msp_scores)(answers.logits)


def leading_score(models: Models) -> str:
    """The score that the report leads with: the loss where u and r can answer the labels, else the entropy."""
    both = [model for model in (models.u, models.r) if model is not None]
    return "loss" if all(score_of(m.forgotten("train"), "loss") is not None for m in both) else "entropy"


def _attacks(models: Models) -> dict[str, Sides]:
    lead, found = leading_score(models), {}

    def pair(model: Answers, score: str) -> tuple[Tensor, Tensor] | None:
        sides = [score_of(model.forgotten(split), score) for split in ("train", "test")]
        return None if sides[0] is None or sides[1] is None else (sides[0], sides[1])

    def auc(model: Answers, score: str) -> Measured:
        scores = pair(model, score)
        if scores is None:
            return undefined(attacks.NOT_AN_ANSWER)
        return attacks.mia_auc(*scores, stream(models.seed, model.target, "attack", 2))

    def led(of: Callable[[Tensor, Tensor], Measured]) -> Sides:
        def one(model: Answers) -> Measured:
            scores = pair(model, lead)
            return undefined(attacks.NOT_AN_ANSWER) if scores is None else of(*scores)

        return models.sides(one)

    for score in SCORES:
        found[f"mia_auc_{score}"] = models.sides(lambda m, s=score: auc(m, s))  # type: ignore[misc]
    found["mia_adv"] = led(attacks.mia_adv)
    found["mia_tpr_at_1fpr"] = led(attacks.mia_tpr_at_1fpr)
    return found
