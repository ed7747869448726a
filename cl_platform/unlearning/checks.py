"""What a verification asserts, and the sentence it ends in."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cl_platform.metrics.measured import Measured
from cl_platform.unlearning.canonical import Comparison
from cl_platform.unlearning.figures import Sides

ERRORS = 3.0
"""Standard errors by which a model may exceed the reference by chance."""
ATTACK = "attack"
NO_PROOF = "low attack scores are no proof"


@dataclass(frozen=True)
class Check:
    """One assertion.

    Attributes:
        name: of the check.
        passed: ``None`` if it could not be made.
        detail: what was found, part of a sentence.
    """

    name: str
    passed: bool | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"name": self.name, "passed": self.passed, "detail": self.detail}


def checks_of(
    certificate: Mapping[str, Any],
    state: Collection[str],
    held_by: Sequence[str],
    comparison: Comparison | None,
    not_compared: str | None,
    found: Mapping[str, Sides],
    files: Sequence[str],
) -> list[Check]:
    """All checks of a verification whose audit log was found whole.

    Args:
        certificate: of the request.
        state: names in the learnt state as it is now.
        held_by: names of the components that list the forgotten task.
        comparison: with the reference; ``None`` if the bytes could not be compared.
        not_compared: why.
        found: metrics by key.
        files: files of the run that still hold the task.
    """
    exact = certificate["level"] in ("E-bit", "E-law")
    whole = "every entry follows from the one before, and the certificate is the one that it closes"
    made = [Check("audit log", True, whole)]
    made.append(_something_changed(certificate))
    made.append(_parts_gone(certificate, state, held_by if exact else ()))
    left = f"{', '.join(files)} still count the task as learnt" if files else "none holds the task"
    made.append(Check("checkpoints", not files, left))
    made.append(_bytes(certificate["level"], comparison, not_compared))
    made += [_like_reference(name, key, found) for name, key in _compared(found)]
    return made


def _something_changed(certificate: Mapping[str, Any]) -> Check:
    entries = certificate["components"]
    changed = [entry for entry in entries if entry["action"] != "kept"]
    if changed:
        return Check("changed", True, f"{len(changed)} of {len(entries)} tensors were deleted or changed")
    return Check("changed", False, "no tensor was deleted or changed, so nothing was forgotten")


def _parts_gone(certificate: Mapping[str, Any], state: Collection[str], held_by: Sequence[str]) -> Check:
    deleted = [entry["name"] for entry in certificate["components"] if entry["action"] == "deleted"]
    there = sorted({*deleted} & {*state})
    if there:
        return Check("parts", False, f"{_some(there)} should be deleted and is there")
    if held_by:
        return Check("parts", False, f"{_some(held_by)} has seen the task, against the claimed level")
    return Check("parts", True, f"{len(deleted)} deleted tensors are gone")


def _bytes(level: str, comparison: Comparison | None, not_compared: str | None) -> Check:
    if comparison is None:
        return Check("bytes", None, f"not compared: {not_compared}")
    if comparison.equal:
        return Check("bytes", True, f"{comparison.tensors} tensors, {comparison.bytes:,} bytes equal the reference's")
    first = comparison.differences[0].name
    detail = f"{comparison.differing} of {comparison.tensors} tensors differ from the reference's, such as {first}"
    return Check("bytes", False if level == "E-bit" else None, detail)


def _compared(found: Mapping[str, Sides]) -> list[tuple[str, str]]:
    """Pairs of a check and the metric that it looks at."""
    space = next((key.rpartition("_")[2] for key in found if key.startswith("forget_acc_test_")), "cil")
    lead = "mia_auc_loss"
    if lead in found and (found[lead].u.value is None or found[lead].r.value is None):
        lead = "mia_auc_entropy"
    return [("answers", f"forget_acc_test_{space}"), ("answers on training images", f"forget_acc_train_{space}"),
            (ATTACK, lead)]  # fmt: skip


def _like_reference(name: str, key: str, found: Mapping[str, Sides]) -> Check:
    """u must not know more of the task than r, beyond three standard errors of their difference.

    An attack must not see less either: images that look less like members than unseen ones do give the task away.
    """
    sides = found[key]
    if sides.gap.value is None:
        return Check(name, None, f"{key}: {sides.gap.reason}")
    if sides.u.by_construction and sides.r.by_construction:
        return Check(name, None, f"{key}: the classes are no answers any more, which is no evidence")
    error = _error(sides.u, sides.r)
    detail = f"{key} {sides.u.value or 0.0:.3f}, of the reference {sides.r.value or 0.0:.3f}"
    if (abs(sides.gap.value) if name == ATTACK else sides.gap.value) > ERRORS * error:
        return Check(name, False, f"{detail}: more than chance allows")
    return Check(name, True, detail)


def _error(u: Measured, r: Measured) -> float:
    return math.hypot(u.error or 0.0, r.error or 0.0)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def verdict(level: str, comparison: Comparison | None, checks: Sequence[Check], found: Mapping[str, Sides]) -> str:
    """The sentence a verification ends in.

    Args:
        level: claimed by the certificate.
        comparison: with the reference, if it was made.
        checks: all that were made.
        found: metrics by key.
    """
    failed = [check for check in checks if check.passed is False]
    if failed:
        return f"not forgotten as claimed: {'; '.join(f'{check.name}: {check.detail}' for check in failed)}"
    if level == "E-bit":
        return "exact, proven on this machine" if comparison is not None else "exact by construction, not yet compared"
    if level == "E-law":
        equal = comparison is not None and comparison.equal
        return "exact in distribution" + (", and here the bytes are equal" if equal else "")
    return f"approximate: {_gaps(found)}; {NO_PROOF}"


def _gaps(found: Mapping[str, Sides]) -> str:
    keys = [key for key in found if key.startswith(("forget_acc_test_", "retain_acc_test_")) and "tasks" not in key]
    keys = [*keys[:2], "mia_auc_loss", "mia_auc_entropy"]
    said = [f"{key} {found[key].gap.value:+.3f}" for key in keys if key in found and found[key].gap.value is not None]
    return f"gaps to the reference {', '.join(said)}" if said else "no gap to the reference could be measured"
