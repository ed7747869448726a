"""Jensen-Shannon divergence between the answers of two models (4.3.6, 4.3.7), natural logarithm, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

from cl_platform.metrics.measured import Measured, undefined

LARGEST = math.log(2)
"""Of two answers that exclude each other."""
_TOLERANCE = 1e-12


def js_per_image(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p || m) / 2 + KL(q || m) / 2`` with ``m = (p + q) / 2`` for each row, (n,), in [0, ln 2].

    Args:
        p: probabilities (n, C).
        q: probabilities (n, C).

    Raises:
        ValueError: shapes that differ.
    """
    if p.shape != q.shape or p.dim() != 2:
        raise ValueError(f"probabilities {tuple(p.shape)} and {tuple(q.shape)}")
    one, other = p.double(), q.double()
    middle = (one + other) / 2
    return (0.5 * (_relative(one, middle) + _relative(other, middle))).clamp(0.0, LARGEST)


def _relative(p: Tensor, m: Tensor) -> Tensor:
    """KL(p || m) by row; a class of probability 0 adds nothing."""
    safe = torch.where(p > 0, p / torch.where(m > 0, m, 1.0), 1.0)
    return (p * safe.log()).sum(dim=1)


def over_classes(logits: Tensor, columns: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Softmax (n, len(wanted)) over some of the classes.

    Args:
        logits: (n, S); logarithms of probabilities do as well.
        columns: class id of each column.
        wanted: class ids, each among ``columns``.
    """
    place = {class_id: column for column, class_id in enumerate(columns)}
    return logits.double()[:, [place[class_id] for class_id in wanted]].softmax(dim=1)


def js_common(u: Tensor, u_classes: Sequence[int], r: Tensor, r_classes: Sequence[int]) -> Measured:
    """4.3.6, [0, ln 2]: mean over images of the divergence over the classes that both models can answer.

    Args:
        u: logits (n, S) of one model.
        u_classes: class id of each of its columns.
        r: logits (n, R) of the other for the same images.
        r_classes: class id of each of its columns.

    Raises:
        ValueError: another number of images.
    """
    if len(u) != len(r):
        raise ValueError(f"answers to {len(u)} and to {len(r)} images")
    if not len(u):
        return undefined("there are no such images")
    both = sorted(set(u_classes) & set(r_classes))
    if len(both) < 2:
        return undefined("fewer than 2 classes that both models can answer")
    per_image = js_per_image(over_classes(u, u_classes, both), over_classes(r, r_classes, both))
    return Measured(float(per_image.mean()))


@dataclass(frozen=True)
class JsGroups:
    """4.3.7: whether unlearnt models lie among the references (Liu et al. 2022, CLPU).

    Attributes:
        js_in: mean divergence between references of different seeds.
        js_across: mean divergence between unlearnt models and references, all pairs.
        js_rel: ``|js_across - js_in| / js_in``.
        js_within: share of the pairs across that are not farther apart than the farthest references.
    """

    js_in: Measured
    js_across: Measured
    js_rel: Measured
    js_within: Measured


def js_groups(references: Sequence[Sequence[Tensor]], unlearned: Sequence[Sequence[Tensor]]) -> JsGroups:
    """Divergences inside and across the groups; those of several forgotten tasks are averaged pair by pair.

    Args:
        references: for each seed, for each forgotten task, probabilities (n, C) over classes that all models share.
        unlearned: the same of the models that forgot.
    """
    if len(references) < 2 or not unlearned:
        missing = undefined("needs references of at least 2 seeds" if unlearned else "needs a model that forgot")
        return JsGroups(missing, missing, missing, missing)
    inside = [_apart(one, other) for one, other in combinations(references, 2)]
    across = [_apart(one, other) for one, other in product(unlearned, references)]
    js_in, js_across = math.fsum(inside) / len(inside), math.fsum(across) / len(across)
    relative = (
        Measured(abs(js_across - js_in) / js_in) if js_in > 0 else undefined("the references do not differ at all")
    )
    near = sum(value <= max(inside) + _TOLERANCE for value in across)
    return JsGroups(Measured(js_in), Measured(js_across), relative, Measured(near / len(across)))


def _apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    each = [float(js_per_image(p, q).mean()) for p, q in zip(one, other, strict=True)]
    return math.fsum(each) / len(each)
