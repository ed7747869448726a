"""FPF is: the few modules that forget most are trained on the buffer alone for a short time; nothing else moves."""

from types import SimpleNamespace

import pytest
import torch
from tiny import (
    begun,
    built,
    config_of,
    copy_of,
    differing,
    digits,
    fit,
    images_of,
    learn,
    tiny_vit,
)
from torch import nn

from cl_platform.backbones import Backbone
from cl_platform.errors import UserError
from cl_platform.finetuning import Finetuning, cosine_rate, run_finetuning
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.strategies.base import Context
from cl_platform.strategies.k_fpf import triggers
from cl_platform.strategies.sensitivity import Sensitivity, units_of


class Convolutions(nn.Module):
    """Two convolutions with batch norm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu().mean((2, 3))


def cnn():
    with seeded_globals(0, RUN_LEVEL, "convolutions"):
        return Backbone(Convolutions(), "cnn", 8, 8)


def trained(backbone, **keys):
    """A learner behind the last batch of its second task, whose fine-tuning has not come."""
    config = config_of("fpf", strategy=keys)
    learner = learn(built(config, digits(), backbone=backbone), config, digits().tasks[:1])
    fit(learner, config, digits().tasks[1], epochs=2)
    return learner, learner.composition.members["fpf"]


def names_in_state(tensors):
    """Dotted names of a learner's parts as keys of its state."""
    return {name.replace("features.", "composition.members.coda_prompt.", 1) for name in tensors}


# -- what is chosen -------------------------------------------------------------------------------------------------


def test_by_default_a_cnn_has_its_head_first_convolution_and_all_of_its_batch_norms_chosen():
    learner, fpf = trained(cnn())
    chosen = set(fpf.prone.chosen())
    norms = {n.removeprefix("model.") for n, m in learner.backbone.named_modules() if isinstance(m, nn.BatchNorm2d)}
    statistics = {f"{norm}.{name}" for norm in norms for name in ("running_mean", "running_var")}
    assert chosen == {"head", "conv1"} | norms | statistics


def test_by_default_a_vit_has_its_head_and_all_of_its_norms_chosen_and_no_convolution():
    learner, fpf = trained(tiny_vit())
    norms = {n.removeprefix("model.") for n, m in learner.backbone.named_modules() if isinstance(m, nn.LayerNorm)}
    assert set(fpf.prone.chosen()) == {"head"} | norms


def test_every_parameter_and_running_statistic_is_in_one_unit():
    backbone = cnn()
    held = [name for unit in units_of({"backbone": backbone}).values() for name in unit.tensors]
    wanted = [n for n, _ in backbone.named_parameters()] + [n for n, _ in backbone.named_buffers() if "running" in n]
    assert sorted(held) == sorted(f"backbone.{name}" for name in wanted)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({}, cnn),
        ({"modules": "auto", "max_share": 0.2}, cnn),
        ({"modules": ["bn1.running_mean", "*2"]}, cnn),
        ({"modules": "auto", "score": "grad"}, tiny_vit),
    ],
)
def test_exactly_the_tensors_of_the_units_that_the_table_calls_chosen_change(keys, kind):
    learner, fpf = trained(kind(), **keys)
    before = copy_of(learner.state_dict())
    fpf.refine(digits().tasks[1])
    changed = {n for n in differing(before, learner.state_dict()) if not n.startswith("composition")}
    rows = [line.split(",") for line in fpf.artefacts()["fpf_sensitivity.csv"].splitlines()[1:]]
    units = units_of(learner.context.parts)
    assert changed == {n for row in rows if row[-1] == "1" for n in units[row[0]].tensors if "classes" not in n}
    assert 0 < len(changed) < len(before)


def test_auto_takes_the_head_and_then_the_highest_scores_that_fit():
    learner, fpf = trained(cnn(), modules="auto", max_share=0.2)
    fpf.prone.end_training(digits().tasks[1])
    table, units = fpf.prone.sensitivity.table(), fpf.prone.sensitivity.units()
    sizes = {name: sum(t.numel() for t in unit.tensors.values()) for name, unit in units.items()}
    sizes["head"] = sum(p.numel() for p in learner.head.parameters())
    chosen = set(fpf.prone.chosen())
    assert "head" in chosen and sum(sizes[n] for n in chosen) <= 0.2 * sum(sizes.values())
    room = 0.2 * sum(sizes.values()) - sum(sizes[n] for n in chosen)
    lowest = min(table[n][2] for n in chosen - {"head"})
    assert not [n for n in table if n not in chosen and table[n][2] > lowest and sizes[n] <= room]


