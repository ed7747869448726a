"""A composition is the sum of its parts because losses add, each with a weight of its own, and a role has one owner."""

import itertools

import pytest
import torch
from tiny import differing

import cl_platform.strategies  # noqa: F401  registers the strategies
from cl_platform import registry
from cl_platform.config import typed
from cl_platform.errors import UserError
from cl_platform.strategies import build_strategies
from cl_platform.strategies.base import ROLES

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
BASES = {
    "finetune": {},
    "er": {"buffer": {"size": 24}},
    "er_ace": {"buffer": {"size": 24}},
    "derpp": {"buffer": {"size": 24}},
    "icarl": {"buffer": {"size": 12}},
}
WEIGHTLESS = {
    "ewc": {"lambda": 0},
    "l2": {"lambda": 0},
    "si": {"c": 0},
    "lwf": {"alpha": 0},
    "feature_distillation": {"alpha": 0},
    "bfp": {"alpha": 0, "rows": "current_only"},
}
PLUG_INS = {
    "ewc": {"lambda": 50.0, "fisher": "empirical", "fisher_samples": 4},
    "feature_distillation": {},
    "bfp": {},
    "lwf": {},
    "l2": {"lambda": 0.5},
}
_ALONE: dict = {}


def nudged(bench):
    draw = torch.Generator().manual_seed(5)
    for name, parameter in bench.learner.named_parameters():
        if parameter.requires_grad and "projector" not in name:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return bench


def own_state(bench, base):
    """What base strategy, backbone and head have learnt."""
    own = ("head.", "backbone.", f"composition.members.{base}.")
    return {name: tensor for name, tensor in bench.learner.state_dict().items() if name.startswith(own)}


# -- losses add -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plug_in", WEIGHTLESS)
@pytest.mark.parametrize("base", ["er", "derpp", "icarl"])
def test_a_plug_in_without_weight_leaves_every_byte_of_its_partner(learner_of, base, plug_in):
    if base not in _ALONE:
        _ALONE[base] = own_state(learner_of({base: BASES[base]}, **SGD).learn(0, 1, epochs=1), base)
    beside = learner_of({base: BASES[base], plug_in: WEIGHTLESS[plug_in]}, **SGD).learn(0, 1, epochs=1)
    assert not differing(_ALONE[base], own_state(beside, base))


@pytest.mark.parametrize(
    ("base", "names"),
    [
        ("er", ["ewc", "feature_distillation", "bfp"]),
        ("derpp", ["bfp", "feature_distillation", "lwf"]),
        ("er_ace", ["l2", "bfp"]),
        ("icarl", ["bfp", "ewc"]),
    ],
)
def test_the_order_of_plug_ins_does_not_change_the_loss(learner_of, base, names):
    found = {}
    orders = (names, names[::-1], names[1:] + names[:1])  # each two of them either way round
    for order in dict.fromkeys(map(tuple, orders)):
        bench = learner_of({base: BASES[base], **{name: PLUG_INS[name] for name in order}}, **SGD)
        _, terms = nudged(bench.learn(0, epochs=1).begin(1)).step()
        found[order] = terms
    first = found[tuple(names)]
    for name in names:
        assert [term for term in first if term.startswith(f"{name}/") and first[term].item() > 1e-4], name
    for terms in found.values():
        assert set(terms) == set(first)
        for term, value in terms.items():
            torch.testing.assert_close(value, first[term], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sum(terms.values()), sum(first.values()), rtol=1e-6, atol=1e-6)


def test_a_plug_in_that_draws_for_itself_does_not_change_what_its_neighbours_compare(learner_of):
    sums = []
    for order in (["bfp", "feature_distillation"], ["feature_distillation", "bfp"]):
        keys = {"bfp": {"rows": "fresh"}, "feature_distillation": {}}
        bench = learner_of({"er": BASES["er"], **{name: keys[name] for name in order}}, **SGD)
        sums.append(nudged(bench.learn(0, epochs=1).begin(1)).step()[1])
    assert set(sums[0]) == set(sums[1]) == {"learner/ce", "bfp/features", "feature_distillation/kd"}
    for term, value in sums[0].items():
        torch.testing.assert_close(value, sums[1][term], rtol=1e-6, atol=1e-6)


def test_the_weight_of_a_plug_in_scales_its_term_alone(learner_of):
    once, twice = (
        nudged(learner_of({"er": BASES["er"], "bfp": {"alpha": alpha}}, **SGD).learn(0, epochs=1).begin(1)).step()[1]
        for alpha in (1.0, 2.0)
    )
    assert torch.equal(once["learner/ce"], twice["learner/ce"])
    torch.testing.assert_close(twice["bfp/features"], 2 * once["bfp/features"])


@pytest.mark.parametrize(
    "names", [["derpp", "bfp", "ewc"], ["er", "bfp", "lwf", "si"], ["icarl", "feature_distillation"]]
)
def test_several_together_learn_a_stream(learner_of, names):
    keys = {**{base: BASES[base] for base in names if base in BASES}}
    bench = learner_of({name: keys.get(name, {}) for name in names}, **{**SGD, "lr": 0.02}).learn(0, 1, 2, epochs=1)
    assert bench.logits().shape == (48, 6) and bool(bench.logits().isfinite().all())


# -- owners are unique ------------------------------------------------------------------------------------------------


def roles_of(name):
    cls = registry.strategies.get(name)
    return cls(typed(cls.Config, {}, f"strategy.{name}")).owns


def test_any_two_owners_of_a_role_are_refused_by_their_names_and_the_role():
    names = registry.strategies.names()
    owned = {name: roles_of(name) for name in names}
    pairs = [(a, b) for a, b in itertools.permutations(names, 2) if owned[a] & owned[b]]
    assert pairs
    for a, b in pairs:
        role = next(role for role in ROLES if role in owned[a] & owned[b])
        with pytest.raises(UserError) as caught:
            build_strategies({a: {}, b: {}})
        assert str(caught.value).startswith(f"strategy=[{a},{b}]: {a} and {b} both own the {role}.")
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("pair", "role"),
    [
        (["gem", "agem"], "gradient"),
        (["icarl", "derpp"], "buffer"),
        (["icarl", "er_ace"], "classification"),
        (["icarl", "nmc"], "prediction"),
        (["finetune", "icarl"], "classification"),
        (["er", "der"], "buffer"),
    ],
)
def test_the_pairs_that_people_will_try_share_a_role(pair, role):
    assert role in roles_of(pair[0]) & roles_of(pair[1])
    with pytest.raises(UserError, match=f"{pair[0]} and {pair[1]} both own the"):
        build_strategies({name: {} for name in pair})


@pytest.mark.parametrize("order", [["gdumb", "bfp"], ["bfp", "gdumb"]])
def test_a_projection_to_the_learner_before_is_refused_where_every_fit_begins_anew(learner_of, order):
    with pytest.raises(UserError, match="strategy=.*(gdumb|bfp)"):
        learner_of({name: {} for name in order}, **SGD)
