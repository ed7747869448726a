"""The platform from Python: a stream, :func:`fit`, and a :class:`Run` that answers and forgets."""

from __future__ import annotations

import dataclasses
import json
import logging
import numbers
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cl_platform.strategies  # noqa: F401  # registers them: a clash of names is then the other's
from cl_platform import plugins, registry
from cl_platform.callbacks.interruption import Interrupted
from cl_platform.cli.compose import compose, config_folder, groups
from cl_platform.config import defaults_of
from cl_platform.errors import UserError
from cl_platform.requests import paused
from cl_platform.run import run
from cl_platform.run_config import parse
from cl_platform.scenarios import DataConfig, ScenarioConfig, Stream, TransformConfig, build_stream
from cl_platform.scenarios.given import kind_of
from cl_platform.strategies import Strategy
from cl_platform.trained import Trained
from cl_platform.unlearning.engine import Wish
from cl_platform.unlearning.verify import Options
from cl_platform.unlearning.verify import verify as verified
from cl_platform.verifying import workshop

if TYPE_CHECKING:
    from cl_platform.unlearning.verify import Verification

log = logging.getLogger("cl_platform")

Choice = str | type[Strategy] | Strategy
"""A strategy by its name, its class, or an instance whose ``config`` says what its keys are."""
LOOKS = tuple(field.name for field in dataclasses.fields(TransformConfig))
"""Keys of ``scenario`` that say how images are looked at; the others say which tasks there are."""
FREE = (*LOOKS, "skip_tasks", "boundaries", "online")
"""Keys of ``scenario`` that a run can set although its stream was given."""


def stream_from_folder(
    path: str | Path,
    num_tasks: int,
    *,
    setting: str = "class",
    class_order: int | str | Sequence[int | str] = "natural",
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    validation_share: float = 0.0,
    test_share: float | None = None,
    image_size: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_corrupt: bool = False,
    online: bool = False,
    seed: int = 0,
) -> Stream:
    """The stream of your own images, as ``scenario=image_folder`` reads them; the arguments are that scenario's keys.

    Args:
        path: ``{train,test}/<class>/*``, or a data set saved by the library datasets.
        num_tasks: divides the number of classes.
        setting: ``class``, ``domain`` or ``task``.
        class_order: ``natural``, a seed, a list of names or ids, or a file of these.
        train_per_class: training images kept per class, the first in order.
        test_per_class: the same for test images.
        validation_share: share of each class held out of training.
        test_share: share of each class used for testing where the data have no test split.
        image_size: side of the stored images in pixels; None: as in the files, 256 where they differ or are larger.
        image_column: of a saved data set, where it cannot be told.
        label_column: the same.
        skip_corrupt: leave unreadable images out instead of refusing them.
        online: whether every task is passed over once.
        seed: keys the validation draw; :func:`fit` draws with the seed of the run.

    Raises:
        UserError: images that are not there or cannot be read, or classes that do not divide into the tasks.
    """
    scenario = ScenarioConfig(
        kind="image_folder", path=str(Path(path).expanduser().resolve()), num_tasks=num_tasks, setting=setting,
        class_order=class_order if isinstance(class_order, (int, str)) else tuple(class_order),
        train_per_class=train_per_class, test_per_class=test_per_class, validation_share=validation_share,
        test_share=test_share, image_size=image_size, image_column=image_column, label_column=label_column,
        online=online,
    )  # fmt: skip
    return build_stream(scenario, DataConfig(skip_corrupt=skip_corrupt), seed)


