"""GEM is GEM because every old task's whole memory has a constraint of its own, and all are met at once."""

import itertools
import logging

import numpy as np
import pytest
import torch
from tiny import differing

from cl_platform.errors import UserError
from cl_platform.strategies import build_strategies
from cl_platform.strategies.agem import project
from cl_platform.strategies.gem import add_weighted, dual, inner_products

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.0}
G = np.array([[1.0, 0, 1], [0, 2, -1]])


def solved(rows, gradient, gamma, eps):
    weights = dual(rows @ rows.T, rows @ gradient, gamma, eps)
    return weights, gradient + rows.T @ weights


def by_brute_force(rows, gradient, gamma, eps):
    """The best of all choices of which weights stand at their bound."""
    count = len(rows)
    matrix, linear = rows @ rows.T + eps * np.eye(count), rows @ gradient
    best = None
    for bound in itertools.product((False, True), repeat=count):
        at = np.array(bound)
        weights = np.full(count, float(gamma))
        if not at.all():
            side = -linear[~at] - matrix[np.ix_(~at, at)] @ weights[at]
            weights[~at] = np.linalg.solve(matrix[np.ix_(~at, ~at)], side)
        if (weights >= gamma - 1e-12).all():
            value = weights @ matrix @ weights / 2 + linear @ weights
            if best is None or value < best[0]:
                best = (value, weights)
    return best[1]


# -- the quadratic program --------------------------------------------------------------------------------------------


def test_two_constraints_at_once_are_not_two_projections_one_after_the_other():
    gradient = np.array([-1.0, -1, 0.5])
    weights, found = solved(G, gradient, 0.0, 0.0)
    np.testing.assert_allclose(weights, (0.555555556, 0.611111111), atol=1e-8)
    np.testing.assert_allclose(found, (-0.444444444, 0.222222222, 0.444444444), atol=1e-8)
    np.testing.assert_allclose(G @ found, 0, atol=1e-8)
    for gamma in (0.0, 0.5):
        weights, found = solved(G, gradient, gamma, 1e-3)
        np.testing.assert_allclose(weights, (0.555179243, 0.610913666), atol=1e-8)
        np.testing.assert_allclose(found, (-0.444820757, 0.221827332, 0.444265577), atol=1e-8)
        np.testing.assert_allclose(G @ found, (-0.000555179, -0.000610914), atol=1e-8)
    one_by_one = gradient.copy()
    for row in G:
        one_by_one -= min(one_by_one @ row, 0) / (row @ row) * row
    np.testing.assert_allclose(one_by_one, (-0.75, 0.1, 0.2), atol=1e-8)
    np.testing.assert_allclose(G @ one_by_one, (-0.55, 0), atol=1e-8)


