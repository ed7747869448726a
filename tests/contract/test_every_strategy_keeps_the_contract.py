"""Every registered strategy keeps the contract that strategies of others are held against."""

import re

import pytest

from cl_platform import registry
from cl_platform.cli.sweep import with_experiment
from cl_platform.testing import check_strategy

COMPANY = {"bfp": ["derpp", "bfp"], "fpf": ["derpp", "fpf"], "clpu": ["clpu", "derpp"]}
"""What a strategy is run with in experiment=smoke_grid, where it does not stand alone."""


@pytest.mark.parametrize("name", registry.strategies.names())
def test_a_built_in_strategy_keeps_the_contract(name):
    check_strategy(COMPANY.get(name, name))


def test_company_is_that_of_the_smoke_grid():
    (words,) = [w for w in with_experiment(["experiment=smoke_grid"]) if w.startswith("strategy=")]
    lists = re.findall(r"\[([a-z0-9_]+(?:,[a-z0-9_]+)+)\]", words.partition("=")[2].strip("[]").join("[]"))
    assert all(entry in lists for entry in map(",".join, COMPANY.values())), words
