"""How a model that forgot compares with one that never learnt: accuracies, scores over them, relearning (4.3).

Models are called o (before forgetting), u (after it) and r (never learnt). Sets are the training and test images of
the forgotten task, and those of the kept tasks. All values in float64; the aim of u is r, not zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_platform.metrics.measured import Measured, combined, undefined

NO_IMAGES = "there are no such images"
NO_REFERENCE = "needs a model that never learnt the task"
NO_ORIGINAL = "the model before forgetting is gone"
TARGET = 0.9
"""Relearnt: this share of the accuracy before forgetting."""
RELEARNING_STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Steps after which relearning is looked at."""
_TOLERANCE = 1e-12


def accuracy(correct: int, total: int, in_space: bool = True) -> Measured:
    """4.3.1, [0, 1]: share of images answered right, with its standard error.

    The error is that of ``(correct + 1) / (total + 2)``: a share of 0 or 1 among few images is not certain.

    Args:
        correct: images answered right.
        total: images.
        in_space: false where the model cannot answer the images' classes at all; the value, 0, is then no evidence.

    Raises:
        ValueError: counts that contradict each other.
    """
    if not 0 <= correct <= total or (correct and not in_space):
        raise ValueError(f"{correct} of {total} images right")
    if total == 0:
        return undefined(NO_IMAGES)
    if not in_space:
        return Measured(0.0, by_construction=True)
    share = (correct + 1) / (total + 2)
    return Measured(correct / total, error=math.sqrt(share * (1 - share) / total))


def gap(u: Measured, r: Measured) -> Measured:
    """4.3.1, [-1, 1]: value of u minus value of r; ideal 0."""
    return combined(lambda one, other: one - other, u, r)


def mean(parts: Sequence[Measured]) -> Measured:
    """Plain mean, such as of accuracies over tasks; without a value if one part has none."""
    if not parts:
        return undefined("there is nothing to average")
    return combined(lambda *values: math.fsum(values) / len(values), *parts)


@dataclass(frozen=True)
class Accuracies:
    """What the scores below are computed from, of one model.

    Attributes:
        forget_train: accuracy on the forgotten task's training images.
        forget_test: on its test images.
        retain_train: on the kept tasks' training images.
        retain_test: on their test images.
        mia_efficacy: share of the forgotten training images that an attack takes for unseen ones.
    """

    forget_train: Measured
    forget_test: Measured
    retain_train: Measured
    retain_test: Measured
    mia_efficacy: Measured


def ua(model: Accuracies) -> Measured:
    """4.3.2, [0, 1]: unlearning accuracy, 1 minus the accuracy on the forgotten training images (Fan et al. 2024)."""
    return combined(lambda value: 1.0 - value, model.forget_train)


def ra(model: Accuracies) -> Measured:
    """4.3.2, [0, 1]: accuracy on the kept training images."""
    return model.retain_train


def ta(model: Accuracies) -> Measured:
    """4.3.2, [0, 1]: accuracy on the kept tasks' test images."""
    return model.retain_test


def avg_gap(u: Accuracies, r: Accuracies) -> Measured:
    """4.3.2, [0, 1]: mean size of u minus r over ``ua``, ``ra``, ``ta`` and ``mia_efficacy``; ideal 0."""
    gaps = [gap(of(u), of(r)) for of in (ua, ra, ta)] + [gap(u.mia_efficacy, r.mia_efficacy)]
    return mean([combined(abs, part) for part in gaps])


def aus(o: Accuracies, model: Accuracies) -> Measured:
    """4.3.4, [0, 2]: adaptive unlearning score for whole classes (Cotogni et al. 2023, DUCK, its released code).

    ``(1 - (A_o - A)) / (1 + forget_test)`` with A the kept tasks' test accuracy. 1: nothing lost and all forgotten.
    The loss keeps its sign, so that a gain in kept accuracy raises the score above 1.
    """
    return combined(
        lambda before, after, left: (1.0 - (before - after)) / (1.0 + left),
        o.retain_test, model.retain_test, model.forget_test,
    )  # fmt: skip


def aus_subset(o_test: Measured, test: Measured, forget_train: Measured) -> Measured:
    """4.3.4, [0, 2]: the same where only some images of a class are forgotten: their accuracy should be that of tests.

    Args:
        o_test: accuracy of o on all test images.
        test: accuracy of the model on them.
        forget_train: accuracy of the model on the forgotten images.
    """
    return combined(
        lambda before, after, left: (1.0 - (before - after)) / (1.0 + abs(after - left)), o_test, test, forget_train
    )


def tow(u: Accuracies, r: Accuracies) -> Measured:
    """4.3.5, [0, 1]: tug of war, product of 1 minus the size of each gap (Zhao et al. 2024, RUM); 1: like r.

    The gaps are those of the forgotten and the kept training images and of the kept test images.
    """
    return _tug(gap(u.forget_train, r.forget_train), u, r)


