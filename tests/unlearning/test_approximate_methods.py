"""What every approximate method keeps to: a copy, its checks, its own streams, and the label approximate."""

import math

import pytest
import torch
from forgetful import (
    accuracy,
    asked,
    at_work,
    changed,
    method,
    noise_stream,
    replaced,
    shorter,
    state_of,
    taught,
    teach,
)

from cl_platform.errors import UserError
from cl_platform.random_streams import RUN_LEVEL
from cl_platform.registry import unlearning_methods
from cl_platform.unlearning.approximate import base, build_method

NAMES = unlearning_methods.names()
QUICK = {"boundary_shrink": {"epochs": 1}, "boundary_expand": {"epochs": 1}, "scar": {"epochs": 1}}
QUICK |= {name: {"epochs": 1} for name in ("random_label", "salun", "l1_sparse", "npo", "simnpo", "duck")}


def quick(name):
    return method(name, **QUICK.get(name, {}))


def test_all_methods_of_the_list_are_there():
    assert set(NAMES) >= {
        "grad_ascent", "grad_diff", "random_label", "salun", "ssd", "boundary_shrink", "boundary_expand", "scar",
        "l1_sparse", "npo", "simnpo", "duck",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_approximate_and_changes_nothing_but_what_was_trained(name):
    learner = taught("linear_probe", loss="task")
    before = state_of(learner)
    report = quick(name).apply(learner, asked())
    assert report.level == "approximate"
    assert report.method == name
    assert report.seconds > 0
    assert report.images > 0
    assert not report.facts["moves_features"]  # the head alone is trained here
    trained = {n for n, _ in learner.named_parameters() if n.startswith("head.")}
    assert changed(learner, before) <= trained
    assert report.params == sum(learner.state_dict()[n].numel() for n in trained)
    assert all(p.grad is None for p in learner.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_method_draws_from_its_own_streams_and_gives_the_same_bits_again(name):
    torch.manual_seed(1)
    learner = taught(augment="crop_flip")
    again = taught(augment="crop_flip")
    generator = torch.get_rng_state()
    facts = quick(name).apply(learner, asked()).facts
    assert torch.equal(torch.get_rng_state(), generator)
    torch.manual_seed(2)
    assert quick(name).apply(again, asked()).facts == facts
    assert not changed(again, state_of(learner))


def test_modes_and_gradients_of_the_learner_are_left_alone():
    learner = taught(norm=True)
    learner.train()
    flags = [(p.requires_grad, p.grad) for p in learner.parameters()]
    modes = [module.training for module in learner.modules()]
    quick("grad_diff").apply(learner, asked())
    assert [module.training for module in learner.modules()] == modes
    assert [(p.requires_grad, p.grad) for p in learner.parameters()] == flags


@pytest.mark.parametrize("name", ["grad_ascent", "grad_diff", "random_label", "ssd"])
def test_a_task_is_forgotten_and_the_others_are_kept(name):
    learner, stream = taught(), noise_stream()
    assert accuracy(learner, stream.task(1).train) > 0.9
    keys = {
        "grad_ascent": {"lr": 0.02, "epochs": 50},
        "grad_diff": {"lr": 0.1, "w": 0.6, "epochs": 20},
        "random_label": {"lr": 0.05, "batch_size": 16},
        "ssd": {"lambda_": 0.1},
    }
    report = method(name, **keys[name]).apply(learner, asked())
    assert accuracy(learner, stream.task(1).train) < 0.5
    assert report.checks["retain_accuracy_after"] >= 0.5 * report.checks["retain_accuracy_before"]
    assert report.checks["retain_images"] == 40


def test_a_method_that_lowers_nothing_says_so(monkeypatch):
    said = []
    monkeypatch.setattr(base.log, "warning", lambda text, *values: said.append(text % values))
    report = method("grad_ascent", lr=1e-9, epochs=1).apply(taught(), asked())
    assert report.checks["forget_accuracy_after"] == report.checks["forget_accuracy_before"] > 0.9
    assert said[0].startswith("grad_ascent did not lower the accuracy on the images to forget: ")
    method("grad_ascent", lr=0.02, epochs=50).apply(taught(), asked())
    assert len(said) == 1


def test_a_ruined_copy_never_replaces_the_model():
    learner = taught()
    before = state_of(learner)
    with pytest.raises(UserError, match=r"min_retain_ratio=0.99: .* stays as it was") as refusal:
        method("grad_ascent", lr=5.0, batch_size=4, clip=None).apply(learner, asked(min_retain_ratio=0.99))
    assert refusal.value.exit_code == 3
    assert not changed(learner, before)
    assert all(torch.equal(v, before[n]) for n, v in learner.state_dict().items())


def test_an_infinite_loss_never_replaces_the_model():
    learner = taught()
    before = state_of(learner)
    with pytest.raises(UserError, match=r"unlearning.random_label.lr=1e\+30: a loss was not finite") as refusal:
        method("random_label", lr=1e30).apply(learner, asked())
    assert refusal.value.exit_code == 3
    assert not changed(learner, before)


@pytest.mark.parametrize("strategy", ["nmc", "slda", "ranpac"])
def test_a_learner_without_gradients_is_refused_by_name(strategy):
    with pytest.raises(UserError, match=rf"strategy=\[{strategy}\] trains nothing by gradients") as refusal:
        quick("grad_ascent").apply(taught(strategy, updates=0), asked())
    assert refusal.value.exit_code == 2


def test_what_cannot_be_had_is_refused_in_words():
    learner, request = taught(), asked()
    with pytest.raises(UserError, match="needs images of kept tasks"):
        quick("ssd").apply(learner, replaced(request, retain={}))
    with pytest.raises(UserError, match="no image of task 1 can be had"):
        quick("grad_ascent").apply(learner, replaced(request, forget=shorter(request.forget, 0)))
    with pytest.raises(UserError, match="is no task that was learnt here"):
        learner.owners.drop(1)
        quick("grad_ascent").apply(learner, request)
    with pytest.raises(UserError, match="no class remains"):
        alone = noise_stream(tasks=1)
        quick("grad_ascent").apply(teach("finetune", alone), asked(alone, task_id=0))
    with pytest.raises(ValueError, match="of no class of it"):
        quick("grad_ascent").apply(taught(), asked(forget=noise_stream().task(0).train))
    with pytest.raises(UserError, match=r"unlearning.salun.q=1.5: must be at most 1"):
        build_method("salun", {"q": 1.5})


def test_images_to_forget_never_move_a_running_statistic():
    for name, moved in (("grad_ascent", False), ("random_label", False), ("grad_diff", True), ("l1_sparse", True)):
        learner = taught(norm=True)
        before = state_of(learner)
        method(name, epochs=1, lr=1e-6).apply(learner, asked())
        names = {n.rpartition(".")[2] for n in changed(learner, before) if n.startswith("backbone.model.2.")}
        assert ("running_mean" in names) == moved, name


def test_retained_batches_alone_go_into_the_statistics():
    work = at_work(learner=taught(norm=True))
    (norm,) = work._following
    batch = next(work.ordered(work.forget, 8))
    work.logits(batch)
    assert norm.num_batches_tracked == 0
    work.logits(batch, retained=True)
    assert norm.num_batches_tracked == 1
    assert not norm.training


def test_labels_and_accuracies_follow_the_setting():
    labels = torch.tensor([2, 3])
    work = at_work()
    assert work.classes.remaining == [0, 1, 4, 5]
    assert work.classes.others(labels).tolist() == [[True, True, False, False, True, True]] * 2
    assert work.classes.chance == 1 / 4
    for setting, others, chance in (("domain", [[False, True], [True, False]], 1 / 2), ("task", None, 1 / 2)):
        stream = noise_stream(setting=setting)
        work = at_work(learner=taught(setting=setting), stream=stream)
        if others is not None:
            assert work.classes.others(torch.tensor([0, 1])).tolist() == others
        else:
            assert work.classes.others(labels).nonzero().tolist() == [[0, 3], [1, 2]]
            kept = work.classes.competing(torch.zeros(2, 6), labels)
            assert kept.isfinite().nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
        assert work.classes.chance == chance
        for name in ("grad_ascent", "random_label", "npo", "boundary_shrink", "duck", "scar"):
            report = quick(name).apply(taught(setting=setting), asked(stream))
            assert math.isfinite(report.facts["forget_accuracy"])


def test_held_out_images_are_preferred_for_the_check():
    stream = noise_stream()
    report = quick("ssd").apply(taught(), asked(validation={0: shorter(stream.task(0).train, 7)}))
    assert report.checks["retain_images"] == 7
    assert report.checks["retain_split"] == "validation"


def test_owner_records_say_that_what_changed_saw_the_task():
    learner = taught("linear_probe", loss="task")
    assert learner.owners.shaped(2) == (2,)
    quick("random_label").apply(learner, asked())
    assert learner.owners.shaped(2) == (0, 1, 2)
    assert learner.owners.shaped(RUN_LEVEL) == ()