def test_behind_a_frozen_trunk_the_head_and_the_tasks_own_prompts_are_chosen_and_the_trunk_keeps_its_bits():
    config = config_of("coda_prompt")
    config.strategy.update(config_of("fpf", strategy={"when": "each_task"}).strategy)
    learner = learn(built(config, digits()), config, digits().tasks[:1])
    digest, owned = learner.backbone.digest(), copy_of(learner.composition.members["coda_prompt"].state_dict())
    fit(learner, config, digits().tasks[1])
    fpf = learner.composition.members["fpf"]
    chosen = fpf.prone.chosen()
    assert "head" in chosen and len(chosen) > 1 and all(n == "head" or n.startswith("features.") for n in chosen)
    before = copy_of(learner.state_dict())
    fpf.refine(digits().tasks[1])
    changed = {n for n in differing(before, learner.state_dict()) if ".fpf." not in n}
    assert changed == names_in_state({n for tensors in chosen.values() for n in tensors})
    assert learner.backbone.digest() == digest
    after = learner.composition.members["coda_prompt"].state_dict()
    assert not [n for n in owned if ".tasks.0." in n and not torch.equal(owned[n], after[n])]


# -- what a fine-tuning leaves alone --------------------------------------------------------------------------------


def surroundings(learner):
    """All that a training notices beside weights."""
    return {
        "random": torch.get_rng_state(),
        "modes": [m.training for m in learner.modules()],
        "flags": [p.requires_grad for p in learner.parameters()],
        "gradients": [p.grad for p in learner.parameters()],
        "moments": {i: copy_of(s) for i, s in enumerate(learner.trainer.optimizers[0].state.values())},
    }


def same(one, other):
    assert torch.equal(one["random"], other["random"])
    assert one["modes"] == other["modes"] and one["flags"] == other["flags"]
    assert all(a is b for a, b in zip(one["gradients"], other["gradients"], strict=True))
    assert not any(differing(s, other["moments"][i]) for i, s in one["moments"].items())


@pytest.mark.parametrize("steps", [0, 2])
def test_random_numbers_modes_gradients_and_the_optimizer_of_the_training_stay(steps):
    learner, fpf = trained(cnn(), steps=steps)
    learner.train()
    for parameter in learner.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, weights = surroundings(learner), copy_of(learner.state_dict())
    fpf.refine(digits().tasks[1])
    same(before, surroundings(learner))
    changed = [n for n in differing(weights, learner.state_dict()) if ".fpf." not in n]
    assert bool(changed) == (steps > 0)
    assert learner.further_updates == steps


def test_anchors_are_taken_behind_the_fine_tuning_wherever_it_stands_in_the_list():
    for order in (["er", "l2", "fpf"], ["er", "fpf", "l2"]):
        config = config_of("fpf", strategy={"when": "each_task"})
        parts = {**config.strategy, "l2": config_of("l2").strategy["l2"]}
        config.strategy.clear()
        config.strategy.update({name: parts[name] for name in order})
        learner = learn(built(config, digits()), config, digits().tasks[:1])
        weight = learner.backbone.model.norm.weight
        anchors = [t for n, t in learner.composition.members["l2"].state_dict().items() if n.endswith("norm/weight")]
        anchors += [t for n, t in learner.composition.members["l2"].state_dict().items() if n.endswith("norm.weight")]
        assert any(torch.equal(anchor, weight) for anchor in anchors)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.other, self.last = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.other(self.norm(x)))


def plan_for(model, parameters, statistics, loss=None, **keys):
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=draws) + 2, torch.tensor([0, 1] * 4)
    loss = loss or (lambda logits: nn.functional.cross_entropy(logits, y))
    return Finetuning(
        "test", 0, 0, 0, 4, parameters, statistics, batch=lambda step: x, loss=loss, rate=cosine_rate(0.1, 4), **keys
    )


