"""Metrics 5.4 of the features below the head: how well classes can still be told apart, how far features moved.

All sums are in float64; a feature vector of zeros stays zero when normalised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_platform.metrics.confusion import class_ids
from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.matrix import Outcome, Result, Undefined

REPRESENTATION_DEFINITIONS: tuple[Definition, ...] = (
    Definition("5.4", "probe_acc", "Accuracy of a ridge probe on the features.", "fraction", "up"),
    Definition("5.4", "nme_acc", "Accuracy of the nearest mean of normalised features.", "fraction", "up"),
    Definition("5.4", "cka_drift", "1 minus the linear CKA of features then and now.", "fraction", "down"),
    Definition("5.4", "cka_drift_debiased", "As cka_drift, with unbiased HSIC: for few images.", "fraction", "down"),
)

PROBE_IMAGES_PER_CLASS = 50
"""Training images of each class that a probe sees at most."""
RIDGE = 1e-3

_ROUNDING = 1e-12


def probe_scores(train: Tensor, train_labels: Tensor, features: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Closed-form ridge regression of the one-hot labels on normalised features.

    Args:
        train: training features (n, d).
        train_labels: their class ids (n,).
        features: features to score (m, d).
        ridge: weight of the penalty per training image, above 0.

    Returns:
        Scores (m, C) in float64, and the class id of each column (C,), ascending.

    Raises:
        ValueError: shapes that do not fit, no training image, features that are not finite, or ``ridge`` not above 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge {ridge} is not above 0")
    x, classes, members, z = _prepared(train, train_labels, features)
    y = torch.nn.functional.one_hot(members, len(classes)).double()  # (n, C)
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    xc, yc = x - x_mean, y - y_mean
    penalty = ridge * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(xc.T @ xc + penalty, xc.T @ yc)  # (d, C)
    return (z - x_mean) @ weights + y_mean, classes


def nme_distances(train: Tensor, train_labels: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances to the normalised class means of normalised features (iCaRL, Rebuffi et al. 2017).

    Args:
        train: training features (n, d).
        train_labels: their class ids (n,).
        features: features to compare (m, d).

    Returns:
        Distances (m, C) in float64, and the class id of each column (C,), ascending.

    Raises:
        ValueError: shapes that do not fit, no training image, or features that are not finite.
    """
    x, classes, members, z = _prepared(train, train_labels, features)
    means = _normalised(torch.stack([x[members == c].mean(dim=0) for c in range(len(classes))]))  # (C, d)
    # a difference per class, not a product of matrices: that would blur ties
    return torch.stack([(z - mean).square().sum(dim=1) for mean in means], dim=1), classes


def probe_acc(train: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, ridge: float = RIDGE) -> Outcome:
    """5.4, [0, 1]: accuracy of :func:`probe_scores`; images of classes that the probe never saw are wrong.

    Raises:
        ValueError: see :func:`probe_scores`.
    """
    if not len(train) or not len(features):
        return Undefined("empty")
    scores, classes = probe_scores(train, train_labels, features, ridge)
    return _accuracy(classes[scores.argmax(dim=1)], labels)


