"""Shadow models: what an image's answers look like in models that never learnt it, or learnt and forgot it (4.3.8)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_platform.errors import UserError
from cl_platform.metrics import attacks
from cl_platform.metrics.divergence import js_groups, over_classes
from cl_platform.metrics.measured import Measured, undefined
from cl_platform.run_folder import read_config
from cl_platform.unlearning.figures import Models, Sides
from cl_platform.unlearning.models import Build, TaskAnswers, answers_to, checkpoint_after, restored
from cl_platform.unlearning.reference import Maker, price_of, reference_config

if TYPE_CHECKING:
    from cl_platform.scenarios import Task


@dataclass(frozen=True)
class Shadows:
    """Where shadow models come from.

    Attributes:
        maker: makes references; those of other seeds hold kept tasks only and are cached.
        build: a learner that has learnt nothing, and its stream.
        forget: lets a run folder forget a task by a method.
        lira: ``offline`` or ``online``.
        say: prints a line.
    """

    maker: Maker
    build: Build
    forget: Callable[[Path, int, str], None] | None
    lira: str
    say: Callable[[str], None]


@dataclass(frozen=True)
class Shadow:
    """What one shadow model answers to the forgotten task's images, by split."""

    train: TaskAnswers
    test: TaskAnswers


def shadow_figures(
    shadows: Shadows, models: Models, certificate: Mapping[str, Any], task: Task, learnt: Sequence[int], count: int
) -> dict[str, Sides]:
    """Metrics that need further models; their price is said before it is paid.

    Args:
        shadows: where they come from.
        models: answers of the models that are compared.
        certificate: of the request.
        task: the forgotten one.
        learnt: ids of the kept tasks in the order in which the run learnt them.
        count: number of shadow models.
    """
    maker = shadows.maker
    inside_count = count // 2 if shadows.lira == "online" else 0
    price = price_of(maker.run, maker.forgotten).times(count - inside_count)
    shadows.say(f"shadows: {count - inside_count} references of other seeds, {price} for those not in the cache")
    if inside_count:
        _refuse_online(shadows, maker.config)
        full = price_of(maker.run, [t for t in maker.forgotten if t != task.task_id]).times(inside_count)
        shadows.say(f"shadows: {inside_count} runs that learn and forget task {task.task_id}, {full}; then deleted")
    first = int(maker.config.get("seed") or 0) + 1
    out = [_outside(shadows, task, learnt, first + number) for number in range(count - inside_count)]
    method = str(certificate["method"]["used"])
    others = first + len(out)  # seeds of their own: the same ones would, after exact forgetting, give the same models
    inside = [_inside(shadows, task, learnt, others + number, method) for number in range(inside_count)]
    return {**_lira(models, out, inside), **_groups(models, out, inside)}


def _refuse_online(shadows: Shadows, config: Mapping[str, Any]) -> None:
    if shadows.forget is None or (config.get("unlearning") or {}).get("sequence") is not None:
        raise UserError(
            "--lira", "online", "needs models that learn the task and forget it by the same command",
            "Use --lira offline",
        )  # fmt: skip


def _outside(shadows: Shadows, task: Task, learnt: Sequence[int], seed: int) -> Shadow:
    reference = shadows.maker.obtain(seed)
    return _asked(shadows, reference.folder, task, learnt)


def _inside(shadows: Shadows, task: Task, learnt: Sequence[int], seed: int, method: str) -> Shadow:
    """Trained, made to forget, asked and deleted: it has held the task."""
    assert shadows.forget is not None
    maker = shadows.maker
    config = reference_config(maker.config, [t for t in maker.forgotten if t != task.task_id], seed)
    with tempfile.TemporaryDirectory(prefix="shadow_") as place:
        folder = Path(place) / "run"
        maker.train({**config, "run_dir": str(folder)}, folder)
        shadows.forget(folder, task.task_id, method)
        return _asked(shadows, folder, task, learnt)


def _asked(shadows: Shadows, folder: Path, task: Task, learnt: Sequence[int]) -> Shadow:
    checkpoint = checkpoint_after(folder, learnt, but=(task.task_id,))
    if checkpoint is None:
        raise UserError(
            "--shadows", "", f"a shadow model has no state after exactly the tasks {list(learnt)}",
            "Let the run finish its stream first",
        )  # fmt: skip
    learner = restored(read_config(folder), checkpoint, shadows.build)
    with learner.answering():
        return Shadow(answers_to(learner, task, "train"), answers_to(learner, task, "test"))


# -- figures --------------------------------------------------------------------------------------------------------


