from dataclasses import dataclass
from pathlib import Path

import pytest

from cl_platform.config import setting, typed
from cl_platform.errors import UserError, nearest, unknown_name


@dataclass(frozen=True)
class Inner:
    rate: float = setting(0.5, doc="a share", min=0, max=1)
    most: int | None = setting(None, doc="an upper bound")


@dataclass(frozen=True)
class Example:
    count: int = setting(3, doc="how many", min=1)
    name: str | None = setting(None, doc="a name", choices=("a", "b"))
    order: str | int | list[int] = setting("natural", doc="an order")
    inner: Inner = setting(factory=Inner)
    layers: list[int] = setting(factory=list)


def test_values_become_typed_fields():
    built = typed(Example, {"count": 2.0, "inner": {"rate": "1e-1"}, "layers": [1, 2], "order": 7})
    assert built == Example(count=2, inner=Inner(0.1), layers=[1, 2], order=7)


def test_a_union_keeps_the_type_that_was_given():
    assert typed(Example, {"order": "seeded"}).order == "seeded"
    assert typed(Example, {"order": [3, 1]}).order == [3, 1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cuont": 3}, ["x.cuont", "unknown key", "x.count"]),
        ({"count": 0}, ["x.count=0", "at least 1"]),
        ({"count": "three"}, ["x.count=three", "whole number"]),
        ({"count": True}, ["x.count=true", "whole number", "such as x.count=10"]),
        ({"count": None}, ["x.count=null", "whole number"]),
        ({"name": True}, ["x.name=true", "must be one of a, b"]),
        ({"order": True}, ["x.order=true", "must be a text, a whole number or a list."]),
        ({"order": ["a"]}, ["x.order[0]=a", "whole number"]),
        ({"inner": {"rate": -1}}, ["x.inner.rate=-1:", "at least 0"]),
        ({"inner": {"most": "many"}}, ["x.inner.most=many", "a whole number or null"]),
        ({"name": "c"}, ["x.name=c", "a, b"]),
        ({"inner": {"rate": 2}}, ["x.inner.rate=2", "at most 1"]),
        ({"inner": 4}, ["x.inner=4", "group of keys"]),
        ({"layers": 3}, ["x.layers=3", "list"]),
        ({"layers": ["a"]}, ["x.layers[0]=a", "whole number"]),
    ],
)
def test_wrong_values_are_refused_by_the_key_as_typed(values, words):
    with pytest.raises(UserError) as refused:
        typed(Example, values, "x")
    line = str(refused.value)
    assert "\n" not in line
    for word in words:
        assert word in line


def test_a_value_without_default_is_asked_for():
    @dataclass(frozen=True)
    class Needed:
        path: str = setting(doc="a folder")

    with pytest.raises(UserError, match="a value is needed"):
        typed(Needed, {}, "y")


def test_near_names_come_first():
    assert nearest("coda_promt", ["coda_prompt", "nmc"])[0] == "coda_prompt"
    assert "Did you mean derpp" in str(unknown_name("strategy", "derp", ["derpp", "finetune"]))


def test_a_key_may_be_a_word_of_pythons_own():
    @dataclass(frozen=True)
    class Penalty:
        lambda_: float = setting(1.0, min=0)
        kept_: int = setting(2)

    assert typed(Penalty, {"lambda": 3, "kept_": 4}, "strategy.ewc") == Penalty(3.0, 4)
    with pytest.raises(UserError, match=r"strategy\.ewc\.lambda=-1.*must be at least 0"):
        typed(Penalty, {"lambda": -1}, "strategy.ewc")
    with pytest.raises(UserError, match="known are kept_, lambda. Did you mean strategy.ewc.lambda"):
        typed(Penalty, {"lamda": 1}, "strategy.ewc")


def test_a_key_that_would_change_nothing_is_refused():
    @dataclass(frozen=True)
    class Mixed:
        loss: str = setting("mean", choices=("mean", "sum"))
        weight: float = setting(1.0, only_with=("loss", ("sum",)))

    assert typed(Mixed, {"weight": 1.0}, "strategy.er").weight == 1
    assert typed(Mixed, {"weight": 2.0, "loss": "sum"}, "strategy.er").weight == 2
    with pytest.raises(UserError, match=r"strategy\.er\.weight=2\.0: is read only where strategy\.er\.loss is sum"):
        typed(Mixed, {"weight": 2.0}, "strategy.er")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        ([0, "cat", None], "[0,cat,null]"),
        (("a", [True]), "[a,[true]]"),
        ({"a": None, "b": {"c": [1]}}, "{a:null,b:{c:[1]}}"),
        (Path("data") / "x", "data/x"),
        (list(range(100)), "[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,...,99]"),
    ],
)
def test_a_message_shows_a_value_as_it_is_typed(value, shown):
    assert str(UserError("x.key", value, "is wrong", "Change it")) == f"x.key={shown}: is wrong. Change it."
