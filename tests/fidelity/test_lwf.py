"""LwF is LwF because the learner of the task before says what current images look like to it, over its own classes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import copy_of, differing
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.strategies.base import Pass
from cl_platform.strategies.lwf import distillation

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
F64 = torch.float64

OLD = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=F64)
NEW = torch.tensor([[1.0, 1.0, -1.0, 3.0], [0.0, 2.0, 0.0, -1.0]], dtype=F64)


def of(bench):
    return bench.learner.composition.members["lwf"]


def nudged(bench, scale=0.05):
    draw = torch.Generator().manual_seed(5)
    for parameter in bench.learner.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=draw))
    return bench


def without_copies(bench):
    return {n: t for n, t in bench.learner.state_dict().items() if ".teacher." not in n}


# -- the formula ------------------------------------------------------------------------------------------------------


def test_the_divergence_over_the_old_columns_and_its_gradient():
    new = NEW.clone().requires_grad_()
    value = distillation(new[:, :3], OLD, 2.0)
    assert value.item() == pytest.approx(0.063708247, abs=1e-9)
    value.backward()
    expected = [[-0.051553230, 0.047773725, 0.003779505, 0], [-0.015531765, 0.031063531, -0.015531765, 0]]
    torch.testing.assert_close(new.grad, torch.tensor(expected, dtype=F64), rtol=0, atol=1e-9)
    assert distillation(NEW[:, :3], OLD, 2.0, scale_t2=True).item() == pytest.approx(0.254832989, abs=1e-9)


def test_the_cross_entropy_of_released_code_differs_by_the_teachers_entropy_alone():
    teacher = (OLD / 2).softmax(1)
    cross = -(teacher * (NEW[:, :3] / 2).log_softmax(1)).sum(1).mean()
    assert cross.item() == pytest.approx(1.050910570, abs=1e-9)
    entropy = -(teacher * teacher.log()).sum(1).mean()
    assert distillation(NEW[:, :3], OLD, 2.0).item() == pytest.approx((cross - entropy).item(), abs=1e-9)
    wrong = -(teacher * (NEW / 2).log_softmax(1)[:, :3]).sum(1).mean()  # softmax over the new column as well
    assert wrong.item() == pytest.approx(1.493641247, abs=1e-9)


numbers = st.lists(st.floats(-20, 20), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(numbers, numbers, st.floats(-10, 10), st.floats(0.5, 8))
def test_it_is_not_negative_zero_at_the_teacher_and_blind_to_a_shift(new, old, shift, temperature):
    new, old = torch.tensor([new], dtype=F64), torch.tensor([old], dtype=F64)
    value = distillation(new, old, temperature)
    assert value >= -1e-12
    torch.testing.assert_close(distillation(new + shift, old, temperature), value, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(distillation(new, old + shift, temperature), value, rtol=1e-7, atol=1e-9)
    same = old.clone().requires_grad_()
    zero = distillation(same, old, temperature)
    zero.backward()
    assert abs(zero) < 1e-12 and same.grad.abs().max() < 1e-12


def test_half_precision_is_answered_in_float32():
    assert distillation(NEW[:, :3].bfloat16(), OLD.bfloat16(), 2.0).dtype == torch.float32


# -- the strategy -----------------------------------------------------------------------------------------------------


def test_the_first_task_has_no_teacher_no_term_and_no_further_pass(learner_of):
    bench = learner_of({"lwf": {}}, **SGD).begin(0)
    passes = []
    bench.vit.register_forward_hook(lambda *a: passes.append(a))
    assert set(bench.step()[1]) == {"learner/ce"}
    assert len(passes) == 1


def test_the_term_compares_with_the_learner_of_the_task_before_over_its_classes(learner_of):
    bench = learner_of({"lwf": {"alpha": 3.0}}, **SGD).learn(0, 1)
    earlier = learner_of({"lwf": {"alpha": 3.0}}, **SGD).learn(0, 1).learner.eval()
    bench.begin(2)
    assert bench.step()[1]["lwf/kd"].item() == pytest.approx(0.0, abs=1e-6)
    step, terms = nudged(bench).step()
    old = earlier.head(earlier.backbone(step.batch.images))
    assert old.shape[1] == 4 and step.logits.shape[1] == 6
    new = step.logits[:, :4]
    expected = 3.0 * F.kl_div((new / 2).log_softmax(1), (old / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(terms["lwf/kd"], expected, rtol=1e-4, atol=1e-7)
    assert terms["lwf/kd"] > 1e-4
    assert bench.learner.composition.stability == {"lwf/kd"}
    assert terms["learner/ce"].item() == pytest.approx(F.cross_entropy(step.logits, step.batch.labels).item())


def test_new_columns_get_no_gradient_from_it_and_the_teacher_never_changes(learner_of):
    bench = nudged(learner_of({"lwf": {}}, vit={"proj_drop_rate": 0.2}, **SGD).learn(0).begin(1))
    teacher = bench.learner.composition.teacher
    before = copy_of(teacher.state_dict())
    _, terms = bench.step()
    terms["lwf/kd"].backward()
    blocks = bench.learner.head.blocks
    assert all(p.grad is None or not p.grad.any() for p in blocks.parameters_of(1).values())
    assert all(bool(p.grad.any()) for p in blocks.parameters_of(0).values())
    assert any(bool(p.grad.any()) for p in bench.vit.parameters())
    assert not differing(before, teacher.state_dict())
    assert all(t.grad is None and not t.requires_grad for t in teacher.buffers())
    of_teacher = [teacher(bench.batch()).logits for _ in range(2)]
    assert torch.equal(*of_teacher)  # no dropout


def test_without_weight_it_is_finetuning_and_asks_no_teacher(learner_of):
    off, plain = learner_of({"lwf": {"alpha": 0}}, **SGD).learn(0, 1), learner_of({"finetune": {}}, **SGD).learn(0, 1)
    assert not differing(without_copies(off), plain.learner.state_dict())
    passes = []
    off.begin(2).vit.register_forward_hook(lambda *a: passes.append(a))
    off.step()
    assert len(passes) == 1


def test_alone_and_beside_finetune_it_is_the_same_and_not_finetuning(learner_of):
    alone = learner_of({"lwf": {}}, **SGD).learn(0, 1)
    beside = learner_of({"finetune": {}, "lwf": {}}, **SGD).learn(0, 1)
    assert not differing(alone.learner.state_dict(), beside.learner.state_dict())
    assert differing(without_copies(alone), learner_of({"finetune": {}}, **SGD).learn(0, 1).learner.state_dict())


def test_old_answers_move_less_than_without(learner_of):
    moved = {}
    for alpha in (0.0, 10.0):
        bench = learner_of({"lwf": {"alpha": alpha}}, name="sgd", lr=0.02, momentum=0.0).learn(0, epochs=4)
        images = bench.stream.tasks[1].train.images(slice(None))
        before = bench.logits(images).log_softmax(1)
        bench.learn(1, epochs=4)
        moved[alpha] = float(
            F.kl_div(bench.logits(images)[:, :2].log_softmax(1), before, reduction="batchmean", log_target=True)
        )
    assert moved[10.0] < 0.5 * moved[0.0]


def test_the_cross_entropy_can_run_over_the_new_classes_alone(learner_of):
    bench = learner_of({"lwf": {"ce_on": "new"}}, **SGD).learn(0).begin(1)
    step, terms = bench.step()
    assert set(terms) == {"lwf/ce", "lwf/kd"}
    assert torch.equal(terms["lwf/ce"], F.cross_entropy(step.logits[:, 2:], step.batch.labels - 2))
    with pytest.raises(UserError, match="finetune and lwf both own the classification"):
        learner_of({"finetune": {}, "lwf": {"ce_on": "new"}}, **SGD)


def test_where_the_task_is_known_every_old_head_has_a_divergence_of_its_own(learner_of):
    bench = nudged(learner_of({"lwf": {}}, stream={"setting": "task"}, **SGD).learn(0, 1).begin(2))
    step, terms = bench.step()
    old = bench.learner.composition.teacher(step.batch).logits
    parts = [distillation(step.logits[:, a:b], old[:, a:b], 2.0) for a, b in ((0, 2), (2, 4))]
    torch.testing.assert_close(terms["lwf/kd"], sum(parts))
    assert abs(sum(parts) - distillation(step.logits[:, :4], old, 2.0)) > 1e-6


def test_columns_follow_the_class_ids_where_these_do_not_come_in_ascending_order(learner_of):
    bench = nudged(learner_of({"lwf": {}}, **SGD).learn(2, 0).begin(1))
    step, terms = bench.step()
    assert step.seen_classes == [0, 1, 2, 3, 4, 5]
    old = bench.learner.composition.teacher(step.batch).logits
    expected = distillation(step.logits[:, [0, 1, 4, 5]], old, 2.0)
    torch.testing.assert_close(terms["lwf/kd"], expected)


def test_replayed_rows_are_not_distilled(learner_of):
    bench = nudged(learner_of({"lwf": {}}, **SGD).learn(0).begin(1))
    step, terms = bench.step()
    extra = torch.arange(3)
    batch = step.batch.joined(step.batch.select(extra).replace(is_replay=torch.ones(3, dtype=torch.bool)))
    whole = Pass(
        batch, torch.cat((step.features, 9 + step.features[:3])), torch.cat((step.logits, step.logits[:3] * 9))
    )
    step.passes[:] = [whole]
    torch.testing.assert_close(of(bench).losses(step)["kd"], terms["lwf/kd"])


def test_beside_replay_the_old_answers_are_asked_of_the_current_images_alone(learner_of):
    bench = nudged(learner_of({"er": {"buffer": {"size": 20}}, "lwf": {}}, **SGD).learn(0).begin(1))
    step, terms = bench.step()
    assert len(step.batch) == 16 and step.current == 8
    old = bench.learner.composition.teacher(step.batch).logits[:8]
    torch.testing.assert_close(terms["lwf/kd"], distillation(step.logits[:8, :2], old, 2.0))
    assert torch.equal(terms["learner/ce"], F.cross_entropy(step.logits, step.batch.labels))


@pytest.mark.parametrize("owner", ["linear_probe", "coda_prompt"])
def test_a_head_on_a_frozen_trunk_is_distilled_as_well(learner_of, owner):
    keys = {"num_components": 12, "layers": [0, 1]} if owner == "coda_prompt" else {}
    bench = nudged(learner_of({owner: keys, "lwf": {}}, **SGD).learn(0).begin(1))
    step, terms = bench.step()
    old = bench.learner.composition.teacher(step.batch).logits
    torch.testing.assert_close(terms["lwf/kd"], distillation(step.logits[:, :2], old, 2.0))
    assert not any("backbone" in name for name in bench.learner.composition.teacher.state_dict())


def test_classes_that_come_back_are_all_old(learner_of):
    bench = nudged(learner_of({"lwf": {"warmup_epochs": 1}}, stream={"setting": "domain"}, **SGD).learn(0).begin(1))
    step, terms = bench.step()  # no new rows: nothing to warm up
    old = bench.learner.composition.teacher(step.batch).logits
    torch.testing.assert_close(terms["lwf/kd"], distillation(step.logits, old, 2.0))


def test_a_warm_up_trains_the_new_head_rows_alone(learner_of):
    bench = learner_of({"lwf": {"warmup_epochs": 2}}, **SGD)
    before = copy_of(dict(bench.learner.named_parameters()))
    bench.learn(0)
    assert differing(before, {n: bench.vit.get_parameter(n.removeprefix("backbone.")) for n in before})
    before = copy_of(dict(bench.learner.named_parameters()))
    bench.begin(1)
    fresh = copy_of(bench.learner.head.blocks.parameters_of(1))
    bench.learn(1, epochs=2)
    live = dict(bench.learner.named_parameters())
    assert not differing(before, {n: live[n] for n in before})
    assert len(differing(fresh, bench.learner.head.blocks.parameters_of(1))) == 2
    bench.learn(2, epochs=3)
    live = dict(bench.learner.named_parameters())
    assert len(differing(before, {n: live[n] for n in before})) > 10
