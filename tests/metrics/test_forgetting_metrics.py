"""Accuracies, scores and divergences of a model that forgot, on worked examples and on random numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from cl_platform.metrics import forgetting as f
from cl_platform.metrics.definitions import FORGETTING_BY_KEY, FORGETTING_DEFINITIONS
from cl_platform.metrics.divergence import js_common, js_groups, js_per_image
from cl_platform.metrics.measured import Measured, combined, undefined


def accuracies(forget_train, forget_test, retain_train, retain_test, mia=None) -> f.Accuracies:
    values = [Measured(v) for v in (forget_train, forget_test, retain_train, retain_test)]
    return f.Accuracies(*values, undefined("no attack") if mia is None else Measured(mia))


O = accuracies(0.98, 0.80, 0.95, 0.75)  # noqa: E741
U = accuracies(0.30, 0.28, 0.93, 0.72, 0.62)
R = accuracies(0.25, 0.26, 0.96, 0.76, 0.70)
SHARE = st.floats(0, 1)
MODEL = st.builds(accuracies, SHARE, SHARE, SHARE, SHARE, SHARE)


def near(value: float, tolerance: float = 1e-9):
    return approx(value, abs=tolerance, rel=0)


def test_gaps_are_differences_to_the_model_that_never_learnt():
    names = ("forget_train", "forget_test", "retain_train", "retain_test")
    gaps = [f.gap(getattr(U, name), getattr(R, name)).value for name in names]
    assert gaps == [near(0.05), near(0.02), near(-0.03), near(-0.04)]


def test_unlearning_retained_and_test_accuracy_and_their_average_gap():
    assert [of(U).value for of in (f.ua, f.ra, f.ta)] == [near(0.70), near(0.93), near(0.72)]
    assert f.avg_gap(U, R).value == near(0.05)
    assert f.avg_gap(R, R).value == 0


def test_adaptive_unlearning_score_of_whole_classes_and_of_a_subset():
    assert f.aus(O, U).value == near(0.7578125)
    assert f.aus(O, R).value == near(0.8015873015873016)
    assert f.aus_subset(O.retain_test, U.retain_test, U.forget_train).value == near(0.6830985915492958)


def test_a_gain_in_kept_accuracy_lifts_the_adaptive_score_above_one():
    assert f.aus(O, accuracies(0, 0, 1, 0.85)).value == near(1.1)


def test_tug_of_war_and_its_form_with_an_attack():
    assert f.tow(U, R).value == near(0.88464)
    assert f.tow_mia(U, R).value == near(0.856704)
    assert f.tow(R, R).value == 1


def test_relearning_counts_the_first_evaluated_step_at_the_target():
    target = f.relearn_target(O.forget_test)
    assert target.value == near(0.72, 1e-12)
    u = f.relearn_steps([(0, 0.28), (1, 0.40), (2, 0.61), (4, 0.73), (8, 0.79)], target.value)
    curve = [(0, 0.26), (1, 0.30), (2, 0.35), (4, 0.50), (8, 0.70)]
    r = f.relearn_steps(curve, target.value)
    assert u.value == 4
    assert (r.value, r.censored_at) == (None, 8)
    assert f.relearn_ratio(u, r).value is None
    later = f.relearn_steps([*curve, (16, 0.77)], target.value)
    assert later.value == 16
    assert f.relearn_ratio(u, later).value == 0.25


def test_a_task_of_which_nothing_was_known_has_no_relearning_target():
    assert f.relearn_target(Measured(0.0)).value is None


def test_an_accuracy_on_the_target_counts_although_the_target_is_rounded():
    assert f.relearn_steps([(0, 0.1), (1, 0.72)], 0.9 * 0.80).value == 1  # 0.9 * 0.80 > 0.72 in float64


def test_a_reference_that_is_there_from_the_start_gives_no_ratio():
    there = f.relearn_steps([(0, 0.9)], 0.72)
    assert there.value == 0
    assert "already" in f.relearn_ratio(there, there).reason


def test_accuracy_on_classes_that_are_no_answers_is_marked_and_stays_marked():
    gone = f.accuracy(0, 10, in_space=False)
    assert (gone.value, gone.by_construction) == (0, True)
    model = f.Accuracies(gone, gone, Measured(0.9), Measured(0.8), undefined("x"))
    assert f.ua(model).value == 1
    assert f.ua(model).by_construction
    assert f.tow(model, model).by_construction
    assert not f.ra(model).by_construction
    with pytest.raises(ValueError, match="right"):
        f.accuracy(1, 10, in_space=False)


def test_what_is_not_defined_has_a_reason_and_passes_it_on():
    nothing = f.accuracy(0, 0)
    assert nothing.value is None
    assert nothing.reason == f.NO_IMAGES
    assert f.gap(nothing, Measured(0.5)).reason == f.NO_IMAGES
    assert (
        f.tow(accuracies(0.1, 0.1, 0.1, 0.1), f.Accuracies(*[undefined(f.NO_REFERENCE)] * 5)).reason == f.NO_REFERENCE
    )
    assert f.avg_gap(O, R).reason == "no attack"
    with pytest.raises(ValueError, match="needs a value or a reason"):
        Measured()
    with pytest.raises(ValueError, match="not finite"):
        Measured(math.nan)
    with pytest.raises(ValueError, match="needs a value or a reason"):
        Measured(0.5, "why")


def test_probe_tells_separable_features_apart_and_refuses_what_it_cannot_judge():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    features = torch.randn(40, 5, generator=generator) + 6 * labels[:, None]
    assert f.forget_probe_acc(features[:20], labels[:20], features[20:], labels[20:]).value == 1
    one = torch.zeros(20, dtype=torch.int64)
    assert "one class" in f.forget_probe_acc(features[:20], one, features[20:], one).reason
    lonely = torch.tensor([0] * 19 + [1])
    assert "fewer than 2" in f.forget_probe_acc(features[:20], lonely, features[20:], labels[20:]).reason
    constant = torch.cat((features, torch.ones(40, 1)), dim=1)  # a width that never varies divides by nothing
    assert f.forget_probe_acc(constant[:20], labels[:20], constant[20:], labels[20:]).value == 1


def test_relapse_is_the_largest_rise_over_the_reference():
    u, r = [[Measured(v) for v in part] for part in ((0.5, 0.7, 0.6), (0.5, 0.5, 0.6))]
    assert f.relapse(u, r).value == near(0.2)
    assert f.relapse(r, r).value == 0
    assert f.relapse(u[:1], r[:1]).value is None


def test_gain_and_distance_of_clarena_are_means_over_tasks_and_over_images():
    assert f.ag([Measured(0.8), Measured(0.6)], [Measured(0.7), Measured(0.8)]).value == near(-0.05)
    same = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert f.dd(same, 3 * same).value == near(0)
    assert f.dd(same, torch.tensor([[-1.0, 0.0], [1.0, 0.0]])).value == near(1.5)
    assert f.dd(same, torch.zeros(2, 2)).value is None


@given(MODEL, MODEL)
@settings(max_examples=200, deadline=None)
def test_scores_stay_in_their_ranges_and_reward_being_like_the_reference(u, r):
    for score in (f.tow(u, r), f.tow_mia(u, r)):
        assert 0 <= score.value <= 1
        assert score.value <= f.tow(r, r).value + 1e-12
    assert 0 <= f.avg_gap(u, r).value <= 1
    assert f.avg_gap(u, r).value == f.avg_gap(r, u).value
    assert 0 <= f.aus(r, u).value <= 2
    assert f.gap(u.forget_test, r.forget_test).value == -f.gap(r.forget_test, u.forget_test).value


@given(st.lists(st.floats(0, 1), min_size=1, max_size=11), SHARE)
@settings(max_examples=200, deadline=None)
def test_relearning_never_counts_a_step_below_the_target(values, target):
    curve = list(zip(f.RELEARNING_STEPS, values, strict=False))
    found = f.relearn_steps(curve, target)
    reached = [step for step, value in curve if value >= target - 1e-12]
    assert found.value == (reached[0] if reached else None)
    assert found.censored_at == (None if reached else curve[-1][0])


# -- divergence -----------------------------------------------------------------------------------------------------

P = torch.tensor([[0.7, 0.2, 0.1], [1, 0, 0]], dtype=torch.float64)
Q = torch.tensor([[0.5, 0.3, 0.2], [0, 0.5, 0.5]], dtype=torch.float64)


def test_divergence_of_a_worked_example_with_zeros():
    per_image = js_per_image(P, Q)
    assert per_image.tolist() == [near(0.0219011799, 1e-9), near(math.log(2))]
    assert float(per_image.mean()) == near(0.3575241797642196)
    assert torch.equal(per_image, js_per_image(Q, P))
    assert js_per_image(P, P).tolist() == [0, 0]


def test_divergence_is_not_the_mean_over_classes_of_released_code():
    assert abs(float(js_per_image(P, Q)[0]) - 0.00746258002642) > 0.01


def test_divergence_over_common_classes_is_renormalised():
    u = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    r = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    assert js_common(u, [0, 1, 2], r, [0, 1]).value == near(0.007959, 5e-7)
    assert js_common(u, [2, 1, 0], r, [1, 0]).value == near(js_common(u, [0, 1, 2], r[:, [1, 0]], [2, 1]).value)
    assert "common" not in (js_common(u, [0, 1, 2], r, [0, 3]).reason or "common")
    assert js_common(u, [0, 1, 2], r, [0, 3]).value is None
    assert js_common(u[:0], [0, 1, 2], r[:0], [0, 1]).value is None


def one_image(*rows):
    return [[torch.tensor([row], dtype=torch.float64)] for row in rows]


def test_divergence_inside_and_across_groups_of_seeds():
    references = one_image((0.6, 0.4), (0.5, 0.5), (0.4, 0.6))
    groups = js_groups(references, one_image((0.6, 0.4), (0.9, 0.1)))
    assert groups.js_in.value == near(0.010084764469554685)
    assert groups.js_across.value == near(0.05643854530193489)
    assert groups.js_rel.value == near(4.596416800047197)
    assert groups.js_within.value == 0.5  # a pair as far apart as the farthest references counts


def test_groups_of_equal_references_have_no_relative_divergence():
    groups = js_groups(one_image((0.6, 0.4), (0.6, 0.4)), one_image((0.6, 0.4)))
    assert (groups.js_in.value, groups.js_across.value, groups.js_within.value) == (0, 0, 1)
    assert groups.js_rel.value is None
    assert js_groups(one_image((0.6, 0.4)), one_image((0.6, 0.4))).js_in.value is None


def test_groups_over_several_forgotten_tasks_are_averages():
    a, b = one_image((0.6, 0.4), (0.4, 0.6)), one_image((1.0, 0.0), (0.0, 1.0))
    both = [x + y for x, y in zip(a, b, strict=True)]
    alone = [js_groups(part, part[:1]).js_in.value for part in (a, b)]
    together = js_groups(both, both[:1])
    assert together.js_in.value == near(sum(alone) / 2)
    assert together.js_in.value <= math.log(2)


@given(st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=2, max_size=2))
@settings(max_examples=200, deadline=None)
def test_divergence_is_symmetric_bounded_and_zero_for_equals(rows):
    one, other = (torch.tensor([row], dtype=torch.float64) for row in rows)
    there, back = (js_common(x, [0, 1, 2], y, [0, 1, 2]).value for x, y in ((one, other), (other, one)))
    assert 0 <= there <= math.log(2)
    assert there == near(back, 1e-12)
    assert js_common(one, [0, 1, 2], one + 1, [0, 1, 2]).value == near(0, 1e-12)


def test_every_figure_has_a_definition_in_one_line():
    assert len(FORGETTING_BY_KEY) == len(FORGETTING_DEFINITIONS)
    for definition in FORGETTING_DEFINITIONS:
        assert definition.id.startswith("4.3.")
        assert definition.text.endswith(".")
        assert len(definition.text) <= 110
    assert combined(lambda a: a, Measured(1.0, by_construction=True)).by_construction
