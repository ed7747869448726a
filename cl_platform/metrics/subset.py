"""The images of a task that continual evaluation looks at: a pure function of seed, task and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence


def evaluation_subset(labels: Sequence[int], count: int, seed: int, task_id: int) -> list[int]:
    """Indices of ``count`` images, balanced over classes, sorted; all of them where there are no more.

    Classes and the images of each class are ordered by SHA-256 and dealt round-robin, so a smaller subset is part of a
    larger one, no random generator is touched, and no library version matters.

    Args:
        labels: class of every image of the task's test set.
        count: images wanted.
        seed: the run's seed.
        task_id: id of the task.

    Raises:
        ValueError: ``count`` is negative.
    """
    if count < 0:
        raise ValueError(f"count {count} is negative")
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(int(label), []).append(index)
    prefix = f"{seed}/eval_subset/{task_id}"
    hands = [_by_hash(members[c], f"{prefix}/image/") for c in _by_hash(members, f"{prefix}/class/")]
    longest = max(map(len, hands), default=0)
    dealt = [hand[turn] for turn in range(longest) for hand in hands if turn < len(hand)]
    return sorted(dealt[:count])


def _by_hash(items: Iterable[int], prefix: str) -> list[int]:
    return sorted(items, key=lambda item: hashlib.sha256(f"{prefix}{item}".encode()).hexdigest())
