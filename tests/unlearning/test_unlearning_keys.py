"""The keys below ``unlearning``: groups of approximate methods, requests, and what is no key."""

import dataclasses

import pytest

from cl_platform.cli.compose import compose, groups
from cl_platform.errors import UserError
from cl_platform.registry import unlearning_methods
from cl_platform.run_config import parse
from cl_platform.unlearning.approximate import build_method


def test_every_approximate_method_has_its_yaml_and_every_yaml_its_method():
    assert groups()["unlearning"] == sorted(["default", *unlearning_methods.names()])


@pytest.mark.parametrize("name", unlearning_methods.names())
def test_a_methods_yaml_holds_the_defaults_of_its_keys(name):
    config = parse(compose([f"unlearning={name}"])).unlearning
    assert config.method == f"approximate:{name}"
    assert build_method(name, config.methods[name]).config == build_method(name).config


def test_a_key_of_a_method_reaches_it():
    config = parse(compose(["unlearning=salun", "unlearning.salun.q=0.25"])).unlearning
    assert build_method("salun", config.methods["salun"]).config.q == 0.25


def test_requests_are_read_as_a_list():
    text = "unlearning.requests=[{after_task: 3, forget: 1}, {after_task: 4, forget: 0, method: drop}]"
    found = parse(compose([text])).unlearning.requests
    assert [dataclasses.astuple(request) for request in found] == [(3, 1, None), (4, 0, "drop")]


@pytest.mark.parametrize(
    "words, said",
    [
        (["+unlearning.salum.q=1"], "Did you mean unlearning.salun"),
        (["unlearning.method=approximate"], "needs a name; known are"),
        (["unlearning.method=approximate:salum"], "Did you mean approximate:salun"),
        (["unlearning.method=rolback"], "Did you mean rollback"),
        (["unlearning.accept=all"], "must be one of E-bit, E-law"),
        (["unlearning.requests=[3]"], r"unlearning.requests\[0\]=3: must be a group of keys"),
    ],
)
def test_what_is_no_key_or_no_way_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        parse(compose(words))
