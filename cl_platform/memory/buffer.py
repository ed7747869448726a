"""The replay buffer: preallocated columns, one row per remembered example, filled by a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_platform.errors import UserError
from cl_platform.memory.columns import COLUMNS, LARGEST_TASK_ID, Replay, column_shapes
from cl_platform.memory.host_state import HostState
from cl_platform.memory.policies import NOTHING, Contents, Decision, Offers, Policy
from cl_platform.memory.samplers import draw
from cl_platform.memory.uniforms import Ints

MIRRORED = {"labels": np.int64, "task_ids": np.int64, "example_ids": np.int64, "keys": np.float64}
"""Columns that the host holds a copy of, and its type."""


class ReplayBuffer(HostState):
    """Remembered examples, chosen by ``policy``.

    The columns are allocated once, at the first insertion or by :meth:`allocate`, and move with the module; of labels,
    task ids, example ids and keys the host holds a copy, so that no decision reads a device. ``state_dict`` holds
    everything: an object built alike goes on with the same decisions after loading it. Slots beyond the filled ones
    are zero.

    Args:
        policy: decides which offers stay; its capacity is the buffer's.
        num_columns: width C of stored logits, where the first ones are narrower than later ones.
        least: slots of a stored buffer that may be loaded; one with fewer than ``capacity`` gets empty ones behind its
            own. ``None``: as many as there are.
    """

    images: Tensor | None

    def __init__(self, policy: Policy, num_columns: int | None = None, least: int | None = None) -> None:
        super().__init__()
        self.policy = policy
        self.num_logits = num_columns
        self._least = policy.capacity if least is None else least
        self.filled = 0
        for name in COLUMNS:
            self.register_buffer(name, None)
        self._mirrors: dict[str, Any] = {}
        self._place = torch.device("cpu")  # where the module was moved to, also while there is no column yet

    def __len__(self) -> int:
        return self.filled

    @property
    def capacity(self) -> int:
        """Slots."""
        return self.policy.capacity

    @property
    def bytes(self) -> int:
        """Bytes of all columns; 0 before they are allocated."""
        return sum(column.numel() * column.element_size() for column in self._columns().values())

    @property
    def contents(self) -> Contents:
        """The filled slots as the host knows them; the arrays are the buffer's own and not to be written to."""
        if not self._mirrors:
            return Contents(NOTHING, NOTHING, NOTHING, np.empty(0) if self.policy.keyed else None)
        rows = {name: mirror[: self.filled] for name, mirror in self._mirrors.items()}
        return Contents(rows["labels"], rows["task_ids"], rows["example_ids"], rows.get("keys"))

    @property
    def unique(self) -> int:
        """Number of different examples among the rows."""
        return len(np.unique(self.contents.example_ids))

    def owners(self) -> set[int]:
        """Ids of the tasks that have rows."""
        return set(np.unique(self.contents.task_ids).tolist())

    def offered(self) -> set[int]:
        """Ids of the tasks that offered examples, and so had a say in which rows are held."""
        return set(self.policy.ledger.tasks)

    # -- filling ----------------------------------------------------------------------------------------------------

    def allocate(self, image_shape: tuple[int, int, int], num_columns: int | None = None) -> None:
        """Make room for ``capacity`` images of ``image_shape`` and, if given, logits of ``num_columns`` columns.

        Raises:
            ValueError: there are rows already.
        """
        if self.filled:
            raise ValueError("the buffer holds rows already")
        self._register({n: (self.capacity, *s) for n, s in self._shapes(image_shape, num_columns).items()})

    def decide(self, offers: Offers) -> Decision:
        """What the policy keeps of ``offers``; it counts them, so :meth:`write` must follow.

        Processes that hold copies of one buffer call this with the offers of all of them and get the same answer.

        Raises:
            ValueError: a task id beyond what a slot can hold.
        """
        if not len(offers):
            return Decision()
        if int(offers.task_ids.max()) > LARGEST_TASK_ID or int(offers.task_ids.min()) < 0:
            raise ValueError(f"task ids must be from 0 to {LARGEST_TASK_ID}")
        return self.policy.decide(offers, self.contents)

    @torch.no_grad()
    def write(
        self, decision: Decision, offers: Offers, images: Tensor, step: int, logits: Tensor | None = None
    ) -> None:
        """Carry out a decision about ``offers``.

        Args:
            decision: from :meth:`decide`.
            offers: the same as there, all of them.
            images: (w, 3, H, W) uint8, the rows ``decision.sources`` only; on any device.
            step: the global step.
            logits: (w, S), S <= C, of the same rows; stored as float32. The columns must stand in an order to which
                classes are only ever appended.

        Raises:
            ValueError: images that are not uint8, or columns that do not fit.
        """
        count = len(decision.slots)
        if len(images) != count or images.dtype != torch.uint8:
            raise ValueError(f"expected {count} uint8 images, got {tuple(images.shape)} of {images.dtype}")
        if count and self.images is None:
            width = None if logits is None else self.num_logits or int(logits.shape[1])
            channels, height, wide = images.shape[1:]
            self.allocate((channels, height, wide), width)
        padded = self._padded(logits, count)
        if decision.keep is not None:
            self._retain(decision.keep)
        if not count:
            return
        facts = {name: getattr(offers, name)[decision.sources] for name in ("labels", "task_ids", "example_ids")}
        if decision.keys is not None:
            facts["keys"] = decision.keys
        for name, values in facts.items():
            self._mirrors[name][decision.slots] = values
        facts["steps"] = np.full(count, step, dtype=np.int64)
        rows = {"images": images, **padded, **{name: torch.from_numpy(values) for name, values in facts.items()}}
        slots = self._on_device(torch.from_numpy(decision.slots))
        columns = self._columns()
        for name, values in rows.items():
            columns[name].index_copy_(0, slots, self._on_device(values.to(columns[name].dtype)))
        self.filled = max(self.filled, int(decision.slots.max()) + 1)

    def insert(
        self,
        images: Tensor,
        labels: Any,
        task_ids: Any,
        example_ids: Any,
        step: int,
        logits: Tensor | None = None,
        features: Any = None,
    ) -> Decision:
        """Offer a batch: decide, and copy the accepted rows only.

        Args:
            images: (n, 3, H, W) uint8 as decoded, before augmentation; on any device.
            labels: (n,) class ids, a tensor on the host, an array or a list.
            task_ids: (n,) likewise.
            example_ids: (n,) likewise, rows of the data set.
            step: the global step.
            logits: see :meth:`write`; (n, S) here.
            features: (n, D) on the host, for policies that choose by them.

        Raises:
            ValueError: columns on a device, of different lengths or of a wrong type.
        """
        offers = Offers.of(labels, task_ids, example_ids, features)
        if len(images) != len(offers):
            raise ValueError(f"{len(images)} images for {len(offers)} labels")
        decision = self.decide(offers)
        sources = torch.from_numpy(decision.sources)
        accepted = None if logits is None else _rows(logits, sources)
        self.write(decision, offers, _rows(images, sources), step, accepted)
        return decision

    def drop_task(self, task_id: int) -> None:
        """Remove the rows of a task and what its offers left in the policy; the other rows keep their order."""
        contents = self.contents
        self.policy.drop_task(task_id, contents)
        self._retain(np.flatnonzero(contents.task_ids != task_id))

    @torch.no_grad()
    def keep_columns(self, kept: Ints) -> None:
        """Keep the given columns of the stored logits (ascending) and wipe the others; later columns move up."""
        logits, counts = self._buffers.get("logits"), self._buffers.get("num_columns")
        if logits is None or counts is None:
            return
        index = self._on_device(torch.from_numpy(kept))
        logits[:, : len(kept)] = logits.index_select(1, index)
        logits[:, len(kept) :] = 0
        counts.copy_((index < counts[:, None]).sum(1))

    # -- reading ----------------------------------------------------------------------------------------------------

    def sample(
        self, count: int, generator: torch.Generator, exclude_task: int | None = None, sampler: str = "uniform"
    ) -> Replay | None:
        """Rows of one draw without replacement; None where there is nothing to draw from.

        Args:
            count: rows wanted; fewer come if the buffer holds fewer.
            generator: on the host, such as the stream ``buffer.sample`` of the task and the step in it.
            exclude_task: leave this task's rows out.
            sampler: see :func:`cl_platform.memory.samplers.draw`.
        """
        slots = draw(self.contents, count, generator, sampler, exclude_task)
        return self.read(slots) if len(slots) else None

    def read(self, slots: Ints) -> Replay:
        """The rows of the given slots (b,) int64, in their order."""
        columns, chosen = self._columns(), torch.from_numpy(slots)
        index = self._on_device(chosen)

        def column(name: str) -> Tensor:
            return columns[name].index_select(0, index)

        logits = (column("logits"), column("num_columns").long()) if "logits" in columns else (None, None)
        facts = [column(name).long() for name in ("labels", "task_ids", "example_ids")]
        return Replay(chosen, column("images"), *facts, *logits)

    # -- columns ----------------------------------------------------------------------------------------------------

    def host_state(self) -> dict[str, Any]:
        """Number of filled slots."""
        return {"filled": np.int64(self.filled)}

    def load_host_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`host_state` gave."""
        self.filled = int(state["filled"])

    def _columns(self) -> dict[str, Tensor]:
        return {name: column for name, column in self._buffers.items() if column is not None}

    def _shapes(self, image_shape: tuple[int, int, int], num_columns: int | None) -> dict[str, tuple[int, ...]]:
        return column_shapes(image_shape, self.policy.keyed, num_columns)

    def _register(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, dtype in COLUMNS.items():
            column = torch.zeros(shapes[name], dtype=dtype, device=self._place) if name in shapes else None
            self.register_buffer(name, column)
        self._mirrors = {name: np.zeros(self.capacity, kind) for name, kind in MIRRORED.items() if name in shapes}

    def _retain(self, keep: Ints) -> None:
        """Move the slots ``keep`` (ascending) to the front and wipe the others."""
        if len(keep) == self.filled:
            return
        index = self._on_device(torch.from_numpy(keep))
        for column in self._columns().values():
            column[: len(keep)] = column.index_select(0, index)
            column[len(keep) : self.filled] = 0
        for mirror in self._mirrors.values():
            mirror[: len(keep)] = mirror[keep]
            mirror[len(keep) : self.filled] = 0
        self.filled = len(keep)

    def _padded(self, logits: Tensor | None, count: int) -> dict[str, Tensor]:
        column = self._columns().get("logits")
        if (logits is None) != (column is None) and count:
            raise ValueError("logits must be given with every insertion or with none")
        if logits is None or column is None or not count:
            return {}
        given, width = int(logits.shape[1]), int(column.shape[1])
        if given > width:
            raise ValueError(f"{given} logits do not fit into {width} columns; build the buffer with num_columns")
        padded = torch.nn.functional.pad(logits.detach().float(), (0, width - given))
        return {"logits": padded, "num_columns": torch.full((count,), given)}

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._place, non_blocking=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ReplayBuffer:
        """Move to a device, never to another number format: keys and logits stay what they were."""
        before = self._columns()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, column in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != column.dtype:
                self._buffers[name] = column.to(after.device)
        self._place = fn(torch.empty(0, device=self._place)).device
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        shapes = {n: tuple(state_dict[prefix + n].shape) for n in COLUMNS if prefix + n in state_dict}
        for name, shape in shapes.items():
            if self._least <= shape[0] <= self.capacity:
                wide = self.num_logits or 0 if name == "logits" else 0
                shapes[name] = (self.capacity, *(max(size, wide) for size in shape[1:]))
                state_dict[prefix + name] = _filled_up(state_dict[prefix + name], shapes[name])
            else:
                allowed = f"the stored buffer has {shape[0]} slots"
                raise UserError("buffer.size", self.capacity, allowed, f"Set buffer.size={shape[0]} or start anew")
        self._register(shapes)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, mirror in self._mirrors.items():
            mirror[:] = state_dict[prefix + name].cpu().numpy()


def _filled_up(column: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A stored column with zeros behind its rows, and behind the entries of each row, up to ``shape``."""
    if tuple(column.shape) == shape:
        return column
    wider = column.new_zeros(shape)
    wider[tuple(slice(size) for size in column.shape)] = column
    return wider


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.index_select(0, rows.to(tensor.device, non_blocking=True))
