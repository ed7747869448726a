"""Checks that a strategy is built, learns, and copes with small tasks and numbers."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import torch

from cl_platform.config import defaults_of, typed
from cl_platform.errors import UserError
from cl_platform.evaluation import count_correct
from cl_platform.testing.answering import refuse_odd_answers
from cl_platform.testing.contract import promise
from cl_platform.testing.failures import Breach, expected, listed
from cl_platform.testing.small import Watch, learn, narrow_stream
from cl_platform.testing.trials import Trials
from cl_platform.testing.watches import tasks_in

SIGMAS = 3.0
HALF_NEAR = 0.9
"""Share of the images whose answers under bf16 must be near those in full precision: rounding may tip a hard choice."""


@promise
def check_config_is_a_dataclass_with_defaults(trials: Trials) -> None:
    """``Config`` is a frozen dataclass with types, and its defaults alone build the strategy."""
    for name, cls in zip(trials.given.names, trials.given.classes, strict=True):
        config = cls.Config
        if not (isinstance(config, type) and dataclasses.is_dataclass(config)):
            raise Breach(
                f"{cls.__name__}.Config is {config!r}, which is no dataclass",
                "Put @dataclass(frozen=True) above it, with one typed field a key",
            )
        if not config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            raise Breach(f"{config.__name__} can be written to", "Write @dataclass(frozen=True)")
        needed = [field for field, value in defaults_of(config).items() if value == "???"]
        if needed:
            raise Breach(f"{config.__name__} has no default for {listed(needed)}", "Give every field a default")
        with expected(f"reading the types of {config.__name__}", "Import what they name at the top of the module"):
            typing.get_type_hints(config)
        try:
            made = typed(config, defaults_of(config), f"strategy.{name}")
        except UserError as error:
            raise Breach(f"a default is refused: {error}", "Give it a default of its own type and range") from error
        with expected(f"{cls.__name__}(Config())", "Keep the signature __init__(self, config)"):
            cls(made)


@promise
def check_trains(trials: Trials) -> None:
    """Three tasks are trained and ended without an error."""
    trials.main  # noqa: B018


@promise
def check_learns(trials: Trials) -> None:
    """After three tasks the last one is answered better than any constant answer could, among all classes seen."""
    refuse_odd_answers(trials)
    course = trials.main
    tasks = list(tasks_in(course.phases[-1]))
    counts = count_correct(course.learner, tasks)
    right, total = sum(counts.correct["cil"]), sum(counts.total)
    commonest = max(entry for _, entry in counts.per_class.values())
    chance = commonest / total
    needed = total * chance + SIGMAS * (total * chance * (1 - chance)) ** 0.5
    if right <= needed:
        raise Breach(
            f"after training, {right} of {total} test images of the last task are answered right; answering always "
            f"the commonest class gives {commonest}, and more than {int(needed)} tells learning from luck",
            "See that trainable() yields what losses() or end_task() teach, at a rate above 0. Where it learns but "
            "slowly, recommend a rule for it: optimizer={'name': 'adam', 'lr': 0.003} in config",
        )


@promise
def check_tasks_of_one_class_and_of_one_batch(trials: Trials) -> None:
    """A task of one class, and one of a single batch behind it, are learnt; all numbers stay finite."""
    refuse_odd_answers(trials)
    stream = narrow_stream()
    learner = trials.new(stream=stream)
    phases = learner.composition.arrange(stream.tasks)
    seen: list[int] = []
    for phase in phases:
        kind = {1: "one class", 2: "one batch"}.get(len(phase.task.classes), "several small parts")
        seen = sorted({*seen, *phase.task.classes})
        advice = "Look for a division by a count less one, a variance, or a class that is taken for granted"
        with expected(f"a task of {kind}", advice):
            learn(learner, [phase], [1])
            logits = trials.answers(learner)
        if logits.shape[1] != len(seen):
            raise Breach(f"after a task of {kind} there are {logits.shape[1]} columns of answers for "
                         f"{len(seen)} classes", "Return one column a seen class")  # fmt: skip
        numbers = {"the answers": logits, **learner.state_dict()}
        odd = [name for name, t in numbers.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if odd:
            raise Breach(f"after a task of {kind}, {listed(odd)} held numbers that are not finite", advice)


@promise
def check_bfloat16(trials: Trials) -> None:
    """Training under ``bf16-mixed`` gives finite losses, float32 answers near those in full precision, and float32
    state."""
    losses: list[torch.Tensor] = []

    class Losses(Watch):
        def on_train_batch_end(self, trainer: Any, learner: Any, outputs: Any, *rest: Any) -> None:
            losses.append(outputs["loss"])

    advice = "Compute what half precision cannot do on .float() tensors, outside autocast where a matrix is solved"
    refuse_odd_answers(trials)
    with expected("training under trainer.precision=bf16-mixed", advice):
        learner = trials.half_precision([Losses()]).learner
        logits = trials.answers(learner)
    if any(loss.dtype != torch.float32 or not bool(torch.isfinite(loss)) for loss in losses):
        raise Breach("a loss under bf16 is not a finite float32", advice)
    if logits.dtype != torch.float32 or not bool(torch.isfinite(logits).all()):
        raise Breach(f"answers under bf16 are {logits.dtype}, or not finite", advice)
    half = [name for name, t in learner.state_dict().items() if t.dtype in (torch.bfloat16, torch.float16)]
    if half:
        raise Breach(f"{listed(half)} came to be of half precision", "Keep what is remembered in float32: .float()")
    learner.trainer = trials.main.learner.trainer
    full = trials.answers(learner)
    scale = 0.1 * float(full.amax(1).abs().max())
    near = float(torch.isclose(logits, full, rtol=0.05, atol=scale).all(dim=1).float().mean())
    if near < HALF_NEAR:
        raise Breach(f"only {near:.0%} of the answers under bf16 are near those of the same state in full precision",
                     advice)  # fmt: skip
