"""``python train.py``: compose the configuration, run, print the closing table."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_platform.cli.compose import (
    check_choices,
    compose,
    config_folder,
    explain,
    flat_keys,
    groups,
    load_plugins,
    settled,
    sweep_runs,
)
from cl_platform.cli.failures import our_fault, reader_gone, refused
from cl_platform.cli.sweep import DESK, Outcome, closing_table, outcomes_on, with_experiment
from cl_platform.cli.talk import print_log, warn_of_broken_plugins
from cl_platform.errors import UserError

if TYPE_CHECKING:
    from cl_platform.callbacks.interruption import Interrupted
    from cl_platform.run import RunResult


def main() -> None:
    """Entry point of ``train.py``; ends the process with a documented exit code."""
    sys.exit(train(sys.argv[1:]))


def train(arguments: Sequence[str]) -> int:
    """Run what the arguments ask for.

    Returns:
        0 done, 2 the user's input, 70 a bug of ours, 130, 141 or 143 after Ctrl-C, a closed pipe or SIGTERM.
    """
    # Waiting threads sleep instead of spinning: on a machine that does other work too, spinning made small matrix
    # products on 2 cores ten times slower. Read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = any(a.lower() == "debug=true" for a in arguments)
    try:
        arguments = with_experiment(arguments)
        overrides = [a for a in arguments if not a.startswith("-")]
        _check_flags(arguments)
        warn_of_broken_plugins()
        load_plugins(overrides)
        check_choices(overrides)
        return _with_hydra(list(arguments), overrides)
    except UserError as error:
        return refused(error, debug)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except SystemExit as error:
        return int(error.code or 0)
    except BrokenPipeError:
        return reader_gone()
    except Exception as error:
        return our_fault(error)


def _check_flags(arguments: Sequence[str]) -> None:
    """Refuse a word with a dash that Hydra does not know."""
    names = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r",
             "--multirun", "-m", "--info", "-i", "--experimental-rerun", "--shell-completion", "-sc", "--config-name",
             "-cn", "--config-path", "-cp", "--config-dir", "-cd")  # fmt: skip
    for word in arguments:
        if word.startswith("-") and word.partition("=")[0] not in names:
            raise UserError(word, "", "is no option", "Write KEY=VALUE, see python train.py --help")


def _with_hydra(arguments: list[str], overrides: list[str]) -> int:
    """Hand over to Hydra, which also knows ``--help``, ``--cfg`` and ``--multirun``."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    sweep = any(word in ("-m", "--multirun") for word in arguments)
    if sweep:
        _check_sweep(overrides)
    codes: list[int] = []
    failures: list[Exception] = []  # raised inside the job, Hydra would print a line of its own

    @hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")
    def job(cfg: Any) -> None:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _one_of_many(cfg, list(HydraConfig.get().overrides.task), int(HydraConfig.get().job.num))
            return
        try:
            codes.append(_one_run(OmegaConf.to_container(cfg, resolve=True), arguments))
        except Exception as failure:
            failures.append(failure)

    with _hydras_surroundings(arguments), tempfile.TemporaryDirectory() as desk:
        os.environ[DESK] = desk
        try:
            job()
        except (HydraException, OmegaConfBaseException) as error:
            chosen = [o for o in overrides if o.partition("=")[0] in groups() and "," not in o.partition("=")[2]]
            raise explain(error, overrides, flat_keys(compose(chosen))) from error
        finally:
            outcomes = outcomes_on(Path(desk))
            if outcomes:
                _print_sweep(outcomes)
    if failures and isinstance(failures[0], OmegaConfBaseException):
        raise explain(failures[0], overrides) from failures[0]
    if failures:
        raise failures[0]
    missing = len(sweep_runs(overrides)) - len(outcomes) if sweep else 0
    if missing > 0:
        print(f"{missing} runs of the sweep left no result on this machine", file=sys.stderr)
    return max([*codes, *(outcome.code for outcome in outcomes)], default=0)