def fit(
    stream: Stream | str,
    strategy: Choice | Sequence[Choice] | None = None,
    *overrides: str | Mapping[str, Any],
    run_dir: str | Path | None = None,
    seed: int = 0,
) -> Run:
    """Train on a stream as ``train.py`` does, with a line for each task in place of progress bars.

    The run folder holds all that ``train.py`` leaves. A stream that was built from a configuration is built again with
    the run's seed, and commands such as ``unlearn`` can be given the folder. Any other stream is known to this process
    alone: give it again to :meth:`Run.open`.

    Args:
        stream: what to learn, or a scenario's name.
        strategy: one strategy or several that act as one, by name, class or instance; a class of one's own needs no
            registration. None: ``coda_prompt``, or what an ``experiment=`` chooses.
        overrides: further keys, as texts (``trainer.max_epochs=1``) or mappings (``{"trainer.max_epochs": 1}``).
        run_dir: the run folder; None: ``outputs/<scenario>/<strategy>/<date>_<time>``.
        seed: of everything drawn in the run.

    Raises:
        UserError: what ``train.py`` would refuse in one line; nothing is left on disk then.
        KeyboardInterrupt: after the running step; finished tasks are kept, and it says how to go on.
    """
    words = _words(overrides)
    ours = [f"seed={_typed(seed)}", "trainer.progress=false"]
    raw = compose([*_scenario(stream), *_strategies(strategy), *ours, *words])
    given = None
    if isinstance(stream, Stream):
        keys = [word.partition("=")[0].lstrip("+~") for word in words]
        touched = {key.removeprefix("scenario.") for key in keys if key.startswith("scenario.")}
        if stream.recipe is None:
            given = stream
            raw["scenario"] = _of_given(stream, raw["scenario"], touched)
        else:
            raw["scenario"] = _of_recipe(stream.recipe.scenario, raw["scenario"], touched)
            raw["data"] = {**raw["data"], **_plain(stream.recipe.data)}
    if run_dir is not None:
        raw["run_dir"] = str(run_dir)
    config = dataclasses.replace(parse(raw), given=given)
    with _whole_log():
        try:
            result = run(config)
        except Interrupted as stop:
            if stop.exit_code != 128 + signal.SIGINT:
                raise
            again = f"stopped; to go on: the same call with run_dir={str(stop.folder)!r} and 'resume=auto'"
            raise KeyboardInterrupt(again) from None
    return Run.open(result.path, stream=given)


class Run(Trained):
    """A run folder opened for use: what was learnt answers images, is measured, and forgets tasks.

    :func:`fit` gives one, ``Run.open(FOLDER)`` any other; what it can be asked beside that stands in
    :class:`~cl_platform.trained.Trained`.
    """

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of ``metrics.json``: id -> entry with ``value`` and, where it has none, ``reason``.

        Raises:
            UserError: the run was not finished.
        """
        file = self.path / "metrics.json"
        if not file.is_file():
            raise UserError("run", self.path, "was not finished, so it has no metrics.json", "Go on with resume=auto")
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    def forget(self, task_id: int, method: str = "auto", accept: str = "E-bit") -> dict[str, Any]:
        """Forget a task, in this object and in the run folder.

        Args:
            task_id: the task.
            method: ``auto``, ``drop``, ``rollback`` (learns later tasks again, which may take long) or
                ``approximate:<name>``.
            accept: ``E-law`` lets ``auto`` take a cheaper way of equal distribution.

        Returns:
            the certificate, as in ``unlearning/certificate.json``; ``level`` says what may be claimed.

        Raises:
            UserError: the task cannot be forgotten, or not so.
        """
        with _whole_log(), paused(self.path, self.config.given) as folder:
            certificate = folder.carry_out(Wish(task_id, method, accept=accept, key="task_id"))
        vars(self).update(vars(type(self).open(self.path, str(self.device), self.config.given)))
        return dict(certificate)

    def verify(self, shadows: int = 0, say: Callable[[str], None] = log.info) -> Verification:
        """Compare the run with one that never learnt the task forgotten last, which is trained unless it is cached.

        Args:
            shadows: further models for the attack by each image's own spread.
            say: hears what it costs.

        Raises:
            UserError: nothing was forgotten.
        """
        with _whole_log():
            return verified(self.path, workshop(self.config.given), Options(shadows=shadows), say)


# -- stream ---------------------------------------------------------------------------------------------------------


def _scenario(stream: Stream | str) -> list[str]:
    if isinstance(stream, str):
        return [f"scenario={stream}"]
    if not isinstance(stream, Stream):
        raise UserError(
            "stream", type(stream).__name__, "must be a stream or a scenario's name",
            "Make one with stream_from_folder, stream_from_datasets or stream_from_avalanche",
        )  # fmt: skip
    kind = None if stream.recipe is None else stream.recipe.scenario.kind
    return [f"scenario={kind}"] if kind in groups()["scenario"] else []


def _of_recipe(recipe: ScenarioConfig, group: Mapping[str, Any], touched: set[str]) -> dict[str, Any]:
    """The keys of ``scenario`` of a stream that a configuration says; keys of the call win, looks are the group's."""
    plain = ScenarioConfig(kind=recipe.kind)
    own = {
        key: value for key, value in _plain(recipe).items()
        if key not in touched and (key not in LOOKS or getattr(recipe, key) != getattr(plain, key))
    }  # fmt: skip
    return {**group, **own}


