"""EWC is EWC because a move costs what the Fisher information, squared example by example, says that entry is worth."""

import logging

import pytest
import torch
from tiny import built as tiny_built
from tiny import config_of, copy_of, differing, digits

from cl_platform.backbones import BackboneConfig, build_backbone
from cl_platform.strategies import ewc
from cl_platform.strategies.ewc import fisher_sums, merged, penalty

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
F64 = torch.float64


def of(bench):
    return bench.learner.composition.members["ewc"]


def nudged(bench, scale=0.01):
    """Every trained parameter a little away from where it was."""
    draw = torch.Generator().manual_seed(5)
    for parameter in bench.learner.parameters():
        if parameter.requires_grad:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=draw))
    return bench


def without_records(bench):
    return {n: t for n, t in bench.learner.state_dict().items() if ".records." not in n}


# -- the penalty ------------------------------------------------------------------------------------------------------

THETA = [0.5, -1.0, 2.0]
ANCHOR_1, ANCHOR_2 = [0.0, -1.0, 1.0], [0.4, -0.5, 1.5]
FISHER_1, FISHER_2 = [2.0, 0.5, 1.0], [1.0, 4.0, 0.25]


def tensors(*rows):
    return [torch.tensor(row, dtype=F64) for row in rows]


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=atol)


def test_separate_penalties_add():
    (theta,) = tensors(THETA)
    theta.requires_grad_()
    value = penalty([theta, theta], tensors(ANCHOR_1, ANCHOR_2), tensors(FISHER_1, FISHER_2), 10.0)
    close(value, 12.8625)
    value.backward()
    close(theta.grad, [11.0, -20.0, 11.25])


@pytest.mark.parametrize(
    ("gamma", "fisher", "value", "gradient"),
    [
        (1.0, [3.0, 4.5, 1.25], 7.3375, [3.0, -22.5, 6.25]),
        (0.9, [2.8, 4.45, 1.15], 7.14, [2.8, -22.25, 5.75]),
    ],
)
def test_online_sums_the_information_around_the_latest_parameters(gamma, fisher, value, gradient):
    theta, one, other = tensors(THETA, FISHER_1, FISHER_2)
    theta.requires_grad_()
    total = merged({"w": one}, {"w": other}, gamma)["w"]
    close(total, fisher)
    found = penalty([theta], tensors(ANCHOR_2), [total], 10.0)
    close(found, value)
    found.backward()
    close(theta.grad, gradient)


def test_online_without_decay_equals_separate_where_the_anchors_agree():
    theta, one, other, anchor = tensors(THETA, FISHER_1, FISHER_2, ANCHOR_1)
    separate = penalty([theta, theta], [anchor, anchor], [one, other], 3.0)
    close(penalty([theta], [anchor], [merged({"w": one}, {"w": other}, 1.0)["w"]], 3.0), separate)


def test_a_name_that_only_one_side_knows_is_kept():
    old, new = tensors(FISHER_1, FISHER_2)
    found = merged({"old": old}, {"new": new}, 0.5)
    close(found["old"], 0.5 * old)
    close(found["new"], new)


# -- the Fisher information -------------------------------------------------------------------------------------------