def test_one_running_statistic_can_follow_without_the_other_and_without_the_counter():
    model = Normed()
    before = copy_of(model.state_dict())
    run_finetuning(model, plan_for(model, [model.last.weight], [model.norm.running_var]), model, lambda loss: None)
    assert differing(before, model.state_dict()) == ["last.weight", "norm.running_var"]


def test_statistics_follow_where_no_parameter_is_chosen():
    model = Normed()
    before = copy_of(model.state_dict())
    run_finetuning(model, plan_for(model, [], [model.other.running_mean]), model, lambda loss: None)
    assert differing(before, model.state_dict()) == ["other.running_mean"]


def test_a_loss_that_is_not_finite_is_refused_by_the_key_of_the_rate():
    model = Normed()
    plan = plan_for(model, [model.last.weight], [], loss=lambda logits: logits.sum() * torch.inf, key="strategy.fpf.lr")
    with pytest.raises(UserError, match=r"strategy\.fpf\.lr=0\.1.*not finite"):
        run_finetuning(model, plan, model, lambda loss: None)
    assert all(p.requires_grad for p in model.parameters())


# -- when -----------------------------------------------------------------------------------------------------------


def test_the_triggers_of_a_hundred_updates():
    assert triggers(100, 3) == [34, 67, 100]


