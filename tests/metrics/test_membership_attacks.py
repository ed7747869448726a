"""Membership inference: every figure on a worked example, against brute force, and on a model that memorised."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from cl_platform.metrics import attacks as a

MEMBERS = torch.tensor([0.9, 0.8, 0.8, 0.4, 0.3])
OTHERS = torch.tensor([0.8, 0.5, 0.3, 0.2])
SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=12).map(lambda v: torch.tensor(v, dtype=torch.float64))


def near(value: float, tolerance: float = 1e-9):
    return approx(value, abs=tolerance, rel=0)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_auc_advantage_and_hits_of_a_worked_example():
    assert a.mia_auc(MEMBERS, OTHERS).value == near(0.725)
    assert a.mia_adv(MEMBERS, OTHERS).value == near(0.35)
    assert [a.tpr_at(MEMBERS, OTHERS, limit) for limit in (0.25, 0.5, 0)] == [near(0.6), near(0.8), near(0.2)]
    assert a.mia_tpr_at_1fpr(MEMBERS, OTHERS).reason == "needs >= 100 non-members, has 4"


def test_equal_scores_tell_nothing():
    same = torch.ones(7)
    assert a.mia_auc(same, same[:3]).value == 0.5
    assert a.mia_adv(same, same[:3]).value == 0
    assert a.tpr_at(same, same[:3], 0.5) == 0


def test_hits_at_one_percent_of_false_alarms_need_a_hundred_non_members():
    members = double(0.99, 0.9, 0.8, 0.8, 0.7, *[0.05] * 5)
    others = double(0.95, 0.85, 0.75, *[0.1] * 197)
    assert a.mia_tpr_at_1fpr(members, others).value == near(0.4)
    assert a.mia_tpr_at_1fpr(members, others[:100]).value is not None
    assert a.mia_tpr_at_1fpr(members, others[:99]).reason == "needs >= 100 non-members, has 99"


def test_an_empty_side_has_no_figure():
    for figure in (a.mia_auc, a.mia_adv, a.mia_tpr_at_1fpr):
        assert figure(MEMBERS, OTHERS[:0]).value is None
        assert figure(MEMBERS[:0], OTHERS).value is None


def test_phi_of_a_worked_example_stays_exact_far_out():
    z = double(2, 1, 0)[None].repeat(2, 1)
    found = a.phi(z, [0, 1, 2], torch.tensor([0, 2]))
    assert found.tolist() == [near(0.6867383124817772), near(-2.313261687518223)]
    sure = a.phi(double(800, 0, 0)[None], [5, 6, 7], torch.tensor([5]))
    assert float(sure) == near(800 - math.log(2))
    assert a.phi(z, [0, 1, 3], torch.tensor([0, 2])) is None
    assert float(a.phi_msp(z[:1], [4, 5, 6], [5, 6])) == near(1.0)


def test_scores_need_a_label_only_where_they_use_it():
    logits = double(2, 1, 0)[None]
    assert float(a.loss_scores(logits, [3, 4, 5], torch.tensor([3]))) == near(-0.4076059644443806)
    assert a.loss_scores(logits, [3, 4, 5], torch.tensor([9])) is None
    p = logits.softmax(dim=1)
    assert float(a.entropy_scores(logits)) == near(float((p * p.log()).sum()))
    assert float(a.entropy_scores(double(0, -math.inf)[None])) == 0
    assert float(a.msp_scores(logits)) == near(float(p.max()))


def test_online_scores_use_the_sample_deviation():
    out, inside = double(-1, 0, 1)[:, None], double(1, 2, 3)[:, None]
    assert float(a.lira_online(double(1.5), out, inside)) == near(1.0)


def test_offline_scores_are_one_sided():
    out = double(-1, 0, 1)[:, None]
    assert float(a.lira_offline(double(1.5), out)) == near(0.9331927987311419)
    assert float(a.lira_offline(double(-1.5), out)) == near(0.06680720126885807)


def test_few_models_pool_their_spread_and_many_do_not():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 2, generator=generator, dtype=torch.float64) * double(1, 10)
    few, many = a.lira_deviation(double(5, 5), wide[:8]), a.lira_deviation(double(5, 5), wide)
    pooled = wide[:8].var(dim=0).mean().sqrt()
    assert few.tolist() == ((5 - wide[:8].mean(dim=0)) / pooled).tolist()
    assert float(many[0]) > 3 * float(many[1])
    constant = a.lira_deviation(double(1), torch.zeros(3, 1))
    assert float(constant) == near(1e6, 1)  # models that agree to the last bit divide by the floor
    with pytest.raises(ValueError, match="at least 2"):
        a.lira_offline(double(1), torch.zeros(1, 1))


def test_bounds_of_error_rates_and_of_epsilon():
    assert a.upper_bound(0, 20) == near(0.13910834066826516)
    assert a.upper_bound(2, 20) == near(0.28261852488586087)
    assert a.upper_bound(1, 100) == near(0.046559811453538935)
    assert a.upper_bound(10, 100) == near(0.16371762327581477)
    assert a.upper_bound(5, 5) == 1
    assert a.eps_lower(0, 20, 2, 20) == near(1.6403407440259825)
    assert a.eps_lower(1, 100, 10, 100) == near(2.8882166156214204)
    assert a.eps_lower(20, 20, 20, 20) == 0


def test_epsilon_needs_twenty_models_and_is_zero_for_models_alike():
    generator = torch.Generator().manual_seed(1)
    alike = torch.randn(2, 40, 5, generator=generator)
    assert a.mia_eps_lower(alike[0][:19], alike[1]).reason == "needs >= 20 models of each kind, has 19"
    assert a.mia_eps_lower(*alike).value < 0.5
    apart = alike[0].clone()
    apart[:, 3] -= 20  # what gives a model away may be a low score
    assert a.mia_eps_lower(apart, alike[1]).value > 1


def test_efficacy_is_the_share_of_forgotten_images_called_unseen():
    assert a.efficacy_of([1, 0, 0, 1, 0]).value == near(0.6)
    members, others = 0.9 + 0.1 * torch.rand(40), 0.3 * torch.rand(40)
    assert a.mia_efficacy(members, others, others).value == 1
    assert a.mia_efficacy(members, others, members).value == 0
    assert a.mia_efficacy(members, others, None).reason == a.NOT_AN_ANSWER
    assert a.mia_efficacy(members, others, others[:9]).reason == "needs >= 10 images of each set, has 9"


def test_the_standard_error_is_that_of_keyed_draws():
    def error(seed):
        return a.mia_auc(MEMBERS, OTHERS, torch.Generator().manual_seed(seed)).error

    assert error(3) == error(3) != error(4)
    many = torch.randn(400, generator=torch.Generator().manual_seed(0))
    # of two samples of one distribution: sqrt((n + m + 1) / (12 n m))
    found = a.mia_auc(many[:200], many[200:], torch.Generator().manual_seed(5)).error
    assert found == approx(math.sqrt(401 / (12 * 200 * 200)), rel=0.1)


@given(SCORES, SCORES)
@settings(max_examples=200, deadline=None)
def test_figures_agree_with_counting_every_pair_and_every_threshold(members, others):
    wins = sum((m > n) + 0.5 * (m == n) for m in members.tolist() for n in others.tolist())
    auc = a.mia_auc(members, others).value
    assert auc == near(wins / (len(members) * len(others)))
    assert a.mia_auc(others, members).value == near(1 - auc)
    thresholds = [*members.tolist(), *others.tolist(), math.inf]
    rates = [(float((members >= t).double().mean()), float((others >= t).double().mean())) for t in thresholds]
    assert a.mia_adv(members, others).value == near(max(tpr - fpr for tpr, fpr in rates))
    for limit in (0, 0.25, 0.5, 1):
        assert a.tpr_at(members, others, limit) == near(max(tpr for tpr, fpr in rates if fpr <= limit + 1e-12))


@given(SCORES, SCORES)
@settings(max_examples=100, deadline=None)
def test_only_the_order_of_scores_counts(members, others):
    stretched = [a.mia_auc(members.exp(), others.exp()), a.mia_adv(members.exp(), others.exp())]
    assert stretched == [a.mia_auc(members, others), a.mia_adv(members, others)]


@given(st.integers(0, 30), st.integers(1, 30), st.integers(0, 30), st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_more_errors_never_raise_the_bound_on_epsilon(alarms, references, misses, unlearned):
    alarms, misses = min(alarms, references), min(misses, unlearned)
    bound = a.eps_lower(alarms, references, misses, unlearned)
    assert bound >= 0
    if alarms < references and alarms + misses < (references + unlearned) / 2:
        assert a.eps_lower(alarms + 1, references, misses, unlearned) <= bound + 1e-12


def test_every_attack_ranks_a_model_that_memorised_above_one_that_never_saw_the_images():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(160, 128, generator=generator), torch.randint(4, (160,), generator=generator)
    seen, unseen = slice(0, 80), slice(80, 160)  # random labels: what is answered right is remembered

    def trained(rows: slice) -> torch.Tensor:
        weights = torch.zeros(128, 4, requires_grad=True)
        for _ in range(300):
            loss = torch.nn.functional.cross_entropy(images[rows] @ weights, labels[rows])
            (gradient,) = torch.autograd.grad(loss, weights)
            weights = (weights - 1.0 * gradient).detach().requires_grad_()
        return (images @ weights).detach()

    memorised = trained(seen)
    fresh = [
        torch.randn(128, 4, generator=generator) * memorised.std() / 11 for _ in range(4)
    ]  # never saw any of the images
    never, *shadows = [images @ weights for weights in fresh]
    assert (memorised[seen].argmax(dim=1) == labels[seen]).all()
    classes = [0, 1, 2, 3]
    out = torch.stack([a.phi(z, classes, labels) for z in shadows])
    scores = {
        "loss": lambda z: a.loss_scores(z, classes, labels),
        "entropy": a.entropy_scores,
        "msp": a.msp_scores,
        "lira": lambda z: a.lira_deviation(a.phi(z, classes, labels), out),
    }
    found = {}
    for name, score in scores.items():
        of_memorised, of_never = score(memorised), score(never)
        found[name] = a.mia_auc(of_memorised[seen], of_memorised[unseen]).value
        assert found[name] > a.mia_auc(of_never[seen], of_never[unseen]).value + 0.1, name
    assert found["loss"] >= 0.9