X, W, Y = torch.tensor([1.0, -1.0, 2.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([1, 1, 0])


def line(values, row):
    return (values["w"] * X[row]).log_softmax(0)


def information(estimator, labels=Y, uniforms=None):
    rows = torch.arange(3)
    uniforms = torch.zeros(3, dtype=F64) if uniforms is None else uniforms
    return fisher_sums(line, {"w": W}, estimator, rows, labels, uniforms)["w"] / 3


@pytest.mark.parametrize(
    ("estimator", "value"), [("exact", 0.271066069), ("empirical", 1.236663368), ("pred", 0.067165441)]
)
def test_each_estimator_gives_its_own_number(estimator, value):
    """Neither the square of the mean gradient (.549432445), nor weights by p of the true label (.188841369), nor n - 1
    as divisor (1.854995052): the numbers of released code."""
    close(information(estimator), [value, value])


def test_one_draw_a_row_is_right_on_average():
    grid = (torch.arange(2000, dtype=F64) + 0.5) / 2000
    mean = torch.stack([information("sample", uniforms=u.expand(3)) for u in grid[::10]]).mean(0)
    torch.testing.assert_close(mean, information("exact"), rtol=0.02, atol=0)
    drawn = {tuple(information("sample", uniforms=u.expand(3)).tolist()) for u in grid[::100]}
    assert len(drawn) > 2


def test_a_draw_beyond_the_rounded_sum_of_probabilities_is_the_last_class():
    assert information("sample", uniforms=torch.ones(3, dtype=F64)).isfinite().all()


@pytest.mark.parametrize("estimator", ["exact", "sample", "pred"])
def test_labels_are_not_read_unless_wanted(estimator):
    assert torch.equal(information(estimator), information(estimator, labels=1 - Y))
    assert not torch.equal(information("empirical"), information("empirical", labels=1 - Y))


def by_loop(bench, rows, estimator="exact"):
    """One example after the other, one class after the other, with plain autograd."""
    task, live = bench.learner.task, bench.learner.context.trained()
    total = {name: torch.zeros_like(p) for name, p in live.items()}
    images = bench.learner.transforms.evaluate(task.train.images(slice(None)))
    bench.learner.eval()
    for row in rows:
        logs = bench.learner.head(bench.vit(images[row : row + 1]))[0].log_softmax(0)
        label = bench.learner.head.classes.index(int(task.train.labels[row]))
        for y in range(len(logs)) if estimator == "exact" else [label]:
            weight = logs[y].detach().exp() if estimator == "exact" else 1.0
            gradients = torch.autograd.grad(logs[y], list(live.values()), retain_graph=True)
            for name, gradient in zip(live, gradients, strict=True):
                total[name] += weight * gradient.square() / len(rows)
    bench.learner.train()
    return total


def agree(one, other, rtol=1e-4):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=rtol, atol=1e-6 * float(tensor.max()) + 1e-12)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_of_a_network_it_equals_a_loop_over_examples_and_classes_over_all_seen_classes(learner_of, estimator):
    bench = learner_of({"ewc": {"fisher": estimator}}, **SGD).learn(0).begin(1)
    found = of(bench).estimate(bench.learner.task)
    assert "head.blocks.tasks.1.weight" in found and any("qkv" in name for name in found)
    agree(by_loop(bench, range(16), estimator), found)
    assert all(bool((tensor >= 0).all()) for tensor in found.values())


def test_chunks_do_not_matter(learner_of, monkeypatch):
    bench = learner_of({"ewc": {}}, **SGD).begin(0)
    whole = of(bench).estimate(bench.learner.task)
    for size in (1, 5):
        monkeypatch.setattr(ewc, "CHUNK_EXAMPLES", size)
        agree(whole, of(bench).estimate(bench.learner.task), rtol=1e-4)
    monkeypatch.setattr(ewc, "CHUNK_NUMBERS", 1)
    agree(whole, of(bench).estimate(bench.learner.task), rtol=1e-4)


def test_as_many_images_as_wanted_are_drawn_by_the_seed_and_divided_by(learner_of):
    bench = learner_of({"ewc": {"fisher_samples": 5}}, **SGD).begin(0)
    asked, real = [], bench.learner.context.evaluated
    bench.learner.context.evaluated = lambda task, rows: asked.extend(rows.tolist()) or real(task, rows)
    found = of(bench).estimate(bench.learner.task)
    assert len(set(asked)) == 5
    agree(by_loop(bench, asked), found)
    first = list(asked)
    of(bench).estimate(bench.learner.task)
    assert asked == first * 2
    other = learner_of({"ewc": {"fisher_samples": 5}}, seed=1, **SGD).begin(0)
    rows = []
    again = other.learner.context.evaluated
    other.learner.context.evaluated = lambda task, r: rows.extend(r.tolist()) or again(task, r)
    of(other).estimate(other.learner.task)
    assert rows != first


def test_dropout_and_the_global_generator_take_no_part(learner_of):
    bench = learner_of({"ewc": {}}, vit={"proj_drop_rate": 0.3, "drop_path_rate": 0.2}, **SGD).begin(0)
    modes = [m.training for m in bench.learner.modules()]
    state = torch.get_rng_state()
    one, other = (of(bench).estimate(bench.learner.task) for _ in range(2))
    assert not differing(one, other)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in bench.learner.modules()] and any(modes)
    agree(by_loop(bench, range(16)), one)