@pytest.mark.parametrize("k", [1, 3, 4])
def test_k_fine_tunings_come_after_the_planned_updates_and_draw_k_times_steps_times_b_rows(k, monkeypatch):
    config, seen, drawn = config_of("k_fpf", strategy={"k": k, "batch_size": 5}), [], []
    learner = built(config, digits())
    learner.context.planned_updates = 8
    strategy = learner.composition.members["k_fpf"]
    plain, sample = strategy.prone.finetune, strategy.buffer.sample
    monkeypatch.setattr(strategy.prone, "finetune", lambda *a: seen.append(strategy.prone.updates) or plain(*a))
    monkeypatch.setattr(strategy.buffer, "sample", lambda *a: drawn.append(sample(*a)) or drawn[-1])
    learn(learner, config, digits().tasks, epochs=2)
    assert seen == [-(-8 * j // k) for j in range(1, k + 1)]
    assert sum(len(rows.labels) for rows in drawn) == k * 3 * 5
    assert learner.further_updates == k * 3 == sum(strategy.further_updates([4, 4]))
    assert learner.images_forwarded == 2 * 32 + k * 3 * 5


def test_without_updates_of_its_own_k_fpf_is_plain_training_byte_for_byte():
    rule = {"name": "sgd", "lr": 0.05, "lr_per_256": None, "schedule": "constant", "momentum": 0.9}
    ends = []
    for name, keys in (("k_fpf", {"steps": 0, "k": 2}), ("finetune", {})):
        config = config_of(name, strategy=keys, optimizer=rule)
        learner = built(config, digits())
        learner.context.planned_updates = 8
        learn(learner, config, digits().tasks, epochs=2)
        ends.append({n: t for n, t in learner.state_dict().items() if not n.startswith("composition")})
    assert not differing(*ends)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [({"when": "end"}, [0, 3]), ({"when": "each_task"}, [3, 3]), ({"when": "every_k_steps", "every": 2}, [6, 6])],
)
def test_fine_tunings_come_when_they_are_told_to(keys, wanted):
    config, found = config_of("fpf", strategy=keys), []
    learner = built(config, digits())
    for task in digits().tasks:
        before = learner.further_updates
        learn(learner, config, [task], epochs=2)
        found.append(learner.further_updates - before)
    assert found == wanted == learner.composition.further_updates([4, 4])


# -- what is measured -----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    frozen = False

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.only = nn.Linear(1, 2, bias=False)


def measured(epochs_of_tasks, score="drift", between=None):
    backbone = Pair()
    weight = backbone.model.only.weight
    context = SimpleNamespace(parts={"backbone": backbone}, backbone=backbone, epochs=2, batches=1)
    context.trained = lambda: Context.trained(context)
    found = Sensitivity(score)
    found.follow(context)
    for number, ends in enumerate(epochs_of_tasks):
        found.begin(SimpleNamespace(task_id=number))
        for values in ends:
            found.before_batch()
            weight.data.copy_(torch.tensor(values)[:, None])
            found.after_batch()
            if between is not None:
                with found.aside():
                    weight.data.add_(between)
        found.end(SimpleNamespace(task_id=number))
    return found.table()["only"]


EPOCHS = [[(1.0, 1.0), (1.5, 1.0)], [(3.0, 1.0), (3.0, 2.0)]]


def test_the_score_of_two_numbers_over_two_tasks():
    assert measured(EPOCHS) == pytest.approx((0.375, 1.25, 10 / 3))


def test_a_restored_measurement_goes_on():
    one, other = Sensitivity("drift"), Sensitivity("drift")
    one.task_ids, one._records = [4], {name: [torch.ones(3).double().numpy()] for name in one._records}
    other.load_state_dict(one.state_dict())
    assert other.task_ids == [4] and all(row[0].tolist() == [1, 1, 1] for row in other._records.values())


def test_what_a_fine_tuning_moves_is_not_counted():
    moved = [[(1.0, 1.0), (1.5 + 7, 1.0 + 7)]]  # the stream moves by (.5, 0) between the two
    assert measured(moved, between=7.0)[0] == pytest.approx(0.25)
    assert measured(moved)[0] != pytest.approx(0.25)


def test_the_gradient_score_divides_the_early_gradients_by_the_late_ones_of_the_task_before():
    learner, fpf = trained(tiny_vit(), modules="auto", score="grad")
    fpf.prone.end_training(digits().tasks[1])
    record = fpf.prone.sensitivity._records
    assert (record["ratio"][0] < 0).all()
    names = list(fpf.prone.sensitivity.units())
    row = names.index("blocks.0.attn.qkv")
    scores = fpf.prone.sensitivity.table()
    assert scores[names[row]][2] == pytest.approx(record["ratio"][1][row])
    assert scores[names[row]][2] > 0


# -- refusals -------------------------------------------------------------------------------------------------------


def test_without_a_buffer_it_is_refused_by_name():
    config = config_of("fpf")
    del config.strategy["er"]
    with pytest.raises(UserError, match="fpf needs a replay buffer.*strategy=.er,fpf."):
        built(config, digits())


@pytest.mark.parametrize("name", ["fpf", "k_fpf"])
def test_an_unknown_module_is_refused_with_the_nearest_ones(name):
    with pytest.raises(UserError, match=rf"strategy\.{name}\.modules=blocks\.0\.nrm1.*blocks\.0\.norm1"):
        built(config_of(name, strategy={"modules": ["head", "blocks.0.nrm1"]}), digits())


def test_an_empty_buffer_is_refused():
    with pytest.raises(UserError, match=r"strategy\.k_fpf\.buffer\.size=0"):
        built(config_of("k_fpf", strategy={"buffer": {"size": 0}}), digits())


def test_distilling_is_refused_where_no_logits_are_kept():
    with pytest.raises(UserError, match=r"strategy\.fpf\.kd=0\.5.*keeps no logits"):
        built(config_of("fpf", strategy={"kd": 0.5}), digits())


def test_a_frozen_module_cannot_be_all_that_is_chosen():
    config = config_of("coda_prompt")
    config.strategy.update(config_of("fpf", strategy={"modules": "norm"}).strategy)
    learner = begun(config, digits())
    with pytest.raises(UserError, match=r"strategy\.fpf\.modules=norm: nothing of it is trained"):
        learner.composition.widen(None)


def test_stored_logits_pull_where_kd_is_above_zero():
    ends = []
    for kd in (0.0, 1.0):
        config = config_of("k_fpf", strategy={"kd": kd, "k": 2})
        learner = built(config, digits())
        learner.context.planned_updates = 4
        learn(learner, config, digits().tasks)
        assert (learner.composition.members["k_fpf"].buffer.logits is not None) == (kd > 0)
        ends.append(learner.logits_of_images(images_of(digits())))
    assert not torch.equal(*ends) and all(logits.isfinite().all() for logits in ends)


def test_norms_whose_statistics_are_not_chosen_are_in_eval_mode_meanwhile():
    model, seen = Normed(), []

    def loss(logits):
        seen.append((model.norm.training, model.other.training, model.training))
        return logits.square().mean()

    model.eval()
    statistics = [model.norm.running_mean, model.norm.running_var]
    run_finetuning(model, plan_for(model, [model.last.weight], statistics, loss), model, lambda loss: None)
    assert seen == [(True, False, True)] * 4
    assert not any(module.training for module in model.modules())
