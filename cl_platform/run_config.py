"""The whole configuration of a run as typed dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cl_platform import plugins, registry
from cl_platform.backbones import BackboneConfig
from cl_platform.config import setting, typed
from cl_platform.errors import UserError, nearest
from cl_platform.optimizers import OptimizerConfig
from cl_platform.scenarios import DataConfig, Extension, ScenarioConfig, Stream
from cl_platform.scenarios.bare import Bare
from cl_platform.unlearning.config import UnlearningConfig, parse_unlearning


@dataclass(frozen=True)
class TrainerConfig:
    """Keys of ``trainer``."""

    max_epochs: int = setting(5, doc="epochs of each task", min=1)
    batch_size: int = setting(16, doc="training images of a batch", min=1)
    accelerator: str = setting("auto", doc="cpu, gpu, mps or auto")
    devices: Any = setting("auto", doc="one device: auto, 1, or its number in a list")
    precision: str = setting("32-true", doc="number format, such as 32-true or bf16-mixed")
    gradient_clip_val: float | None = setting(None, doc="largest global norm of the trained gradients", above=0)
    accumulate_grad_batches: int = setting(1, doc="batches of one update", min=1)
    compile: bool = setting(False, doc="compile the backbone's blocks")
    drop_last: bool = setting(False, doc="leave out the last, smaller batch of an epoch")
    deterministic: bool = setting(True, doc="same bytes for the same seed; slower kernels on a GPU")
    progress: bool = setting(True, doc="show progress bars")
    lightning: dict[str, Any] = setting(factory=dict, doc="anything else for lightning.Trainer")


@dataclass(frozen=True)
class HeadConfig:
    """Keys of ``head``."""

    init: str = setting(
        "trunc_normal", doc="first weights of a head block", choices=("trunc_normal", "zeros", "linear")
    )


C = TypeVar("C")
GRIDS = ("adaptive", "every_step", "every", "boundaries", "off")


@dataclass(frozen=True)
class EvaluationConfig:
    """Keys of ``evaluation``."""

    grid: str = setting("adaptive", doc="when subsets are evaluated: set by evaluation=NAME", choices=GRIDS)
    k: int = setting(10, doc="updates between two evaluations of grid every", min=1)
    max_overhead: float = setting(0.25, doc="adaptive: evaluation's forwards over 3 x training's", above=0)
    max_rate: float = setting(0.1, doc="adaptive: evaluated share of a task's updates", above=0, max=1)
    min_per_task: int = setting(3, doc="adaptive: least evaluations of a task", min=1)
    reserve: float = setting(0.2, doc="adaptive: share of the evaluations kept for following new lows", min=0, max=0.9)
    images_per_task: int | str = setting("auto", doc="evaluation images of each task, or auto: 25 to 100")
    loss: bool = setting(False, doc="loggers also get the mean cross-entropy of each task's subset")
    gap_window: int | None = setting(None, doc="updates after a switch in which a gap is looked for; null: all", min=1)
    gap_tolerance: float = setting(0.02, doc="this far below the old accuracy counts as recovered", min=0, max=1)
    future_tasks: bool = setting(False, doc="also evaluate tasks that were not learnt yet, after each task")
    cache_bytes: int = setting(2**30, doc="bound on kept features and activations", min=0)

    def __post_init__(self) -> None:
        if self.images_per_task != "auto" and not (isinstance(self.images_per_task, int) and self.images_per_task > 0):
            raise UserError(
                "evaluation.images_per_task",
                self.images_per_task,
                "must be auto or a whole number from 1",
                "Write evaluation.images_per_task=auto",
            )


@dataclass(frozen=True)
class DiagnosticsConfig:
    """Keys of ``diagnostics``."""

    gradients: str = setting("off", doc="stability and plasticity gradients: off, or switch", choices=("off", "switch"))
    gradient_updates: int = setting(20, doc="updates after each switch that are decomposed", min=1)
    representation: bool = setting(False, doc="probe, nearest mean and drift of the features after each task")


@dataclass(frozen=True)
class ReportConfig:
    """Keys of ``report``."""

    html: bool = setting(True, doc="write report.html and figures at the end of the run")
    tensorboard_figures: bool = setting(True, doc="matrix, confusion and gap as images in TensorBoard after each task")


@dataclass(frozen=True)
class RunConfig:
    """A run, fully specified. ``raw`` is the resolved configuration as it goes into ``config.yaml``.

    ``given`` is the stream of a run that was started from Python with one; no key of the configuration holds it.
    ``extensions`` are the tasks that were added to the run after it had finished, in their order. ``bare`` stands for
    the stream of a finished run whose data are gone.
    """

    strategy: dict[str, dict[str, Any]]
    scenario: ScenarioConfig
    backbone: BackboneConfig
    trainer: TrainerConfig
    optimizer: OptimizerConfig
    head: HeadConfig
    evaluation: EvaluationConfig
    diagnostics: DiagnosticsConfig
    report: ReportConfig
    data: DataConfig
    logger: dict[str, dict[str, Any]]
    unlearning: UnlearningConfig
    seed: int
    run_dir: str | None
    output_root: str
    resume: str | None
    debug: bool
    raw: dict[str, Any]
    given: Stream | None = field(default=None, repr=False, compare=False)
    extensions: tuple[Extension, ...] = ()
    bare: Bare | None = field(default=None, repr=False, compare=False)

    @property
    def scenario_name(self) -> str:
        """``split_digits``, or the name of a given stream."""
        return self.scenario.kind if self.given is None else self.given.name

    @property
    def strategy_name(self) -> str:
        """``finetune`` or, for a composition, ``derpp+bfp``."""
        return "+".join(self.strategy)


TOP_LEVEL = (
    "strategy", "scenario", "backbone", "trainer", "optimizer", "head", "evaluation", "diagnostics", "report", "data",
    "logger", "unlearning", "extensions",
    "seed", "run_dir", "output_root", "resume", "debug", "plugins", "sweep",
)  # fmt: skip


def parse(raw: Mapping[str, Any]) -> RunConfig:
    """Check a resolved configuration.

    Raises:
        UserError: an unknown key (with the nearest), a wrong type, a value out of range.
    """
    for key in raw:
        if key not in TOP_LEVEL:
            near = nearest(key, TOP_LEVEL)
            raise UserError(key, raw[key], "unknown key", f"Did you mean {near[0]}" if near else "Remove it")
    plugins.load_installed()
    plugins.load(raw.get("plugins"))
    for key in ("run_dir", "output_root"):
        if raw.get(key) == "":
            raise UserError(key, "", "is empty", f"Write {key}=FOLDER, or leave it out")
    strategy = _named_groups(raw, "strategy")
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise UserError("seed", seed, "must be a whole number from 0 to 2^63 - 1", "Write seed=0")
    debug = raw.get("debug", False)
    if not isinstance(debug, bool):
        raise UserError("debug", debug, "must be true or false", "Write debug=true")
    return RunConfig(
        strategy=strategy,
        scenario=typed(_config(registry.scenarios, raw, ScenarioConfig), raw.get("scenario"), "scenario"),
        backbone=typed(_config(registry.backbones, raw, BackboneConfig), raw.get("backbone"), "backbone"),
        trainer=typed(TrainerConfig, raw.get("trainer"), "trainer"),
        optimizer=_optimizer(raw, strategy),
        head=typed(HeadConfig, raw.get("head"), "head"),
        evaluation=typed(EvaluationConfig, raw.get("evaluation"), "evaluation"),
        diagnostics=typed(DiagnosticsConfig, raw.get("diagnostics"), "diagnostics"),
        report=typed(ReportConfig, raw.get("report"), "report"),
        data=typed(DataConfig, raw.get("data"), "data"),
        logger=_named_groups(raw, "logger"),
        unlearning=parse_unlearning(raw.get("unlearning")),
        seed=seed,
        run_dir=raw.get("run_dir"),
        output_root=str(raw.get("output_root") or Path("outputs")),
        resume=raw.get("resume"),
        debug=debug,
        raw={key: value for key, value in raw.items() if key != "sweep"},
        extensions=_extensions(raw.get("extensions")),
    )


def _config(kind: registry.Registry, raw: Mapping[str, Any], shared: type[C]) -> type[C]:
    """The dataclass of the group's keys: a plug-in may have one that widens the shared one."""
    group = raw.get(str(kind.group))
    name = group.get("kind") if isinstance(group, Mapping) else None
    return (kind.config(name) if isinstance(name, str) else None) or shared