def test_recomputed_blocks_are_no_obstacle(learner_of):
    bench = learner_of({"ewc": {}}, **SGD).begin(0)
    plain = of(bench).estimate(bench.learner.task)
    bench.vit.vit.set_grad_checkpointing(True)
    agree(plain, of(bench).estimate(bench.learner.task))
    assert bench.vit.vit.grad_checkpointing


def test_batch_norm_is_in_eval_mode_and_keeps_its_statistics():
    config = config_of("ewc")
    learner = tiny_built(config, digits(), backbone=build_backbone(BackboneConfig(kind="resnet18_slim")))
    learner.begin_task(digits().tasks[0], 1)
    learner.train()
    before = copy_of(learner.backbone.state_dict())
    strategy = learner.composition.members["ewc"]
    found = strategy.estimate(digits().tasks[0])
    assert not differing(before, learner.backbone.state_dict())
    assert all(bool(t.isfinite().all()) for t in found.values()) and any(bool(t.any()) for t in found.values())
    learner.eval()
    images = learner.transforms.evaluate(digits().tasks[0].train.images(slice(0, 1)))
    weight = learner.head.blocks.get(0, "weight")
    probability = learner.head(learner.backbone(images)).softmax(1)[0]
    features = learner.backbone(images)[0]
    single = digits().tasks[0].train.select(torch.tensor([0]))
    alone = strategy.estimate(type(digits().tasks[0])(0, 0, (0, 1), single, single, single))
    by_hand = (probability * (1 - probability))[:, None] * features.square()  # of two classes: p (1 - p) h^2
    torch.testing.assert_close(alone["head.blocks.tasks.0.weight"], by_hand.expand_as(weight), rtol=1e-3, atol=1e-9)


def test_many_classes_are_sampled_and_few_summed_up(learner_of, monkeypatch):
    used = []
    real = ewc.fisher_sums
    monkeypatch.setattr(ewc, "fisher_sums", lambda *a: used.append(a[2]) or real(*a))
    bench = learner_of({"ewc": {}}, **SGD).begin(0)
    of(bench).estimate(bench.learner.task)
    monkeypatch.setattr(ewc, "EXACT_UP_TO", 1)
    of(bench).estimate(bench.learner.task)
    assert used == ["exact", "sample"]


# -- the strategy -----------------------------------------------------------------------------------------------------


def test_alone_it_is_finetuning_with_a_penalty_and_beside_finetune_the_same_bytes(learner_of):
    alone = learner_of({"ewc": {}}, **SGD).learn(0, 1)
    beside = learner_of({"finetune": {}, "ewc": {}}, **SGD).learn(0, 1)
    assert not differing(alone.learner.state_dict(), beside.learner.state_dict())
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1)
    assert differing(without_records(alone), plain.learner.state_dict())


def test_without_weight_it_is_finetuning_bit_for_bit(learner_of):
    off = learner_of({"ewc": {"lambda": 0}}, **SGD).learn(0, 1)
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1)
    assert not differing(without_records(off), plain.learner.state_dict())


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_the_penalty_is_zero_at_the_anchor_with_a_zero_gradient(learner_of, mode):
    bench = learner_of({"ewc": {"mode": mode}}, **SGD).begin(0)
    assert set(bench.step()[1]) == {"learner/ce"}
    bench.learn(0).begin(1)
    _, terms = bench.step()
    assert terms["ewc/penalty"].item() == 0
    terms["ewc/penalty"].backward()
    assert all(p.grad is None or not p.grad.any() for p in bench.learner.parameters())
    _, terms = nudged(bench).step()
    assert float(terms["ewc/penalty"]) > 0


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_the_penalty_is_the_formula_over_what_is_remembered(learner_of, mode):
    bench = learner_of({"ewc": {"mode": mode, "lambda": 7.0}}, **SGD).learn(0, 1).begin(2)
    records, live = of(bench).records, dict(bench.learner.named_parameters())
    assert records.task_ids == ([1] if mode == "online" else [0, 1])
    _, terms = nudged(bench).step()
    total = 0.0
    for task_id in records.task_ids:
        fisher = records.read(task_id, "importance")
        for name, anchor in records.read(task_id, "anchor").items():
            total += float((fisher[name] * (live[name] - anchor).double() ** 2).sum())
    assert float(terms["ewc/penalty"]) == pytest.approx(3.5 * total, rel=1e-4)
    assert bench.learner.composition.stability == {"ewc/penalty"}