def test_the_bound_gives_a_task_that_does_not_object_its_share():
    gradient = np.array([-1.0, 1, 0.5])
    weights, found = solved(G, gradient, 0.0, 0.0)
    np.testing.assert_allclose(weights, (0.25, 0), atol=1e-8)
    np.testing.assert_allclose(found, (-0.75, 1, 0.75), atol=1e-8)
    np.testing.assert_allclose(G @ found, (0, 1.25), atol=1e-8)
    weights, found = solved(G, gradient, 0.5, 1e-3)
    np.testing.assert_allclose(weights, (0.5, 0.5), atol=1e-8)
    np.testing.assert_allclose(found, (-0.5, 2, 0.5), atol=1e-8)
    np.testing.assert_allclose(G @ found, (0, 3.5), atol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_no_choice_of_weights_at_their_bound_is_better(count):
    draw = np.random.default_rng(count)
    for _ in range(30):
        rows, gradient = draw.normal(size=(count, 8)), draw.normal(size=8)
        for gamma, eps in ((0.0, 0.0), (0.0, 1e-3), (0.5, 1e-3)):
            weights, found = solved(rows, gradient, gamma, eps)
            np.testing.assert_allclose(weights, by_brute_force(rows, gradient, gamma, eps), atol=1e-7)
            if gamma == eps == 0:
                assert (rows @ found >= -1e-6).all()
                assert np.allclose(found, gradient, atol=1e-9) == bool((rows @ gradient >= 0).all())


def test_more_tasks_than_the_gradient_has_entries_are_solved_for_thanks_to_eps():
    draw = np.random.default_rng(0)
    rows, gradient = draw.normal(size=(6, 3)), draw.normal(size=3)
    np.testing.assert_allclose(
        solved(rows, gradient, 0.5, 1e-3)[0], by_brute_force(rows, gradient, 0.5, 1e-3), atol=1e-7
    )
    assert dual(np.zeros((2, 2)), np.ones(2), 0.0, 0.0) is None  # not a program with one answer


def test_with_one_old_task_it_is_the_projection_on_a_single_constraint():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        gradient, reference = torch.randn(2, 9, generator=draw, dtype=torch.float64)
        mine, other = gradient.clone(), gradient.clone()
        if gradient @ reference < 0:
            weights = dual(
                np.array([[float(reference @ reference)]]), np.array([float(gradient @ reference)]), 0.0, 0.0
            )
            add_weighted([mine], [[reference]], weights)
        project([other], [reference])
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


def test_products_are_those_of_the_joined_parts_in_float64():
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (4,), (1, 2, 2)]
    vectors = [[torch.randn(shape, generator=draw) for shape in shapes] for _ in range(3)]
    vectors[1][1] = vectors[2][1] = None
    joined = torch.stack(
        [torch.cat([torch.zeros(4) if p is None else p.flatten() for p in v]).double() for v in vectors]
    )
    found = inner_products(vectors)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, joined @ joined.T, rtol=1e-12, atol=1e-12)


# -- the strategy -----------------------------------------------------------------------------------------------------


class Noted:
    """Gradients of every update before and after surgery, with the references and their batches."""

    def __init__(self, bench, name="gem"):
        self.steps, self.strategy = [], bench.learner.composition.members[name]
        asked = []
        surgery, reference = self.strategy.after_backward, self.strategy.reference

        def referred(step, batch, parameters):
            before = [p.grad.clone() for p in parameters]
            found = reference(step, batch, parameters)
            assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))
            pairs = zip(parameters, found, strict=True)
            asked.append((batch, joined([torch.zeros_like(p) if r is None else r for p, r in pairs])))
            return found

        def after_backward(step):
            asked.clear()
            moving = self.strategy.moving()
            before = joined([p.grad for p in moving])
            surgery(step)
            self.steps.append((before, joined([p.grad for p in moving]), list(asked)))

        self.strategy.reference, self.strategy.after_backward = referred, after_backward


def joined(parts):
    return torch.cat([part.detach().flatten() for part in parts]).double()


def of(bench):
    return bench.learner.composition.members["gem"]


def without_memory(bench):
    return {n: t for n, t in bench.learner.state_dict().items() if ".gem." not in n}


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_each_old_tasks_whole_memory_constrains_the_step(learner_of, gamma):
    keys = {"memory_strength": gamma, "eps": 1e-9, "buffer": {"policy": "ring", "size": 15}}
    bench = learner_of({"gem": keys}, **SGD)
    noted = Noted(bench)
    bench.learn(0)
    assert not any(asked for *_, asked in noted.steps)
    bench.learn(1)
    noted.steps.clear()
    held = of(bench).buffer.contents
    bench.learn(2, epochs=4)
    corrected = 0
    for before, after, asked in noted.steps:
        assert [set(batch.task_ids.tolist()) for batch, _ in asked] == [{0}, {1}]
        for task_id, (batch, _) in enumerate(asked):
            assert sorted(batch.example_ids.tolist()) == sorted(held.example_ids[held.task_ids == task_id].tolist())
            assert len(batch) == 5
        rows = torch.stack([row for _, row in asked])
        if bool((rows @ before >= 0).all()):
            assert torch.equal(before, after)
            continue
        corrected += 1
        bound = rows.norm(dim=1) * before.norm()
        assert bool((rows @ after >= -1e-5 * bound).all())
        expected = solved(rows.numpy(), before.numpy(), gamma, 1e-9)[1]
        torch.testing.assert_close(after, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    assert corrected


def test_with_one_old_task_and_no_bound_a_step_is_that_of_agem_on_the_whole_memory(learner_of):
    buffer = {"policy": "ring", "size": 15}
    one = learner_of({"gem": {"memory_strength": 0.0, "eps": 1e-9, "buffer": buffer}}, **SGD).learn(0)
    other = learner_of({"agem": {"batch_size": 15, "buffer": buffer}}, **SGD).learn(0)
    mine, theirs = Noted(one), Noted(other, "agem")
    for bench in (one, other):
        bench.learn(1, epochs=3)
    assert any(not torch.equal(before, after) for before, after, _ in mine.steps)
    for (before, after, _), (before_, after_, _) in zip(mine.steps, theirs.steps, strict=True):
        torch.testing.assert_close(before, before_, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after, after_, rtol=1e-3, atol=1e-4)


def test_only_the_products_of_gradients_go_to_the_host(learner_of, monkeypatch):
    bench = learner_of({"gem": {}}, **SGD).learn(0, 1)
    gone = []
    real = torch.Tensor.cpu
    surgery = of(bench).after_backward

    def after_backward(step):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "cpu", lambda t: gone.append((t.dtype, tuple(t.shape))) or real(t))
            for name in ("item", "__bool__", "__float__", "__int__"):
                patch.setattr(torch.Tensor, name, refuse(name))
            surgery(step)

    def refuse(name):
        def asked(*_):
            raise AssertionError(f"the host asked for a number: {name}")

        return asked

    of(bench).after_backward = after_backward
    bench.learn(2, epochs=1)
    assert gone == [(torch.float64, (3, 3))] * 2


