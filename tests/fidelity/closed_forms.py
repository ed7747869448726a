"""Closed forms on drawn features, without images: a strategy, what it absorbs, what it answers."""

from types import SimpleNamespace

import torch
from torch import nn

from cl_platform.batch import Batch


class Trunk(nn.Linear):
    """Stands for a trunk of a given width."""

    def __init__(self, width):
        super().__init__(width, width)
        self.feature_dim = width


def standing(strategy, width, num_classes=10, num_tasks=5, seed=0):
    """The strategy, attached to nothing but a width."""
    strategy.attach(
        SimpleNamespace(
            backbone=Trunk(width),
            num_classes=num_classes,
            num_tasks=num_tasks,
            total_tasks=num_tasks,
            declared=(num_classes,),
            seed=seed,
            cache=None,
            setting="class",
            behind=lambda task_id: (task_id,),
            own_classes=lambda task_id: [],
        )
    )
    return strategy


def absorb(strategy, task_id, features, labels, classes=None):
    """A task in closed form, from its features (n, D) and labels (n,)."""
    strategy.context.cache = SimpleNamespace(features=lambda *_: features)
    classes = tuple(labels.unique().tolist()) if classes is None else tuple(classes)
    task = SimpleNamespace(task_id=task_id, classes=classes, train=SimpleNamespace(labels=labels))
    strategy.begin_task(task)
    strategy.end_task(task)
    return strategy


def scores(strategy, features):
    """Answers (n, S) for features (n, D)."""
    ids = torch.full((len(features),), -1)
    return strategy.predict(Batch(torch.empty(len(features), 0), ids, ids, ids, ids < -1, {"query": features}))


def drawn(classes, per_class=40, width=6, seed=0, spread=2.0):
    """Features of Gaussian classes that share a slanted covariance, shuffled: (n, D) float32 and labels (n,)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(width) + 0.3 * torch.randn(width, width, generator=torch.Generator().manual_seed(99))
    labels = torch.tensor(classes).repeat_interleave(per_class)
    means = spread * torch.randn(max(classes) + 1, width, generator=torch.Generator().manual_seed(98))
    features = means[labels] + torch.randn(len(labels), width, generator=generator) @ mixing
    order = torch.randperm(len(labels), generator=generator)
    return features[order], labels[order]