def test_online_adds_what_the_next_task_says_and_moves_the_anchor(learner_of):
    bench = learner_of({"ewc": {"gamma": 0.5}}, **SGD).learn(0)
    before = copy_of(of(bench).records.read(0, "importance"))
    noted, real = [], of(bench).estimate
    of(bench).estimate = lambda task: noted.append(real(task)) or noted[-1]
    bench.learn(1)
    after, anchor = of(bench).records.read(1, "importance"), of(bench).records.read(1, "anchor")
    for name, tensor in after.items():
        earlier = 0.5 * before[name] if name in before else 0.0
        torch.testing.assert_close(tensor, earlier + noted[0][name])
    live = dict(bench.learner.named_parameters())
    assert anchor.keys() == after.keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in anchor.items())


def test_rows_of_a_new_task_are_in_no_sum(learner_of):
    bench = nudged(learner_of({"ewc": {"mode": "separate"}}, **SGD).learn(0, 1).begin(2))
    _, terms = bench.step()
    terms["ewc/penalty"].backward()
    blocks = bench.learner.head.blocks
    assert all(p.grad is None for p in blocks.parameters_of(2).values())
    assert all(bool(p.grad.any()) for t in (0, 1) for p in blocks.parameters_of(t).values())
    assert all(p.grad is not None for p in bench.vit.parameters())


def test_what_mattered_moves_less_than_without(learner_of):
    moved = {}
    for strength in (0.0, 300.0):
        bench = learner_of({"ewc": {"lambda": strength}}, name="sgd", lr=1e-3, momentum=0.0).learn(0, epochs=8)
        records = of(bench).records
        anchor = copy_of(records.read(0, "anchor"))
        fisher = copy_of(records.read(0, "importance"))
        bench.learn(1, epochs=8)
        live = dict(bench.learner.named_parameters())
        moved[strength] = sum(float((fisher[n] * (live[n] - a) ** 2).sum()) for n, a in anchor.items())
    assert moved[300.0] < 0.5 * moved[0.0]


PROMPTED = [{"l2p": {"pool_size": 4, "length": 2, "top_k": 2}}, {"dual_prompt": {"g_layers": [0], "e_layers": [1]}}]


@pytest.mark.parametrize("owner", [{"linear_probe": {}}, *PROMPTED], ids=lambda owner: next(iter(owner)))
def test_beside_prompts_or_a_probe_it_holds_what_they_train(learner_of, owner):
    bench = learner_of({**owner, "ewc": {}}, **SGD).learn(0)
    fisher = of(bench).records.read(0, "importance")
    assert fisher.keys() == bench.learner.context.trained().keys()
    assert not any(name.startswith("backbone.") for name in fisher)
    assert any(bool(t.any()) for t in fisher.values())
    _, terms = nudged(bench.begin(1)).step()
    assert float(terms["ewc/penalty"]) > 0