def nme_acc(train: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> Outcome:
    """5.4, [0, 1]: accuracy of the nearest class mean, ties to the lowest class.

    Raises:
        ValueError: see :func:`nme_distances`.
    """
    if not len(train) or not len(features):
        return Undefined("empty")
    distances, classes = nme_distances(train, train_labels, features)
    return _accuracy(classes[distances.argmin(dim=1)], labels)


def cka(before: Tensor, now: Tensor) -> Outcome:
    """Linear CKA of two sets of features of the same images, [0, 1] (Kornblith et al. 2019).

    Args:
        before: features (n, d).
        now: features (n, e) of the same images in the same order.

    Raises:
        ValueError: another number of images, or features that are not finite.
    """
    x, y = _pair(before, now)
    if len(x) < 2:
        return Undefined("too_few_samples")
    x, y = _centred(x), _centred(y)
    k, l_ = x @ x.T, y @ y.T
    norms = float(k.norm()), float(l_.norm())
    if min(norms) == 0.0:
        return Undefined("zero_variance")
    # <K, L> = |X'Y|^2 and |K| = |X'X| in the Frobenius norm
    return Result(min(1.0, float((k * l_).sum()) / (norms[0] * norms[1])))  # rounding alone can exceed 1


def cka_debiased(before: Tensor, now: Tensor) -> Outcome:
    """CKA from the unbiased estimate of HSIC (Song et al. 2012), at most 1, slightly negative for unrelated features.

    Prefer it to :func:`cka` below ten images per feature dimension.

    Args:
        before: features (n, d).
        now: features (n, e) of the same images in the same order.

    Raises:
        ValueError: another number of images, or features that are not finite.
    """
    x, y = _pair(before, now)
    if len(x) < 4:
        return Undefined("too_few_samples")
    x, y = _centred(x), _centred(y)  # off the diagonal, a shift adds only what the estimate takes out again
    k, k_scale = _u_centred(x @ x.T)
    l_, l_scale = _u_centred(y @ y.T)
    norms = float(k.norm()), float(l_.norm())
    if norms[0] <= _ROUNDING * k_scale or norms[1] <= _ROUNDING * l_scale:
        return Undefined("zero_variance")
    return Result(float((k * l_).sum()) / (norms[0] * norms[1]))


def cka_drift(before: Tensor, now: Tensor) -> Outcome:
    """5.4, [0, 1]: 1 minus :func:`cka`."""
    return _one_minus(cka(before, now))


def cka_drift_debiased(before: Tensor, now: Tensor) -> Outcome:
    """5.4, from 0, slightly above 1 for unrelated features: 1 minus :func:`cka_debiased`."""
    return _one_minus(cka_debiased(before, now))


def hsic(before: Tensor, now: Tensor) -> float:
    """Unbiased HSIC of the linear kernels of two sets of features of the same images (Song et al. 2012).

    Args:
        before: features (n, d), n at least 4.
        now: features (n, e) of the same images in the same order.

    Raises:
        ValueError: fewer than 4 images, another number of images, or features that are not finite.
    """
    x, y = _pair(before, now)
    n = len(x)
    if n < 4:
        raise ValueError(f"{n} images are too few for an unbiased HSIC")
    k, _ = _u_centred(x @ x.T)
    l_, _ = _u_centred(y @ y.T)
    return float((k * l_).sum()) / (n * (n - 3))


def _prepared(train: Tensor, train_labels: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised training features, ascending class ids, column of each training image, normalised features."""
    x, z = _checked(train), _checked(features)
    labels = class_ids(train_labels, "labels")
    if len(labels) != len(x) or x.shape[1] != z.shape[1]:
        raise ValueError(f"features {tuple(x.shape)} and {tuple(z.shape)} with {len(labels)} training labels")
    if not len(x):
        raise ValueError("no training image")
    classes, members = labels.unique(return_inverse=True)
    return _normalised(x), classes, members, _normalised(z)


def _checked(features: Tensor) -> Tensor:
    found = features.detach().to("cpu", torch.float64)
    if found.dim() != 2 or not bool(found.isfinite().all()):
        raise ValueError(f"features of shape {tuple(found.shape)} must be (images, width) and finite")
    return found


def _pair(before: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
    x, y = _checked(before), _checked(now)
    if len(x) != len(y):
        raise ValueError(f"features of {len(x)} and of {len(y)} images")
    return x, y


def _normalised(x: Tensor) -> Tensor:
    norms = x.norm(dim=1, keepdim=True)
    return x / torch.where(norms > 0, norms, 1.0)


def _centred(x: Tensor) -> Tensor:
    """Columns of mean zero and a largest entry of 1; exactly zero where all rows are equal."""
    moved = x - x[:1]
    moved = moved - moved.mean(dim=0)
    largest = float(moved.abs().max()) if moved.numel() else 0.0
    return moved / largest if largest > 0 else moved


def _u_centred(gram: Tensor) -> tuple[Tensor, float]:
    """The kernel whose inner products are unbiased HSIC times n (n - 3), and the norm of the kernel before."""
    n = len(gram)
    kernel = gram - torch.diag(gram.diagonal())
    rows = kernel.sum(dim=1) / (n - 2)
    centred = kernel - rows[:, None] - rows[None, :] + kernel.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diagonal()), float(gram.norm())


def _accuracy(predicted: Tensor, labels: Tensor) -> Outcome:
    truth = class_ids(labels, "labels")
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} features for {len(truth)} labels")
    return Result(int((predicted == truth).sum()) / len(truth))


def _one_minus(similarity: Outcome) -> Outcome:
    if isinstance(similarity, Undefined):
        return similarity
    assert isinstance(similarity.value, float)
    return Result(1.0 - similarity.value)
