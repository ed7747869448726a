"""Avalanche's storage policies. Avalanche takes seconds to import, so it is imported inside the functions only."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cl_platform.errors import UserError, unknown_name
from cl_platform.memory.policies import NOTHING, Contents, Decision, Offers, Policy
from cl_platform.memory.uniforms import Ints
from cl_platform.random_streams import seeded_globals

STORAGES = ("ReservoirSamplingBuffer", "ExperienceBalancedBuffer", "ClassBalancedBuffer", "ParametricBuffer")
"""Avalanche's policies that need nothing but a size."""

REMEMBERED = {"_buffer", "_buffer_weights", "buffer_groups", "seen_classes", "seen_groups", "_num_exps"}
"""Attributes of Avalanche's policies that change, all of which are saved and restored here."""

CONSTANT = {"max_size", "selection_strategy", "_curr_strategy"}

UNGROUPED = -1


def avalanche_storage(name: str, capacity: int) -> Any:
    """One of Avalanche's own policies by its class name, such as ``ClassBalancedBuffer``."""
    if name not in STORAGES:
        raise unknown_name("buffer.avalanche", name, STORAGES)
    from avalanche.training import storage_policy

    return getattr(storage_policy, name)(capacity)


class AvalanchePolicy(Policy):
    """Lets a storage policy of Avalanche choose when a task ends; the rows of its data set are offers, not images.

    ``post_adapt`` runs with the global generators seeded by the stream ``buffer.insert`` of the task, and before it
    the policy is set up from what is saved here, so that a resumed run goes on as the one that was never interrupted.
    Logits are not at hand when a task ends. After a task is dropped, its part of the room stays empty.

    Args:
        storage: an Avalanche ``ExemplarsBuffer``.
        seed: the run's seed.

    Raises:
        UserError: a policy that looks at features, or has state of its own that could not be saved.
    """

    name = "avalanche"
    when = "task_end"

    def __init__(self, storage: Any, seed: int) -> None:
        super().__init__(int(storage.max_size), seed)
        _refuse(storage)
        self.storage = storage
        self.turns = 0
        self.slot_keys: Ints = NOTHING  # the offer in each filled slot
        self.groups: Ints = np.empty((0, 2), dtype=np.int64)  # group id, its room
        self.members: Ints = np.empty((0, 2), dtype=np.int64)  # group id, offer; in Avalanche's order
        self.weights: np.ndarray[Any, Any] = np.empty(0, dtype=np.float32)  # one per member, or none

    def decide(self, offers: Offers, contents: Contents) -> Decision:
        """See :class:`Policy`. ``offers`` is a whole task."""
        self._restore(contents)
        new_keys = self._count(offers)
        dataset = _dataset(new_keys, offers.labels, offers.task_ids)
        experience = SimpleNamespace(dataset=dataset, classes_in_this_experience=np.unique(offers.labels).tolist())
        clock = SimpleNamespace(train_exp_counter=self.turns)
        agent = SimpleNamespace(clock=clock, experience=experience, device="cpu", eval_mb_size=64)
        with seeded_globals(self.seed, int(offers.task_ids[0]), "buffer.insert"):
            self.storage.post_adapt(agent, experience)
        self.turns += 1
        self._remember()
        chosen = self.members[:, 1]
        if len(chosen) > self.capacity:
            allowed = f"{type(self.storage).__name__} keeps {len(chosen)} examples"
            raise UserError("buffer.size", self.capacity, allowed, "Use another policy")
        keep = np.flatnonzero(np.isin(self.slot_keys, chosen))
        fresh = chosen[chosen >= new_keys[0]]
        self.slot_keys = np.r_[self.slot_keys[keep], fresh]
        slots = np.arange(len(keep), len(self.slot_keys))
        return Decision(slots, fresh - new_keys[0], keep if len(keep) < len(contents) else None)

    def drop_task(self, task_id: int, contents: Contents) -> None:
        """See :class:`Policy`."""
        super().drop_task(task_id, contents)
        self.slot_keys = self.slot_keys[contents.task_ids != task_id]
        stays = np.isin(self.members[:, 1], self.slot_keys)
        self.members = self.members[stays]
        self.weights = self.weights[stays] if len(self.weights) else self.weights

    def _restore(self, contents: Contents) -> None:
        """Set the storage up as it was after the last task."""
        slot_of = {key: slot for slot, key in enumerate(self.slot_keys.tolist())}

        def fill(part: Any, group: int) -> None:
            own = self.members[:, 0] == group
            slots = np.array([slot_of[key] for key in self.members[own, 1].tolist()], dtype=np.int64)
            part.buffer = _dataset(self.members[own, 1], contents.labels[slots], contents.task_ids[slots])
            if hasattr(part, "_buffer_weights"):
                part._buffer_weights = torch.from_numpy(self.weights[own].copy())

        ids = self.groups[:, 0].tolist()
        if not hasattr(self.storage, "buffer_groups"):
            fill(self.storage, UNGROUPED)
            return
        self.storage.buffer_groups = {}
        for group, room in self.groups.tolist():
            part = self.storage.buffer_groups[group] = _empty_group(self.storage, room)
            fill(part, group)
        for name in ("seen_classes", "seen_groups"):
            if hasattr(self.storage, name):
                setattr(self.storage, name, set(ids))  # entered in the same order, so iterated in the same order
        if hasattr(self.storage, "_num_exps"):
            self.storage._num_exps = self.turns

    def _remember(self) -> None:
        """Take the storage's choice over into arrays."""
        grouped = hasattr(self.storage, "buffer_groups")
        parts = self.storage.buffer_groups if grouped else {UNGROUPED: self.storage}
        rooms = [(group, part.max_size) for group, part in parts.items()]
        self.groups = np.array(rooms if grouped else [], dtype=np.int64).reshape(-1, 2)
        members = [(g, int(part.buffer[i][0])) for g, part in parts.items() for i in range(len(part.buffer))]
        self.members = np.array(members, dtype=np.int64).reshape(-1, 2)
        weights = [part._buffer_weights.numpy() for part in parts.values() if hasattr(part, "_buffer_weights")]
        self.weights = np.concatenate(weights).astype(np.float32) if weights else self.weights

    def host_state(self) -> dict[str, Any]:
        """See :class:`Policy`."""
        own = {name: getattr(self, name) for name in ("slot_keys", "groups", "members", "weights")}
        return {**super().host_state(), "turns": np.int64(self.turns), **own}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`Policy`."""
        super().load_host_state(state)
        self.turns = int(state["turns"])
        self.slot_keys, self.groups = state["slot_keys"], state["groups"]
        self.members, self.weights = state["members"], state["weights"]


def _refuse(storage: Any) -> None:
    from avalanche.training.storage_policy import ExemplarsBuffer, FeatureBasedExemplarsSelectionStrategy

    name = type(storage).__name__
    if not isinstance(storage, ExemplarsBuffer):
        raise UserError("buffer.avalanche", name, "is no ExemplarsBuffer of Avalanche", "Give one")
    if isinstance(getattr(storage, "selection_strategy", None), FeatureBasedExemplarsSelectionStrategy):
        allowed = "selects by features, which Avalanche's policies are not given here"
        raise UserError("buffer.avalanche", name, allowed, "Use buffer.policy=herding")
    plain = (bool, int, float, str, type(None))
    unknown = [n for n, v in vars(storage).items() if n not in REMEMBERED | CONSTANT and not isinstance(v, plain)]
    if unknown:
        allowed = f"keeps {', '.join(unknown)}, which a checkpoint would not hold"
        raise UserError("buffer.avalanche", name, allowed, "Write it as a policy of cl_platform.memory")


def _dataset(keys: Ints, labels: Ints, task_ids: Ints) -> Any:
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset
    from avalanche.benchmarks.utils.utils import concat_datasets
    from torch.utils.data import TensorDataset

    if not len(keys):
        return concat_datasets([])
    rows = TensorDataset(torch.from_numpy(keys.copy()))
    return _make_taskaware_classification_dataset(rows, targets=labels.tolist(), task_labels=task_ids.tolist())


def _empty_group(storage: Any, room: int) -> Any:
    from avalanche.training.storage_policy import ReservoirSamplingBuffer, _ParametricSingleBuffer

    selection = getattr(storage, "selection_strategy", None)
    return ReservoirSamplingBuffer(room) if selection is None else _ParametricSingleBuffer(room, selection)