def test_where_every_task_trains_parameters_of_its_own_it_says_that_it_holds_nothing(learner_of, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cl_platform"), "propagate", True)
    bench = learner_of({"coda_prompt": {"num_components": 12, "layers": [0, 1]}, "ewc": {}}, name="adam").learn(0, 1)
    assert any(bool(t.any()) for t in of(bench).records.read(1, "importance").values())
    assert "ewc/penalty" not in bench.begin(2).step()[1]
    assert [r.message for r in caplog.records] == [
        "ewc: nothing that is trained now existed before, so that it holds nothing"
    ]


ALL = {"ewc": {}, "l2": {}, "si": {}, "lwf": {}, "feature_distillation": {}}


def test_the_order_of_all_that_protects_does_not_change_the_loss(learner_of):
    found = []
    for names in (list(ALL), list(reversed(ALL))):
        bench = nudged(learner_of({name: ALL[name] for name in names}, **SGD).learn(0, epochs=1).begin(1))
        terms = bench.step()[1]
        assert len(terms) == 5 and bench.learner.composition.stability == set(terms) - {"learner/ce"}
        found.append(sum(float(v.detach()) for v in terms.values()))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_all_that_protects_goes_together_with_replay_and_restores_by_its_state_alone(learner_of):
    keys = {"er": {"buffer": {"size": 20}}, **ALL}
    bench = learner_of(keys, **SGD).learn(0, 1, epochs=1)
    other = learner_of(keys, **SGD)
    other.learner.load_learnt_state(copy_of(bench.learner.learnt_state()))
    assert not differing(bench.learner.state_dict(), other.learner.state_dict())
    losses = [nudged(b.begin(2)).step()[1] for b in (bench, other)]
    assert losses[0].keys() == losses[1].keys() and len(losses[0]) == 5
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_a_rate_at_which_the_penalty_diverges_is_said_once(learner_of, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cl_platform"), "propagate", True)
    learner_of({"ewc": {"lambda": 1e6}}, name="adam", lr=0.01).learn(0, epochs=1)
    assert not caplog.records
    bench = learner_of({"ewc": {"lambda": 1e6}}, name="sgd", lr=1e-6, momentum=0.0)
    bench.learner.context.sgd_rate = 0.05
    bench.learn(0, 1, epochs=1)
    assert [r.message.startswith("ewc: learning rate x lambda") for r in caplog.records] == [True]


def test_the_context_knows_the_rate_of_sgd_and_of_no_other_rule(learner_of):
    assert learner_of({"ewc": {}}, **SGD).learner.context.sgd_rate == 0.05
    scaled = learner_of({"ewc": {}}, name="sgd", lr_per_256=0.32)
    assert scaled.learner.context.sgd_rate == pytest.approx(0.01)
    assert learner_of({"ewc": {}}, name="adam").learner.context.sgd_rate == 0.0


# -- what is remembered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_records_name_the_tasks_behind_them_and_restore_by_their_state_alone(learner_of, mode):
    bench = learner_of({"ewc": {"mode": mode}}, **SGD).learn(0, 1)
    owners = {c.name: c.tasks for c in of(bench).components()}
    both = {"records.tasks.1": (0, 1)}
    assert owners == (both if mode == "online" else {"records.tasks.0": (0,), **both})
    declared = {f"{c.name}.{n}" for c in of(bench).components() for n in c.tensors}
    assert declared == set(of(bench).state_dict())
    other = learner_of({"ewc": {"mode": mode}}, **SGD)
    other.learner.load_learnt_state(copy_of(bench.learner.learnt_state()))
    assert not differing(bench.learner.state_dict(), other.learner.state_dict())
    one, two = (nudged(b.begin(2)).step()[1]["ewc/penalty"] for b in (bench, other))
    assert torch.equal(one, two) and one > 0


def test_dropping_a_task_takes_its_record_and_its_rows_along(learner_of):
    separate = learner_of({"ewc": {"mode": "separate"}}, **SGD).learn(0, 1)
    of(separate).drop_task(0)
    assert of(separate).records.task_ids == [1]
    assert not any("tasks.0." in n for n in of(separate).records.read(1, "anchor"))
    online = learner_of({"ewc": {}}, **SGD).learn(0, 1)
    of(online).drop_task(0)
    assert of(online).records.task_ids == [1]
    assert not any("tasks.0." in n for n in of(online).records.read(1, "importance"))
    assert [c.tasks for c in of(online).components()] == [(0, 1)]
    only = learner_of({"ewc": {}}, **SGD).learn(0)
    of(only).drop_task(0)
    assert not of(only).state_dict()


def test_a_task_of_known_classes_adds_to_the_same_entries(learner_of):
    bench = learner_of({"ewc": {}}, stream={"setting": "domain"}, **SGD).learn(0, 1)
    held = of(bench).records.read(1, "anchor")
    assert {n for n in held if n.startswith("head.")} == {"head.blocks.tasks.0.weight", "head.blocks.tasks.0.bias"}


def test_the_penalty_is_in_float32_under_bfloat16(learner_of):
    bench = learner_of({"ewc": {}}, precision="bf16-mixed", **SGD).learn(0).begin(1)
    with bench.learner.precision_context():
        _, terms = nudged(bench).step()
    assert terms["ewc/penalty"].dtype == torch.float32
    assert terms["ewc/penalty"] > 0
