"""The learnt state tensor by tensor, before a request and after it: the certificate's list of what became of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cl_platform.unlearning.canonical import Value, content, header, tensor_digest
from cl_platform.unlearning.lineage import components, full_names, learnt_state
from cl_platform.unlearning.scan import leads

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner

Owners = dict[str, tuple[str, tuple[int, ...]]]
"""Full name of a tensor -> (kind, ids of the tasks whose data could have shaped it)."""


@dataclass(frozen=True)
class Piece:
    """A tensor at one moment.

    Attributes:
        dtype: as in the header of a safetensors file.
        shape: of the tensor.
        bytes: of its content.
        plain: its digest; written down only where it confirms no guess at what is gone.
        salted: its digest behind the request's salt.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    plain: str
    salted: str


@dataclass(frozen=True)
class Before:
    """A learner before a request.

    Attributes:
        pieces: every tensor of the learnt state by full name.
        owners: of these.
        leads: their first bytes, to be searched for in files where they are gone.
    """

    pieces: dict[str, Piece]
    owners: Owners
    leads: dict[str, bytes]

    @classmethod
    def of(cls, learner: ContinualLearner, salt: bytes) -> Before:
        """Look at a learner, at a bound between tasks."""
        state = learnt_state(learner)
        pieces = {name: _piece(name, value, salt) for name, value in state.items()}
        return cls(pieces, owners_of(learner), leads(state))


def owners_of(learner: ContinualLearner) -> Owners:
    """Kind and owners of each tensor of a learner's learnt state."""
    found: Owners = {}
    for component in components(learner):
        found |= dict.fromkeys(full_names(component), (component.kind, tuple(component.tasks)))
    return found


def entries(
    before: Before, learner: ContinualLearner, task_id: int, changed: str | None = None
) -> list[dict[str, Any]]:
    """Entries of the certificate's ``components``, one for each tensor that was there or is there, by name.

    Args:
        before: the learner before the request.
        learner: after it.
        task_id: what was to be forgotten.
        changed: what happened to tensors that are there and differ; by default those that list the task no more were
            ``recomputed`` from what the others left, and the rest ``modified``.
    """
    state, owners = learnt_state(learner), owners_of(learner)
    made = []
    for name in sorted({*before.pieces, *state}, key=str.encode):
        old = before.pieces.get(name)
        new = _piece(name, state[name]) if name in state else None
        kind, tasks = before.owners.get(name) or owners.get(name) or ("bookkeeping", ())
        if new is None:
            action = "deleted"
        elif old is not None and old.plain == new.plain:
            action = "kept"
        else:
            left = owners.get(name, ("", ()))[1]
            action = changed or ("modified" if task_id in left else "recomputed")
        made.append(_entry(name, kind, tasks, action, old, new))
    return made


def _entry(
    name: str, kind: str, owners: tuple[int, ...], action: str, old: Piece | None, new: Piece | None
) -> dict[str, Any]:
    shown = new or old
    assert shown is not None
    salted = old is not None and action != "kept"
    return {
        "name": name,
        "kind": kind,
        "owners": sorted(owners),
        "action": action,
        "dtype": shown.dtype,
        "shape": list(shown.shape),
        "bytes_before": 0 if old is None else old.bytes,
        "bytes_after": 0 if new is None else new.bytes,
        "sha256_before": None if old is None else old.salted if salted else old.plain,
        "sha256_after": None if new is None else new.plain,
        "salted": salted,
    }


def _piece(name: str, value: Value, salt: bytes = b"") -> Piece:
    dtype, shape = json.loads(header(name, value))[1:]
    plain = tensor_digest(name, value)
    return Piece(dtype, tuple(shape), len(content(value)), plain, tensor_digest(name, value, salt) if salt else plain)
