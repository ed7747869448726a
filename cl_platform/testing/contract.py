"""The contract of a strategy as checks: the list of them, and the ways to run them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from cl_platform.errors import UserError, unknown_name
from cl_platform.testing.failures import Breach, ContractError, Failure, NotReady, cause
from cl_platform.testing.given import Checked, Keys, given
from cl_platform.testing.trials import Trials


class Check(Protocol):
    """One promise; raises :class:`ContractError` where it is broken."""

    __name__: str

    def __call__(self, strategy: Checked, config: Keys | None = None) -> None:
        """Check a strategy; the arguments are those of :func:`check_strategy`."""
        ...


CHECKS: dict[str, Check] = {}
"""All checks by name."""

LEADING = (
    "check_config_is_a_dataclass_with_defaults", "check_trains", "check_answers_are_logits_of_the_seen_classes",
    "check_learns", "check_seeds_reproduce", "check_state_is_restored", "check_evaluation_changes_nothing",
)  # fmt: skip
"""Checks that are run first: what they say explains failures of others, which are not told then."""

_looks: dict[str, Callable[[Trials], None]] = {}
_last: list[tuple[Any, Trials]] = []


def promise(look: Callable[[Trials], None]) -> Check:
    """Decorator: make a check of a function that looks at the trials and raises a ``Breach``; it is run by its name."""

    @functools.wraps(look)
    def check(strategy: Checked, config: Keys | None = None) -> None:
        trials = _trials(strategy, config)
        if look.__name__ != LEADING[0]:
            trials.build()
        failure = _failure(look, trials)
        if failure is not None:
            raise ContractError(trials.given.label, [failure], 1)

    del check.__wrapped__  # type: ignore[attr-defined]  # its arguments are its own
    check.__annotations__ = {"strategy": Checked, "config": Keys | None, "return": None}
    CHECKS[look.__name__], _looks[look.__name__] = check, look
    return check


def _failure(look: Callable[[Trials], None], trials: Trials, failed: Sequence[str] = ()) -> Failure | None:
    """What is wrong; ``None`` if nothing is, or if a check that failed before has said it."""
    name = look.__name__
    try:
        look(trials)
    except NotReady as missing:
        if missing.by in failed:
            return None
        return Failure(name, missing.seen, missing.todo)
    except Breach as breach:
        return Failure(name, breach.seen, breach.todo)
    except UserError:
        raise
    except Exception as error:
        return Failure(name, f"it raised {cause(error)}", "Mend it there")
    return None


def _trials(strategy: Checked, config: Keys | None) -> Trials:
    """The trials of a strategy; those of the one that was asked for last are kept, so that checks share trainings."""
    found = given(strategy, config)
    if not _last or _last[0][0] != found:
        _last[:] = [(found, Trials(found))]
    return _last[0][1]


def check_strategy(
    strategy: Checked,
    config: Keys | None = None,
    *,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
) -> None:
    """Hold a strategy against its contract, on three tasks of the digits and a small vision transformer.

    Args:
        strategy: a class of a strategy, registered or not; a registered name; or a list of these for strategies that
            work together, in the order of ``strategy=[A,B]``. A strategy that needs a replay buffer stands behind
            ``er`` where nothing else was asked for.
        config: keys of the strategy, as below ``strategy.NAME`` of a run; for a list, names with keys below them. Keys
            that are left out are those of the yaml file or plug-in. ``optimizer`` is the update rule.
        only: names of the checks to run; all by default. See :func:`strategy_checks`.
        skip: names of checks to leave out.

    Raises:
        ContractError: promises that are broken; one message for each check.
        UserError: an unknown name or key, or strategies that cannot stand side by side.
    """
    known = dict(strategy_checks())
    only = list(known) if only is None else [only] if isinstance(only, str) else list(only)
    skip = [skip] if isinstance(skip, str) else list(skip)
    for key, names in (("only", only), ("skip", skip)):
        for name in names:
            if name not in known:
                raise unknown_name(key, name, known)
    wanted = [name for name in known if name in only and name not in skip]
    trials = _trials(strategy, config)
    failures: list[Failure] = []
    for name in wanted:
        failure = _failure(_looks[name], trials, [failure.check for failure in failures])
        if failure is not None:
            failures.append(failure)
        if name == LEADING[0]:
            if failures:
                break  # nothing can be built
            trials.build()
    _last.clear()
    if failures:
        raise ContractError(trials.given.label, failures, len(wanted))


def strategy_checks() -> Iterator[tuple[str, Check]]:
    """Name and check of every promise, to parametrise a test over; ``check(MyStrategy)`` raises or returns nothing."""
    for name in (*LEADING, *(name for name in CHECKS if name not in LEADING)):
        yield name, CHECKS[name]


def parametrize_with_checks(strategies: Sequence[Any]) -> Any:
    """A pytest mark that runs the decorated test, with arguments ``strategy`` and ``check``, for every pair of them.

    Args:
        strategies: each as :func:`check_strategy` takes it.

    ::

        @parametrize_with_checks([MyStrategy])
        def test_the_contract(strategy, check):
            check(strategy)
    """
    import pytest

    pairs = [
        pytest.param(strategy, check, id=f"{_label(strategy)}-{name}")
        for strategy in strategies
        for name, check in strategy_checks()
    ]
    return pytest.mark.parametrize("strategy, check", pairs)


def _label(strategy: Any) -> str:
    listed = strategy if isinstance(strategy, (list, tuple)) else [strategy]
    return "+".join(entry if isinstance(entry, str) else getattr(entry, "__name__", str(entry)) for entry in listed)