def _extensions(listed: Any) -> tuple[Extension, ...]:
    if listed is not None and not isinstance(listed, (list, tuple)):
        raise UserError("extensions", listed, "must be a list of scenarios", "Leave it to the command extend")
    made = []
    for number, entry in enumerate(listed or ()):
        key = f"extensions[{number}]"
        if not isinstance(entry, Mapping) or set(entry) - {"scenario", "data"}:
            raise UserError(key, entry, "must hold the groups scenario and data", "Leave it to the command extend")
        scenario = typed(_config(registry.scenarios, entry, ScenarioConfig), entry.get("scenario"), f"{key}.scenario")
        made.append(Extension(scenario, typed(DataConfig, entry.get("data"), f"{key}.data")))
    return tuple(made)


def _named_groups(raw: Mapping[str, Any], group: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, values in (raw.get(group) or {}).items():
        if values is not None and not isinstance(values, Mapping):
            key = f"{group}.{name}"
            raise UserError(key, values, "must be a group of keys", f"Set keys below it, such as {key}.KEY=VALUE")
        found[name] = dict(values or {})
    return found


def _optimizer(raw: Mapping[str, Any], strategy: Mapping[str, Mapping[str, Any]]) -> OptimizerConfig:
    """The user's keys over those that the first strategy with an ``optimizer`` recommends."""
    recommended: dict[str, Any] = next((dict(v["optimizer"]) for v in strategy.values() if v.get("optimizer")), {})
    given = {key: value for key, value in (raw.get("optimizer") or {}).items() if value is not None}
    if "lr" in given and "lr_per_256" not in given:
        recommended.pop("lr_per_256", None)
    return typed(OptimizerConfig, {**recommended, **given}, "optimizer")