@contextmanager
def _hydras_surroundings(arguments: list[str]) -> Iterator[None]:
    """The process's arguments and environment as Hydra needs them; put back afterwards."""
    argv, before = sys.argv, {name: os.environ.get(name) for name in ("HYDRA_FULL_ERROR", DESK)}
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing and exiting
    try:
        yield
    finally:
        sys.argv = argv
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check_sweep(overrides: list[str]) -> None:
    """Refuse a sweep with a run in it that would be refused, before the first one starts."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from cl_platform.run_config import parse
    from cl_platform.strategies.composition import build_strategies

    try:
        runs = sweep_runs(overrides)
    except HydraException as error:
        raise explain(error, overrides) from error
    folders: set[str] = set()
    for words in runs:
        try:
            config = parse(compose(words))
        except OmegaConfBaseException:  # such as ${hydra:job.num}, which only a run in progress can fill in
            continue
        build_strategies(config.strategy)
        if config.run_dir in folders:
            raise UserError(
                "run_dir", config.run_dir, "several runs of the sweep would write there",
                "Leave it out, or put a key into it, such as 'run_dir=runs/${seed}'",
            )  # fmt: skip
        if config.run_dir:
            folders.add(config.run_dir)


def _one_run(raw: Any, arguments: Sequence[str]) -> int:
    from cl_platform.callbacks.interruption import Interrupted

    try:
        result = _run(raw)
    except Interrupted as stop:
        print(f"stopped; to go on after the last finished task: {_again(arguments, stop)}", file=sys.stderr)
        return stop.exit_code
    print_table(result)
    return 0


def _again(words: Sequence[str], stop: Interrupted) -> str:
    """The command that goes on with a stopped run, whatever other runs there are."""
    kept = [word for word in words if not word.startswith(("resume=", "run_dir="))]
    return shlex.join(["python", "train.py", *kept, f"resume={stop.folder or 'auto'}"])


def _one_of_many(cfg: Any, words: Sequence[str], number: int) -> None:
    """One run of a sweep: a line at its end; a failure is said at once and does not stop the others."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from cl_platform.callbacks.interruption import Interrupted

    try:
        outcome = Outcome.of(words, _run(OmegaConf.to_container(cfg, resolve=True)))
        print(outcome.line, flush=True)
    except Interrupted as stop:
        print(f"stopped; the runs before this one are done. To go on with it: {_again(words, stop)}", file=sys.stderr)
        raise SystemExit(stop.exit_code) from stop
    except (UserError, OmegaConfBaseException) as error:
        refusal = error if isinstance(error, UserError) else explain(error, words)
        outcome = Outcome(tuple(words), failure=str(refusal), code=refused(refusal, bool(cfg.get("debug"))))
    except Exception as error:
        outcome = Outcome(
            tuple(words), failure=f"{type(error).__name__}, a fault of cl_platform", code=our_fault(error)
        )
    outcome.leave(number)


def _run(raw: Any) -> RunResult:
    from cl_platform.run import run
    from cl_platform.run_config import parse

    print_log()
    return run(parse(settled(raw)))


def _print_sweep(outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print()
    console.print(closing_table(outcomes))
    console.print("final average accuracy / forgetting in percent, ± the standard deviation over seeds", style="dim")
    for outcome in outcomes:
        if outcome.failure is not None:
            console.print(outcome.line, markup=False, soft_wrap=True)


def print_table(result: RunResult) -> None:
    """Print what a finished run reached and cost."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, title="Results", title_justify="left")
    for label, key in ROWS:
        entry = result.metrics[key]
        shown = f"{100 * entry['value']:.2f} %" if entry["value"] is not None else f"- ({entry['reason']})"
        table.add_row(label, shown)
    cost = result.cost
    speed = cost["samples_per_second"]
    table.add_row("seconds", f"{cost['seconds_total']:.1f}")
    table.add_row("training samples/s", f"{speed:.0f}" if speed else "-")
    table.add_row("trainable parameters", f"{cost['params_trainable']:,}")
    console = Console()
    console.print(table)
    console.print(f"run folder: {result.path}", markup=False, highlight=False, soft_wrap=True)


ROWS = (
    ("final average accuracy", "acc"),
    ("average incremental accuracy", "aia"),
    ("forgetting", "forgetting"),
    ("backward transfer (BWT)", "bwt"),
)