def tow_mia(u: Accuracies, r: Accuracies) -> Measured:
    """4.3.5, [0, 1]: tug of war with ``mia_efficacy`` in place of the forgotten training images' accuracy."""
    return _tug(gap(u.mia_efficacy, r.mia_efficacy), u, r)


def _tug(first: Measured, u: Accuracies, r: Accuracies) -> Measured:
    others = gap(u.retain_train, r.retain_train), gap(u.retain_test, r.retain_test)
    return combined(lambda *gaps: math.prod(1.0 - abs(value) for value in gaps), first, *others)


def forget_probe_acc(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> Measured:
    """4.3.3, [0, 1]: test accuracy of logistic regression on the forgotten task's standardised features.

    L2 penalty with C = 1, 200 iterations, among the task's own classes: what the features still tell apart when the
    head's rows are gone.

    Args:
        train: features (n, D) of its training images.
        train_labels: their class ids (n,).
        test: features (m, D) of its test images.
        test_labels: their class ids (m,).
    """
    if not len(train) or not len(test):
        return undefined(NO_IMAGES)
    classes, counts = train_labels.unique(return_counts=True)
    if len(classes) < 2:
        return undefined("the task has one class only")
    if int(counts.min()) < 2:
        return undefined("a class has fewer than 2 training images")
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, z = train.double().cpu(), test.double().cpu()
    centre, spread = x.mean(dim=0), x.std(dim=0, unbiased=False)
    spread = torch.where(spread > 0, spread, 1.0)
    probe = LogisticRegression(C=1.0, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of iterations is part of the definition
        probe.fit(((x - centre) / spread).numpy(), train_labels.cpu().numpy())
    answers = torch.from_numpy(probe.predict(((z - centre) / spread).numpy()))
    return Measured(int((answers == test_labels.cpu()).sum()) / len(test_labels))


def relearn_target(o_forget_test: Measured) -> Measured:
    """The accuracy at which the task counts as relearnt: 0.9 times that before forgetting, if there was any."""
    if o_forget_test.value == 0:
        return undefined("the model before forgetting answered none of the task's images right")
    return combined(lambda value: TARGET * value, o_forget_test)


def relearn_steps(curve: Sequence[tuple[int, float]], target: float) -> Measured:
    """4.3.9: first evaluated step at which the forgotten task's test accuracy has reached ``target``.

    Args:
        curve: (step, accuracy), ascending steps.
        target: see :func:`relearn_target`; compared with a tolerance of 1e-12.

    Returns:
        Without a value, ``censored_at`` the last step, where it was not reached.
    """
    if not curve:
        return undefined("nothing was relearnt")
    for step, value in curve:
        if value >= target - _TOLERANCE:
            return Measured(float(step))
    last = curve[-1][0]
    return Measured(reason=f"not relearnt in {last} steps", censored_at=last)


def relearn_ratio(u: Measured, r: Measured) -> Measured:
    """4.3.9, from 0: relearning steps of u over those of r; ideal 1, below it something had remained."""
    if r.value == 0:
        return undefined("the model that never learnt the task is there already")
    return combined(lambda one, other: one / other, u, r)


def relapse(u: Sequence[Measured], r: Sequence[Measured]) -> Measured:
    """4.3.10, [-1, 1]: largest rise of the probe accuracy of u over that of r while later tasks are learnt; ideal 0.

    Args:
        u: ``forget_probe_acc`` right after forgetting and after each later task.
        r: the same of the model that never learnt the task.
    """
    if len(u) != len(r):
        raise ValueError(f"{len(u)} and {len(r)} evaluations")
    if len(u) < 2:
        return undefined("no task was learnt after the forgetting")
    return combined(
        lambda *gaps: max(value - gaps[0] for value in gaps[1:]),
        *(gap(one, other) for one, other in zip(u, r, strict=True)),
    )


def ag(u: Sequence[Measured], full: Sequence[Measured]) -> Measured:
    """4.3.11, [-1, 1]: mean over kept tasks of the accuracy of u minus that of a run without forgetting (CLArena)."""
    if len(u) != len(full):
        raise ValueError(f"{len(u)} and {len(full)} tasks")
    return mean([gap(one, other) for one, other in zip(u, full, strict=True)])


def dd(u: Tensor, r: Tensor) -> Measured:
    """4.3.11, [0, 2]: mean cosine distance of the features of u and r, a mean over images (CLArena).

    Args:
        u: features (n, D) of the forgotten task's test images.
        r: those of r for the same images.

    Raises:
        ValueError: other shapes.
    """
    if u.shape != r.shape:
        raise ValueError(f"features {tuple(u.shape)} and {tuple(r.shape)}")
    if not len(u):
        return undefined(NO_IMAGES)
    one, other = u.double().cpu(), r.double().cpu()
    norms = one.norm(dim=1) * other.norm(dim=1)
    if not bool((norms > 0).all()):
        return undefined("a feature vector is zero, so it has no direction")
    cosines = ((one * other).sum(dim=1) / norms).clamp(-1.0, 1.0)
    return Measured(float((1.0 - cosines).mean()))
