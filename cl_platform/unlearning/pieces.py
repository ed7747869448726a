"""The learnt state tensor by tensor, before a request and after it: the certificate's list of what became of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cl_platform.unlearning.certificate import Seen, component_entries, look_at
from cl_platform.unlearning.lineage import components, full_names, learnt_state

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner

Owners = dict[str, tuple[str, tuple[int, ...]]]
"""Full name of a tensor -> (kind, ids of the tasks whose data could have shaped it)."""


@dataclass(frozen=True)
class Before:
    """A learner before a request.

    Attributes:
        seen: every tensor of the learnt state by full name.
        owners: of these.
    """

    seen: dict[str, Seen]
    owners: Owners

    @classmethod
    def of(cls, learner: ContinualLearner, salt: bytes) -> Before:
        """Look at a learner, at a bound between tasks."""
        return cls(look_at(learnt_state(learner), salt), owners_of(learner))

    @property
    def leads(self) -> dict[str, bytes]:
        """First bytes of each tensor, to be searched for in files where it is gone."""
        return {name: seen.lead for name, seen in self.seen.items()}


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
    state, now = learnt_state(learner), owners_of(learner)
    owners = {**dict.fromkeys([*before.seen, *state], ("bookkeeping", ())), **now, **before.owners}
    listing = {name for name, (_, tasks) in now.items() if task_id in tasks}
    how = changed or {name: "modified" if name in listing else "recomputed" for name in state}
    return component_entries(before.seen, state, owners, how)