def _lira(models: Models, out: Sequence[Shadow], inside: Sequence[Shadow]) -> dict[str, Sides]:
    """AUC and hits of the attack: by the label where all models can answer it, else by the likeliest common class."""
    sides = {"o": models.o, "u": models.u, "r": models.r}
    asked = {
        name: None if model is None else Shadow(model.forgotten("train"), model.forgotten("test"))
        for name, model in sides.items()
    }
    everyone = [shadow for shadow in (asked["u"], asked["r"], *out, *inside) if shadow is not None]
    common = sorted(set.intersection(*(set(shadow.train.classes) for shadow in everyone)))
    labelled = all(_phi(shadow, None) is not None for shadow in everyone)
    name = "mia_lira" if labelled else "mia_lira_msp"
    keys = (f"{name}_auc", f"{name}_tpr_at_1fpr")
    if not labelled and len(common) < 2:
        missing = undefined("fewer than 2 classes that all models can answer")
        return {key: Sides(missing, missing, missing) for key in keys}
    chosen = None if labelled else common
    models_out = torch.stack([_known(shadow, chosen) for shadow in out])
    models_in = torch.stack([_known(shadow, chosen) for shadow in inside]) if inside else None
    found = {}
    for side, shadow in asked.items():
        own = None if shadow is None else _phi(shadow, chosen)
        if own is None:
            missing = undefined(models.no_o if side == "o" else attacks.NOT_AN_ANSWER)
            found[side] = (missing, missing)
            continue
        if models_in is None:
            scores = attacks.lira_deviation(own, models_out)
        else:
            scores = attacks.lira_online(own, models_out, models_in)
        assert shadow is not None
        members, others = scores.split([len(shadow.train.labels), len(shadow.test.labels)])
        found[side] = (attacks.mia_auc(members, others), attacks.mia_tpr_at_1fpr(members, others))
    made = {key: Sides(**{side: found[side][place] for side in sides}) for place, key in enumerate(keys)}
    made["mia_eps_lower"] = _epsilon(models_out, models_in, len(everyone[0].train.labels))
    return made


def _epsilon(out: Tensor, inside: Tensor | None, members: int) -> Sides:
    """Of the method, over models of many seeds; the three models of one run do not have it each."""
    nothing = undefined("it is a figure of the method, not of one model")
    if inside is None:
        return Sides(nothing, undefined("needs models that learnt and forgot the task: --lira online"), nothing)
    return Sides(nothing, attacks.mia_eps_lower(inside[:, :members], out[:, :members]), nothing)


def _phi(shadow: Shadow, common: Sequence[int] | None) -> Tensor | None:
    """(members + others,); ``common`` is ``None`` for the statistic of the true label."""
    parts = []
    for answers in (shadow.train, shadow.test):
        assert answers.logits is not None
        if common is None:
            found = attacks.phi(answers.logits, answers.classes, answers.labels)
        elif set(common) <= set(answers.classes):
            found = attacks.phi_msp(answers.logits, answers.classes, common)
        else:
            found = None
        if found is None:
            return None
        parts.append(found)
    return torch.cat(parts)


def _known(shadow: Shadow, common: Sequence[int] | None) -> Tensor:
    found = _phi(shadow, common)
    assert found is not None
    return found


def _groups(models: Models, out: Sequence[Shadow], inside: Sequence[Shadow]) -> dict[str, Sides]:
    """Whether u lies among references of several seeds; o and r have no such figure."""
    nothing = undefined("it is a figure of the model that forgot")
    references = [*([models.r.forgotten("test")] if models.r is not None else []), *(shadow.test for shadow in out)]
    unlearned = [models.u.forgotten("test"), *(shadow.test for shadow in inside)]
    common = sorted(set.intersection(*(set(answers.classes) for answers in (*references, *unlearned))))
    if len(common) < 2:
        missing = undefined("fewer than 2 classes that all models can answer")
        return {key: Sides(nothing, missing, nothing) for key in ("js_in", "js_across", "js_rel", "js_within")}

    def answers_of(answers: TaskAnswers) -> list[Tensor]:
        assert answers.logits is not None
        return [over_classes(answers.logits, answers.classes, common)]

    groups = js_groups([answers_of(a) for a in references], [answers_of(a) for a in unlearned])
    values: dict[str, Measured] = {
        "js_in": groups.js_in, "js_across": groups.js_across, "js_rel": groups.js_rel, "js_within": groups.js_within,
    }  # fmt: skip
    return {key: Sides(nothing, value, nothing) for key, value in values.items()}