def test_without_an_old_task_it_is_finetuning_bit_for_bit_and_later_it_is_not(learner_of):
    mine, plain = learner_of({"gem": {}}, **SGD).learn(0), learner_of({"finetune": {}}, **SGD).learn(0)
    assert not differing(without_memory(mine), plain.learner.state_dict())
    mine.learn(1)
    plain.learn(1)
    assert differing(without_memory(mine), plain.learner.state_dict())


@pytest.mark.parametrize(("setting", "keys", "sliced"), [
    ("class", {}, False), ("task", {}, True),
    ("task", {"head_slice": False}, False), ("class", {"head_slice": True}, True),
])  # fmt: skip
def test_a_tasks_loss_uses_its_own_slice_of_the_head_where_the_task_is_known(learner_of, setting, keys, sliced):
    bench = learner_of({"gem": keys}, stream={"setting": setting}, **SGD).learn(0)
    seen = []
    reference = of(bench).reference

    def referred(step, batch, parameters):
        found = reference(step, batch, parameters)
        live = {id(p): n for n, p in bench.learner.named_parameters()}
        seen.append({live[id(p)]: r for p, r in zip(parameters, found, strict=True)})
        return found

    of(bench).reference = referred
    bench.learn(1, epochs=1)
    assert seen
    for gradients in seen:
        assert gradients["head.blocks.tasks.0.weight"].any()
        assert bool(gradients["head.blocks.tasks.1.weight"].any()) is not sliced


def test_a_program_without_an_answer_leaves_the_step_and_says_so_once(learner_of, monkeypatch, caplog):
    monkeypatch.setattr("cl_platform.strategies.gem.dual", lambda *_: None)
    mine = learner_of({"gem": {}}, **SGD)
    with caplog.at_level(logging.WARNING, logger="cl_platform"):
        mine.learn(0, 1)
    plain = learner_of({"finetune": {}}, **SGD).learn(0, 1)
    assert not differing(without_memory(mine), plain.learner.state_dict())
    assert sum("quadratic program" in record.message for record in caplog.records) == 1


def test_a_dropped_task_constrains_nothing_any_more(learner_of):
    bench = learner_of({"gem": {}}, **SGD).learn(0, 1)
    of(bench).drop_task(0)
    bench.begin(2)
    assert of(bench)._past == [1]
    assert [set(batch.task_ids.tolist()) for batch in of(bench).memories()] == [{1}]


def test_keys_that_only_draws_have_are_refused():
    with pytest.raises(UserError, match="batch_size"):
        build_strategies({"gem": {"batch_size": 4}})
    with pytest.raises(UserError, match="eps"):
        build_strategies({"gem": {"eps": 0.0}})