def _of_given(stream: Stream, group: Mapping[str, Any], touched: set[str]) -> dict[str, Any]:
    """The keys of ``scenario`` of a stream that no configuration says.

    Raises:
        UserError: a key that would have to make the stream anew.
    """
    if "/" in stream.name or stream.name.startswith("."):
        raise UserError("stream", stream.name, "the name cannot be that of a folder", "Give it another name")
    fixed = sorted(touched - set(FREE))
    if fixed:
        raise UserError(
            f"scenario.{fixed[0]}", group.get(fixed[0]), "the stream was given and stays as it is",
            "Give this to the function that makes the stream",
        )  # fmt: skip
    own = {
        "kind": kind_of(stream),
        "num_tasks": stream.planned,
        "setting": stream.setting,
        "online": stream.online,
        "boundaries": "hidden" if stream.hidden else "shown",
        "skip_tasks": [],
    }
    return {**own, **{key: group[key] for key in FREE if key in LOOKS or key in touched}}


def _plain(config: Any) -> dict[str, Any]:
    """Fields of a flat dataclass as a configuration file takes them."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


# -- strategies -----------------------------------------------------------------------------------------------------


def _strategies(chosen: Choice | Sequence[Choice] | None) -> list[str]:
    """The words of a command line that choose the strategies and set their keys."""
    if chosen is None:
        return []
    if isinstance(chosen, str) and chosen.startswith("["):
        return [f"strategy={chosen}"]
    listed = [chosen] if isinstance(chosen, (str, type, Strategy)) else list(chosen)
    names, keys = [], []
    for each in listed:
        name = each if isinstance(each, str) else _registered(each if isinstance(each, type) else type(each))
        if isinstance(each, str) and each in registry.strategies and each not in groups()["strategy"]:
            plugins.offer(registry.strategies, each)  # registered by the script or notebook that calls
        if isinstance(each, Strategy):
            keys += _words([{f"strategy.{name}": _nested(each.config)}])
        names.append(name)
    return [f"strategy={names[0]}" if len(names) == 1 else f"strategy=[{','.join(names)}]", *keys]


def _registered(cls: type) -> str:
    """The name under which a class can be chosen; one that has none gets that of the class."""
    if not issubclass(cls, Strategy):
        raise UserError("strategy", cls.__name__, "is no strategy", "Derive the class from cl_platform.Strategy")
    if not vars(cls).get("name"):  # an inherited name is another's
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
    registry.strategies.register(cls.name)(cls)
    if not (config_folder() / "strategy" / f"{cls.name}.yaml").exists():
        plugins.offer(registry.strategies, cls.name)  # again after a change, as in a notebook
    return cls.name


def _nested(config: Any) -> dict[str, Any]:
    """Keys and values of an instance of a ``Config``; the field ``lambda_`` is the key ``lambda``."""
    names = defaults_of(type(config))
    fields = [field.name for field in dataclasses.fields(config) if field.init]
    values = [getattr(config, field) for field in fields]
    return {
        key: _nested(value) if dataclasses.is_dataclass(value) else value
        for key, value in zip(names, values, strict=True)
    }


# -- keys -----------------------------------------------------------------------------------------------------------


def _words(overrides: Sequence[str | Mapping[str, Any]]) -> list[str]:
    """Overrides as the words of a command line."""
    words: list[str] = []
    for given in overrides:
        if isinstance(given, str):
            words.append(given)
        elif isinstance(given, Mapping):
            words += [f"{key}={_typed(value)}" for key, value in _flat(given)]
        else:
            raise UserError("overrides", given, "must be texts or mappings", "Write 'trainer.max_epochs=1'")
    for word in words:
        for argument in ("strategy", "scenario"):
            if word.startswith(f"{argument}="):
                said = "first argument" if argument == "scenario" else "second argument"
                raise UserError(argument, word.partition("=")[2], f"is the {said} of fit", "Give it there")
    return words


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _typed(value: Any) -> str:
    """A value as a command line takes it: texts in quotes unless they are plain names."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value))
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_typed(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_typed(inner) for inner in value) + "]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_]\w*", text) and text.lower() not in ("null", "true", "false", "inf", "nan"):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


# -- log ------------------------------------------------------------------------------------------------------------


class _Onward(logging.Handler):
    """Hands records on to the handlers of the program that uses the package."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger().callHandlers(record)


@contextmanager
def _whole_log() -> Iterator[None]:
    """``run.log`` gets every line inside the block, while the calling program sees no more than it asked for."""
    before = log.level
    if not log.propagate:  # a command, which has arranged its own
        yield
        return
    onward = _Onward(log.getEffectiveLevel())
    log.setLevel(logging.DEBUG)
    log.addHandler(onward)
    log.propagate = False
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(onward)
        log.propagate = True
