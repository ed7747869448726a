"""Verification of a forgotten task: the run beside one that never learnt it, byte by byte and by what they answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform.errors import UserError
from cl_platform.metrics.forgetting import NO_ORIGINAL, RELEARNING_STEPS
from cl_platform.metrics.measured import Measured, undefined
from cl_platform.run_folder import Checkpoint, RunFolder, checkpoints, read_config
from cl_platform.unlearning import certificate as certificates
from cl_platform.unlearning import forgotten as records
from cl_platform.unlearning import journal
from cl_platform.unlearning.audit import AuditLog, anchor, broken, check_anchor, check_pinned
from cl_platform.unlearning.canonical import Comparison, compare, fingerprint, refuse_other_numerics
from cl_platform.unlearning.checks import Check, checks_of, verdict
from cl_platform.unlearning.figures import Models, Sides, figures, leading_score
from cl_platform.unlearning.lineage import holders, learnt_state
from cl_platform.unlearning.models import Answers, Build, ask, checkpoint_after, restored, task_images
from cl_platform.unlearning.recorded import recorded_accuracies
from cl_platform.unlearning.reference import Maker, Reference, Train, named, owner_of, remove_stale
from cl_platform.unlearning.relapse import relapse_of
from cl_platform.unlearning.relearn import relearn, relearning, target_of
from cl_platform.unlearning.shadows import Shadows, shadow_figures

if TYPE_CHECKING:
    from cl_platform.learner import ContinualLearner
    from cl_platform.scenarios import Stream, Task


@dataclass(frozen=True)
class Workshop:
    """What only the layers above can do.

    Attributes:
        build: a learner that has learnt nothing, and its stream.
        train: trains a configuration into a folder.
        forget: lets a run folder forget a task by a method; ``None``: no shadow models that forgot.
        code: stands for the code that trains, such as a commit.
    """

    build: Build
    train: Train
    forget: Callable[[Path, int, str], None] | None = None
    code: str = ""

    def sources(self, config: Mapping[str, Any]) -> dict[str, str]:
        """What stands for all that a configuration would be trained from here."""
        learner, stream = self.build(config)
        return {"data": stream.digest, "backbone": learner.backbone.digest(), "code": self.code}


@dataclass(frozen=True)
class Options:
    """What a user asks for.

    Attributes:
        reference: a run folder to compare with, in place of one from the cache or trained now.
        shadows: further models for the attack that looks at each image's own spread.
        lira: ``offline`` (shadows never learnt the task) or ``online`` (half of them learnt and forgot it).
    """

    reference: Path | None = None
    shadows: int = 0
    lira: str = "offline"

    def __post_init__(self) -> None:
        if self.shadows < 0 or self.shadows == 1 or (self.lira == "online" and self.shadows < 4):
            least = 4 if self.lira == "online" else 2
            raise UserError("--shadows", self.shadows, f"must be 0 or at least {least}", f"Write --shadows {least}")
        if self.lira not in ("offline", "online"):
            raise UserError("--lira", self.lira, "must be offline or online", "Write --lira offline")


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        task_id: the forgotten task.
        level: what its certificate claims.
        method: how it was forgotten.
        verdict: one sentence.
        checks: each with its outcome.
        comparison: of the bytes; ``None`` if they were not compared.
        reference: what the run was compared with.
        figures: metrics of the models side by side, by key.
        lead: the membership score that the report leads with.
        space: the scenario's own prediction space.
    """

    task_id: int
    level: str
    method: str
    verdict: str
    checks: tuple[Check, ...]
    comparison: Comparison | None
    reference: Reference
    figures: dict[str, Sides]
    lead: str
    space: str

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(check.passed is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """What stands under ``verification`` in the certificate: plain JSON."""
        return {
            "verdict": self.verdict,
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
            "lead_score": self.lead,
            "space": self.space,
            "metrics": {key: sides.to_json() for key, sides in self.figures.items()},
        }

    def reference_json(self) -> dict[str, Any]:
        """What stands under ``reference`` in the certificate."""
        found = self.comparison
        return {
            "config_sha256": self.reference.config_sha256,
            "cached": self.reference.cached,
            "compared": found is not None,
            "equal": None if found is None else found.equal,
            "tensors": 0 if found is None else found.tensors,
            "bytes": 0 if found is None else found.bytes,
            "differences": [] if found is None else [difference.as_dict() for difference in found.differences],
        }


def verify(
    run: Path, workshop: Workshop, options: Options = Options(), say: Callable[[str], None] = print
) -> Verification:
    """Verify the newest forgotten task of a run, and write what was found into its certificate and audit log.

    Args:
        run: its folder.
        workshop: how learners are built and trained.
        options: see :class:`Options`.
        say: prints a line, such as a price before it is paid.

    Raises:
        UserError: nothing was forgotten, a reference that is none, or (exit code 3) a log that was changed.
    """
    certificate = read_certificate(run)  # before anything is written, also in a folder that is no run
    folder = RunFolder(run)
    try:
        return _Verifier(run, workshop, options, say, certificate).execute()
    finally:
        folder.close()


def read_certificate(run: Path) -> dict[str, Any]:
    """The newest certificate of a run, once its audit log was found whole.

    Raises:
        UserError: there is none or its request is still open; exit code 3 where log or certificate were changed.
    """
    config = read_config(run)
    if (run / journal.FOLDER / "request.json").exists():
        raise UserError(
            "run", run, "a request to forget a task is still open in it",
            "Finish it first: python -m cl_platform unlearn RUN --task ID",
        )  # fmt: skip
    path = run / "unlearning" / certificates.FILE
    if not path.is_file():
        raise UserError(
            "run", run, "nothing was forgotten in it: there is no certificate",
            "Forget a task first: python -m cl_platform unlearn RUN --task ID",
        )  # fmt: skip
    log = AuditLog(run / "unlearning" / "audit.jsonl")
    fault = log.check()
    if fault is None:
        certificate, sha256 = certificates.read(path)
        fault = check_pinned(log.entries(), certificate, sha256)
    kept_apart = _anchor_of(config)
    if fault is None and kept_apart is not None and kept_apart.is_file():
        fault = check_anchor(kept_apart, log)
    if fault is not None:
        raise broken(log.path, fault)
    if certificate["state"] != "done":
        raise UserError("run", run, "its newest request was refused", "Nothing was forgotten that could be verified")
    return certificate


def _anchor_of(config: Mapping[str, Any]) -> Path | None:
    """The file outside the run to which heads of the audit log are appended."""
    name = (config.get("unlearning") or {}).get("anchor")
    return None if name is None else Path(str(name))


@dataclass(frozen=True)
class _Never:
    """The state of the reference after the tasks that the run has learnt."""

    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint


class _Verifier:
    """One verification and its parts."""

    def __init__(
        self, run: Path, workshop: Workshop, options: Options, say: Callable[[str], None], certificate: dict[str, Any]
    ) -> None:
        self.run, self.workshop, self.options, self.say = run, workshop, options, say
        self.certificate = certificate
        self.config = read_config(run)
        self.target = int(certificate["target"]["task_id"])
        self.gone = tuple(sorted({*records.read(run).ids, self.target}))
        self.log = AuditLog(run / "unlearning" / "audit.jsonl")

    def execute(self) -> Verification:
        _, stream = self.workshop.build(self.config)
        task, checkpoint = task_images(stream, self.target), self._checkpoint()
        learnt = self._kept_of(checkpoint)
        u = restored(self.config, checkpoint, self.workshop.build)
        maker = self._maker(fingerprint(u.device))
        reference = self._reference(maker)
        never = self._never(reference, learnt)
        r = restored(never.config, never.checkpoint, self.workshop.build)
        no_bytes = self._other_numerics(reference)
        comparison = compare(learnt_state(u), learnt_state(r)) if no_bytes is None else None
        found, models = self._figures(u, r, task, [stream.task(t) for t in sorted(learnt)], checkpoint, never)
        if self.options.shadows:
            shadows = Shadows(maker, self.workshop.build, self.workshop.forget, self.options.lira, self.say)
            found |= shadow_figures(shadows, models, self.certificate, task, learnt, self.options.shadows)
        found["rte"] = _forgetting_time(self.certificate)
        found["relapse"] = self._relapse(never, task, learnt)
        held_by = [component.name for component in holders(u, self.target)]
        checks = checks_of(self.certificate, learnt_state(u), held_by, comparison, no_bytes, found, self._files())
        result = Verification(
            task_id=self.target,
            level=self.certificate["level"],
            method=self.certificate["method"]["used"],
            verdict=verdict(self.certificate["level"], comparison, checks, found),
            checks=tuple(checks),
            comparison=comparison,
            reference=reference,
            figures=found,
            lead=leading_score(models),
            space=models.u.spaces[0],
        )
        self._write(result, stream)
        return result

    # -- models -----------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> Checkpoint:
        found = checkpoint_after(self.run)
        if found is None:
            raise UserError("run", self.run, "holds no finished task", "Nothing can be verified in it")
        return found

    def _maker(self, numerics: Mapping[str, Any]) -> Maker:
        owner = owner_of(self.log)
        names = remove_stale(self.config, self.gone, owner)
        if names:
            self.say(f"references that had learnt a task forgotten since were deleted: {', '.join(names)}")
        shop = self.workshop
        return Maker(self.run, self.config, self.gone, numerics, shop.train, shop.sources, self.say, owner)

    def _reference(self, maker: Maker) -> Reference:
        if self.options.reference is None:
            return maker.obtain()
        found = named(self.options.reference, self.run, self.config, self.gone)
        self.say(f"reference: {found.folder}, as given")
        mine = self.certificate["fingerprint"]
        shared = found.fingerprint.keys() & mine.keys()
        refuse_other_numerics({k: mine[k] for k in shared}, {k: found.fingerprint[k] for k in shared})
        return found

    def _never(self, reference: Reference, learnt: Sequence[int]) -> _Never:
        found = checkpoint_after(reference.folder, learnt)
        if found is None:
            raise UserError(
                "--reference", reference.folder, f"has no state after exactly the tasks {list(learnt)}",
                "Let it learn as far as the run has, or leave --reference out",
            )  # fmt: skip
        return _Never(reference.folder, read_config(reference.folder), found)

    def _other_numerics(self, reference: Reference) -> str | None:
        """Why the bytes cannot be compared; ``None`` if they can."""
        mine = self.certificate["fingerprint"]
        for key in sorted(reference.fingerprint.keys() & mine.keys()):
            if reference.fingerprint[key] != mine[key]:
                here = reference.fingerprint[key]
                return f"the task was forgotten under other numerics ({key} {mine[key]}, here {here})"
        return None

    def _kept_of(self, checkpoint: Checkpoint) -> list[int]:
        """Ids of the kept tasks that a state has learnt, in their order."""
        return [int(task_id) for task_id in checkpoint.state.get("learnt", ()) if task_id not in self.gone]

    def _before(self, learnt: Sequence[int]) -> Checkpoint | None:
        """A checkpoint with the forgotten task and the kept ones, if a file of the run still holds it."""
        for checkpoint in checkpoints(self.run):
            if self.target in checkpoint.state.get("learnt", ()) and self._kept_of(checkpoint) == list(learnt):
                return checkpoint
        return None

    def _files(self) -> list[str]:
        """Checkpoints that still count the task as learnt."""
        return [
            f"checkpoints/task_{checkpoint.position}"
            for checkpoint in checkpoints(self.run)
            if self.target in checkpoint.state.get("learnt", ())
        ]

    # -- numbers ----------------------------------------------------------------------------------------------------

    def _figures(
        self,
        u: ContinualLearner,
        r: ContinualLearner,
        task: Task,
        kept: Sequence[Task],
        checkpoint: Checkpoint,
        never: _Never,
    ) -> tuple[dict[str, Sides], Models]:
        build, config, before = self.workshop.build, self.config, self._before(self._kept_of(checkpoint))
        self.say("answers of the models are compared")
        o_answers: Answers | None = None
        if before is not None:
            o_answers = ask(restored(config, before, build), task, kept)
        seed = int(self.config.get("seed") or 0)
        known = recorded_accuracies(self.run, self.target, {each.task_id: len(each.test) for each in kept})
        models = Models(ask(u, task, kept), o_answers, ask(r, task, kept), seed=seed, recorded=known)
        found = figures(models)
        target = target_of(found[f"forget_acc_test_{models.u.spaces[0]}"].o)
        self.say(f"the task is relearnt on copies that are thrown away, at most {RELEARNING_STEPS[-1]} steps each")

        def steps(make: Callable[[], ContinualLearner] | None) -> Measured:
            if make is None:
                return undefined(NO_ORIGINAL)
            return undefined(str(target.reason)) if target.value is None else relearn(make(), task, target.value)

        relearnt = Sides(
            o=steps(None if before is None else lambda: restored(config, before, build)),
            u=steps(lambda: restored(config, checkpoint, build)),
            r=steps(lambda: restored(never.config, never.checkpoint, build)),
        )
        return found | relearning(relearnt, target), models

    def _relapse(self, never: _Never, task: Task, learnt: Sequence[int]) -> Sides:
        nothing = undefined("it is a figure of the model that forgot")
        if self.certificate["level"] != "approximate":
            return Sides(nothing, undefined("only an approximate method can have one"), nothing)
        entry = next((entry for entry in records.read(self.run).entries if entry.task_id == self.target), None)
        after = None if entry is None else entry.after_task
        found = relapse_of(
            (self.run, self.config), (never.folder, never.config), task, learnt, after, self.workshop.build
        )
        return Sides(nothing, found, nothing)

    # -- record -----------------------------------------------------------------------------------------------------

    def _write(self, result: Verification, stream: Stream) -> None:
        made = {
            **self.certificate,
            "verification": result.to_json(),
            "reference": result.reference_json(),
        }
        certificates.seal(made, self.run / "unlearning", self.log, "verified", stream.class_names)
        kept_apart = _anchor_of(self.config)
        if kept_apart is not None:
            anchor(kept_apart, self.log, made["request_id"])


def _forgetting_time(certificate: Mapping[str, Any]) -> Sides:
    seconds = float(certificate["cost"]["seconds"])
    nothing = undefined("only the model that forgot has it")
    return Sides(nothing, Measured(seconds), nothing)
