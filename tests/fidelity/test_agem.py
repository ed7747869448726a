"""A-GEM is A-GEM because a step keeps what does not point against the gradient of one draw from the memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import built, config_of, copy_of, differing, digits, learn, only
from torch.nn import functional as F

from cl_platform.backbones import BackboneConfig, build_backbone
from cl_platform.errors import UserError
from cl_platform.strategies import build_strategies
from cl_platform.strategies.agem import project

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.0}
F64 = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=F64)


def projected(gradient, reference):
    found = gradient.clone()
    project([found], [reference])
    return found


def without_memory(bench):
    return {n: t for n, t in bench.learner.state_dict().items() if ".agem." not in n}


class Noted:
    """Gradients of every update before and after surgery, and the reference between them, by parameter name."""

    def __init__(self, bench, name="agem"):
        self.steps, strategy = [], bench.learner.composition.members[name]
        live, references = bench.learner.named_parameters, []
        surgery, reference = strategy.after_backward, strategy.reference

        def asked(step, batch, parameters):
            before = [p.grad.clone() for p in parameters]
            found = reference(step, batch, parameters)
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
            names = {id(p): n for n, p in live()}
            references.append((batch, {names[id(p)]: r for p, r in zip(parameters, found, strict=True)}))
            return found

        def after_backward(step):
            references.clear()
            before = {n: p.grad.clone() for n, p in live() if p.grad is not None}
            place = copy_of(dict(live()))
            surgery(step)
            after = {n: p.grad.clone() for n, p in live() if p.grad is not None}
            self.steps.append((step, before, after, list(references), place))

        strategy.reference, strategy.after_backward = asked, after_backward


def dot(one, other):
    return sum(float((one[n].double() * g.double()).sum()) for n, g in other.items() if g is not None)


# -- the formula ------------------------------------------------------------------------------------------------------


def test_the_part_against_the_reference_is_removed():
    found = projected(vector(1, -2, 0.5, 3), vector(-1, 1, 2, -0.5))
    torch.testing.assert_close(found, vector(0.44, -1.44, 1.62, 2.72), rtol=0, atol=1e-9)
    assert float(found @ vector(-1, 1, 2, -0.5)) == pytest.approx(0, abs=1e-9)


def test_the_mean_of_two_constraints_may_break_one_of_them():
    rows = torch.tensor([[1, 0, 1], [0, 2, -1]], dtype=F64)
    found = projected(vector(-1, -1, 0.5), rows.mean(0))
    torch.testing.assert_close(found, vector(-0.4, 0.2, 0.5), rtol=0, atol=1e-9)
    torch.testing.assert_close(rows @ found, vector(0.1, -0.1), rtol=0, atol=1e-9)


several = st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4)


@settings(max_examples=60, deadline=None)
@given(several, several, st.integers(0, 1000))
def test_it_is_the_closest_allowed_vector_and_the_gradient_itself_where_that_is_allowed(gradient, reference, seed):
    g, r = vector(*gradient), vector(*reference)
    found = projected(g, r)
    if g @ r >= 0:
        assert torch.equal(found, g)
        return
    if r @ r < 1e-4:  # the small number in the divisor shows
        return
    assert float(found @ r) >= -1e-6 * float(g.norm() * r.norm())
    others = g + torch.randn(200, 4, generator=torch.Generator().manual_seed(seed), dtype=F64) * 2
    others = others[others @ r >= 0]
    assert bool(((others - g).norm(dim=1) >= (found - g).norm() - 1e-8).all())


def test_parts_are_one_vector_and_a_part_that_the_reference_does_not_reach_stays():
    parts = [vector(1, -2), vector(7), vector(0.5, 3)]
    project(parts, [vector(-1, 1), None, vector(2, -0.5)])
    torch.testing.assert_close(torch.cat(parts), vector(0.44, -1.44, 7, 1.62, 2.72), rtol=0, atol=1e-9)
    alone = [vector(1)]
    project(alone, [None])
    assert alone[0] == 1


def test_a_reference_that_is_not_a_number_changes_nothing():
    found = projected(torch.tensor([1.0, 1.0]), torch.tensor([float("nan"), 1.0]))
    assert torch.equal(found, torch.tensor([1.0, 1.0]))


def test_the_host_waits_for_no_number():
    gradients, references = [torch.ones(3, device="meta")], [torch.ones(3, device="meta")]
    project(gradients, references)  # a meta tensor has no value to wait for, and raises where one is asked for


# -- the strategy -----------------------------------------------------------------------------------------------------


def test_it_acts_from_the_second_task_on_upon_the_whole_gradient_and_the_plain_step_follows(learner_of):
    bench = learner_of({"agem": {"batch_size": 6}}, **SGD)
    noted = Noted(bench)
    bench.learn(0)
    assert noted.steps and not any(differing(b, a) or r for _, b, a, r, _ in noted.steps)
    first = len(noted.steps)
    bench.learn(1, epochs=4)
    bitten = 0
    for step, before, after, references, _ in noted.steps[first:]:
        ((batch, reference),) = references
        assert len(batch) == 6 and batch.is_replay.all()
        assert set(batch.task_ids.tolist()) == {0}
        assert [len(p.batch) for p in step.passes] == [8, 6]
        bound = (dot(before, before) * dot(reference, reference)) ** 0.5
        assert dot(after, reference) >= -1e-6 * bound
        if dot(before, reference) >= 0:
            assert not differing(before, after)
        else:
            bitten += 1
            assert differing(before, after)
    assert bitten
    _, _, after, _, place = noted.steps[-1]
    live = dict(bench.learner.named_parameters())
    for name, gradient in after.items():
        torch.testing.assert_close(live[name].detach(), place[name] - 0.05 * gradient)


def test_the_reference_is_the_mean_cross_entropy_of_the_drawn_images_over_all_seen_classes(learner_of):
    bench = learner_of({"agem": {}}, **SGD)
    noted = Noted(bench)
    bench.learn(0)
    noted.steps.clear()
    bench.learn(1, epochs=1)
    step, _, _, ((batch, reference),), place = noted.steps[0]
    live = dict(bench.learner.named_parameters())
    now = copy_of(live)
    for name, parameter in live.items():
        parameter.data.copy_(place[name])
    loss = F.cross_entropy(bench.learner.head(bench.vit(batch.images)), batch.labels)  # classes are 0..3
    wanted = torch.autograd.grad(loss, [live[n] for n in reference], allow_unused=True)
    for found, gradient in zip(reference.values(), wanted, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    for name, parameter in live.items():
        parameter.data.copy_(now[name])


def test_where_the_task_is_known_each_image_chooses_among_its_own_tasks_classes(learner_of):
    bench = learner_of({"agem": {}}, stream={"setting": "task"}, **SGD)
    noted = Noted(bench)
    bench.learn(0, 1)
    noted.steps.clear()
    bench.learn(2, epochs=1)
    step, before, _, ((batch, reference),), _ = noted.steps[0]
    assert not before["head.blocks.tasks.0.weight"].any()  # the current images ask for the new classes only
    assert before["head.blocks.tasks.2.weight"].any()
    assert not reference["head.blocks.tasks.2.weight"].any()
    assert set(batch.task_ids.tolist()) == {0, 1}
    for task_id in (0, 1):  # logits of one task's rows do not concern the other task's images
        rows = batch.task_ids == task_id
        logits = step.passes[1].logits[rows][:, 2 * task_id : 2 * task_id + 2].softmax(1).detach()
        target = F.one_hot(batch.labels[rows] - 2 * task_id, 2)
        bias = ((logits - target).sum(0)) / len(batch)
        torch.testing.assert_close(reference[f"head.blocks.tasks.{task_id}.bias"], bias, rtol=1e-4, atol=1e-6)


def test_a_switched_off_draw_is_finetuning_bit_for_bit_and_a_draw_is_not(learner_of):
    off = learner_of({"agem": {"batch_size": 0}}, **SGD).learn(0, 1)
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1)
    assert not differing(without_memory(off), plain.learner.state_dict())
    on = learner_of({"agem": {}}, **SGD).learn(0, 1)
    assert differing(without_memory(on), plain.learner.state_dict())


def test_a_parameter_without_a_gradient_stays_without(learner_of):
    bench = learner_of({"agem": {}}, **SGD).learn(0)
    noted = Noted(bench)
    inner = bench.strategy.after_backward
    missing = "head.blocks.tasks.0.bias"

    def without(step):
        dict(bench.learner.named_parameters())[missing].grad = None
        inner(step)

    bench.strategy.after_backward = without
    bench.learn(1, epochs=1)
    for _, before, after, ((_, reference),), _ in noted.steps:
        assert missing not in before and missing not in after and missing not in reference
        assert dot(after, reference) >= -1e-6 * (dot(before, before) * dot(reference, reference)) ** 0.5


def test_batch_norm_takes_in_each_pass_once_and_the_steps_gradient_is_not_touched_by_the_other_one():
    config = config_of("agem")
    learner = built(config, digits(), backbone=build_backbone(BackboneConfig(kind="resnet18_slim")))
    counter = next(b for n, b in learner.backbone.named_buffers() if n.endswith("num_batches_tracked"))
    learn(learner, config, digits().tasks[:1])
    assert int(counter) == 2  # 16 images in batches of 8
    strategy, seen = only(learner), []
    reference = strategy.reference

    def watched(step, batch, parameters):
        before, count = [p.grad.clone() for p in parameters], int(counter)
        found = reference(step, batch, parameters)
        seen.append(int(counter) - count)
        assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
        return found

    strategy.reference = watched
    learn(learner, config, digits().tasks[1:])
    assert seen == [1, 1]
    assert int(counter) == 2 + 4


def test_only_one_strategy_may_change_gradients_and_hold_a_buffer():
    for other in ("gem", "er"):
        with pytest.raises(UserError, match="both own"):
            build_strategies({"agem": {}, other: {}})
    with pytest.raises(UserError, match="classification"):
        build_strategies({"finetune": {}, "agem": {}})
    build_strategies({"finetune": {}, "agem": {"head_slice": False}})


def test_the_loss_of_the_batch_may_be_anothers(learner_of):
    one = learner_of({"finetune": {}, "agem": {"head_slice": False}}, **SGD).learn(0, 1)
    other = learner_of({"agem": {}}, **SGD).learn(0, 1)
    assert not differing(one.learner.state_dict(), other.learner.state_dict())
