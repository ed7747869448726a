"""Features of retained images by class, and which class each image to forget is tied to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cl_platform.heads import columns_of
from cl_platform.unlearning.approximate.work import Pool, Work


@torch.no_grad()
def all_features(work: Work, pool: Pool, size: int) -> Tensor:
    """Features (n, D) of a whole pool under the evaluation transform."""
    return torch.cat([work.features(batch).float() for batch in work.ordered(pool, size)])


@torch.no_grad()
def sampled_features(work: Work, pool: Pool, size: int, batches: int | None) -> tuple[Tensor, Tensor]:
    """Features (m, D) and class ids (m,) of at most ``batches`` batches of a pool, drawn without repetition."""
    found, labels = [], []
    for number, batch in enumerate(work.shuffled("centroids", pool, 0, size, augmented=False)):
        if number == batches:
            break
        found.append(work.features(batch).float())
        labels.append(batch.labels)
    return torch.cat(found), torch.cat(labels)


def by_class(work: Work, features: Tensor, labels: Tensor, least: int) -> Iterator[tuple[int, Tensor]]:
    """Class ids with their features (k, D), ascending: classes that remain and have ``least`` images or more."""
    for c in sorted(set(work.classes.remaining) & set(labels.unique().tolist())):
        own = features[labels == c]
        if len(own) >= least:
            yield c, own


def tied(work: Work, classes: list[int], distances: Tensor) -> Tensor:
    """Class id (n,) that is nearest to each image to forget, never its own.

    Places among the classes that remain are not class ids: beyond the first class that goes they differ.

    Args:
        work: whose images to forget.
        classes: class ids of the columns of ``distances``, ascending.
        distances: (n, len(classes)).

    Raises:
        UserError: there is no other class.
    """
    allowed = work.classes.others(work.forget.images.labels.to(work.device))[:, columns_of(classes, work.classes.seen)]
    nearest = distances.masked_fill(~allowed, float("inf")).argmin(1)
    return torch.tensor(classes, device=distances.device)[nearest]


def places(classes: list[int], ids: Tensor) -> Tensor:
    """Places (n,) of class ids among the ascending ``classes``."""
    return torch.searchsorted(torch.tensor(classes, device=ids.device), ids)
