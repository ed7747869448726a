"""CLPU: a temporary task touches a side network and a partition of its own alone, so forgetting it leaves no byte.

A permanent task is learnt in the main network beside draws from the partitions of older permanent ones, each by itself,
over its own classes and against logits from its arrival; a promoted one is learnt from its partition alone.
"""

import pytest
import torch
from obeying import KEYS, PUBLISHED, obeying, own_logits
from tiny import copy_of, differing
from torch.nn import functional as F

from cl_platform.errors import UserError
from cl_platform.evaluation import count_correct
from cl_platform.memory.policies import reservoir_slots
from cl_platform.memory.uniforms import counter_uniforms
from cl_platform.random_streams import stream_seed
from cl_platform.strategies.base import Pass


@pytest.fixture
def clpu(learner_of, monkeypatch):
    return obeying(learner_of, monkeypatch)


# -- forgetting leaves the bytes of a learner that never saw the task -------------------------------------------------


@pytest.mark.parametrize(("network", "side_init"), [("vit", "main"), ("cnn", "main"), ("cnn", "scratch")])
def test_after_forgetting_every_byte_is_that_of_a_learner_that_never_saw_the_tasks(clpu, network, side_init):
    forgot = clpu(network, side_init=side_init).obey(PUBLISHED)
    never = clpu(network, side_init=side_init).obey("R0 T1 R3 R1")
    assert differing(forgot.whole(), never.whole()) == []
    assert forgot.strategy.permanent.tolist() == [0, 3, 1]
    assert forgot.learner.seen_classes() == [0, 1, 2, 3, 6, 7]
    images = forgot.images()
    assert torch.equal(forgot.logits(images), never.logits(images))


def test_what_is_learnt_after_forgetting_has_the_same_bytes_too(clpu):
    forgot = clpu("cnn").obey("T1 R0 F1 R2 T3")
    assert differing(forgot.whole(), clpu("cnn").obey("R0 R2 T3").whole()) == []


@pytest.mark.parametrize("sequence", ["R0 T2 R1 R3", "R0 R1 R3"])
def test_another_sequence_has_other_bytes(clpu, sequence):
    assert differing(clpu().obey(sequence).whole(), clpu().obey("R0 T1 R3 R1").whole())


def test_a_partition_that_notes_the_run_s_step_would_betray_the_forgotten_task(clpu, monkeypatch):
    def noted(text):
        bench = clpu()
        real = bench.strategy.after_batch

        def after_batch(step):
            step.step_in_task = step.global_step
            real(step)

        monkeypatch.setattr(bench.strategy, "after_batch", after_batch)
        return bench.obey(text)

    found = differing(noted("T1 R0 F1").whole(), noted("R0").whole())
    assert [name.rpartition(".")[2] for name in found] == ["steps"]


def test_a_drop_that_keeps_the_partition_is_seen(clpu, monkeypatch):
    forgot = clpu().obey("R0 T1")
    monkeypatch.setattr(forgot.strategy.partitions, "drop", lambda task_id: None)
    forgot.learner.drop_task(1)
    found = differing(forgot.whole(), clpu().obey("R0").whole())
    assert found
    assert all(".partitions.tasks.1." in name for name in found)


def test_nothing_of_a_temporary_task_stays_behind_in_the_learner(clpu):
    bench = clpu(pretrained=True).obey("R0 T1")
    assert any(".tasks.1." in name for name in bench.whole())
    bench.learner.drop_task(1)
    assert not any(".tasks.1." in name for name in bench.whole())
    assert all(1 not in part.tasks for part in bench.strategy.components())
    assert not any(key[2] == 1 for key in bench.learner.cache._kept)


# -- T: a side network of its own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["vit", "cnn"])
def test_a_temporary_task_changes_nothing_but_what_it_owns(clpu, network):
    bench = clpu(network).obey("R0 T1 R2")
    before = bench.whole()
    bench.obey("T3")
    assert all(".tasks.3." in name for name in differing(before, bench.whole()))


def test_a_temporary_task_trains_its_side_network_and_head_on_its_own_loss_alone(clpu):
    bench = clpu().obey("R0").told("T1")
    strategy = bench.strategy
    trained = {id(p) for p in bench.learner.parameters() if p.requires_grad}
    own = [*strategy.sides.tasks["1"].parameters(), *strategy.heads.parameters_of(1).values()]
    assert trained == {id(p) for p in own}
    step, terms = bench.step()
    assert set(terms) == {"clpu/ce"}
    logits = strategy._logits(1, strategy.sides.tasks["1"](step.batch.images))
    torch.testing.assert_close(terms["clpu/ce"], F.cross_entropy(logits, step.batch.labels - 2))
    assert len(step.passes) == 1


def test_a_side_network_starts_as_the_main_network_is_or_as_the_run_began(clpu):
    for side_init, same in (("main", True), ("scratch", False)):
        bench = clpu(side_init=side_init).obey("R0").told("T1")
        main, side = bench.strategy.main.state_dict(), bench.strategy.sides.tasks["1"].state_dict()
        assert (not differing(dict(main), dict(side))) == same
        assert (not differing(dict(bench.vit.state_dict()), dict(side))) != same


def test_evaluation_does_not_move_the_statistics_of_any_network(clpu):
    bench = clpu("cnn").obey("R0 T1").told("T2")
    before = bench.whole()
    count_correct(bench.learner, bench.stream.tasks[:2])
    assert differing(before, bench.whole()) == []


# -- R: the main network, beside draws from the partitions -------------------------------------------------------------


def draws_of(bench, monkeypatch):
    """Task id and rows of every draw from a partition."""
    drawn = []
    for task_id in bench.strategy.partitions.task_ids:
        partition = bench.strategy._held(task_id)

        def sample(count, generator, task_id=task_id, real=partition.sample):
            rows = real(count, generator)
            drawn.append((task_id, rows))
            return rows

        monkeypatch.setattr(partition, "sample", sample)
    return drawn


@pytest.mark.parametrize("network", ["vit", "cnn"])
def test_the_loss_is_the_published_one_with_one_draw_per_permanent_task_for_both_terms(clpu, network, monkeypatch):
    bench = clpu(network, alpha=0.3, beta=0.7).obey("R0 T1 R2").told("R3")
    strategy, drawn = bench.strategy, draws_of(bench, monkeypatch)
    statistics = copy_of(strategy.main.state_dict())
    bench.learner.training_step(next(iter(bench._loader(bench.learner.task))), 0)
    assert [(task_id, len(rows)) for task_id, rows in drawn] == [(0, 4), (2, 4)]  # 8 over two tasks; none of task 1
    terms = bench.learner.terms
    strategy.main.load_state_dict(statistics)
    mean_squares = labels = 0.0
    for task_id, rows in drawn:
        logits = strategy._logits(task_id, strategy.main(bench.learner.transforms.evaluate(rows.images)))
        mean_squares += 0.3 * (logits - rows.logits).square().mean() / 2
        labels += 0.7 * F.cross_entropy(logits, rows.labels - 2 * task_id) / 2
    torch.testing.assert_close(terms["clpu/logits"], mean_squares)
    torch.testing.assert_close(terms["clpu/labels"], labels)
    step = bench.learner._last_step
    own = strategy._logits(3, step.features)
    torch.testing.assert_close(terms["clpu/ce"], F.cross_entropy(own, step.batch.labels - 6))
    assert set(terms) == {"clpu/ce", "clpu/logits", "clpu/labels"}


def test_a_permanent_task_trains_the_main_network_and_the_heads_of_permanent_tasks(clpu):
    bench = clpu().obey("R0 T1").told("R2")
    strategy = bench.strategy
    heads = [p for t in (0, 2) for p in strategy.heads.parameters_of(t).values()]
    wanted = {id(p) for p in [*strategy.main.parameters(), *heads]}
    assert {id(p) for p in bench.learner.parameters() if p.requires_grad} == wanted
    assert not any(p.requires_grad for p in bench.learner.backbone.parameters())


@pytest.mark.parametrize("inner", ["er", "der", "derpp"])
def test_the_strategy_behind_it_says_which_terms_there_are(clpu, inner):
    bench = clpu(strategies={"clpu": KEYS, inner: {}}).obey("R0").told("R1")
    _, terms = bench.step()
    expected = {"er": {"labels"}, "der": {"logits"}, "derpp": {"logits", "labels"}}[inner]
    assert set(terms) == {"clpu/ce"} | {f"clpu/{term}" for term in expected}
    bench.learn(1).obey("T2 R2")


def test_a_partition_holds_every_epoch_s_offers_with_logits_of_the_task_s_classes_from_before_the_update(clpu):
    bench = clpu(per_task=500).told("T1")
    batch = next(iter(bench._loader(bench.learner.task)))
    strategy = bench.strategy
    logits = strategy._logits(1, strategy.sides.tasks["1"](bench.learner.transforms.evaluate(batch.images)))
    bench.learn(1, epochs=3)
    partition = strategy._held(1)
    assert len(partition) == 3 * 16
    assert partition.unique == 16
    rows = partition.read(torch.arange(8).numpy())
    assert torch.equal(rows.example_ids, batch.example_ids)
    torch.testing.assert_close(rows.logits, logits.detach(), rtol=1e-4, atol=1e-5)
    assert rows.logits.shape == (8, 2)


def test_a_refused_image_is_not_written_and_draws_are_the_task_s_own(clpu, monkeypatch):
    bench, offered = clpu(per_task=3).told("T1"), []
    partition = bench.strategy._held(1)
    real = partition.insert
    monkeypatch.setattr(partition, "insert", lambda *columns: offered.extend(columns[3].tolist()) or real(*columns))
    bench.learn(1, epochs=3)
    uniforms, _ = counter_uniforms(stream_seed(0, 1, "buffer.insert"), torch.arange(len(offered)).numpy())
    slots, expected = reservoir_slots(uniforms, 0, 3), [0, 0, 0]
    for slot, example_id in zip(slots.tolist(), offered, strict=True):
        if slot >= 0:
            expected[slot] = example_id
    assert len(offered) == 48
    assert partition.contents.example_ids.tolist() == expected
    assert slots[-1] < 0  # the released code would hold the last image


# -- promotion ------------------------------------------------------------------------------------------------------


def test_a_promoted_task_is_learnt_from_its_partition_beside_those_of_permanent_tasks(clpu, monkeypatch):
    bench = clpu().obey("R0 R2").obey("T1 T3", epochs=2)
    drawn, before = draws_of(bench, monkeypatch), bench.whole()
    updates = bench.learner.steps
    bench.learner.composition.promote(1)
    assert bench.learner.steps - updates == 2 * 2  # two epochs of two batches: as task 1 was learnt in
    assert [(task_id, len(rows)) for task_id, rows in drawn] == [(1, 8), (0, 4), (2, 4)] * 4
    changed = differing(before, bench.whole())
    assert any(".main." in name for name in changed)
    touched = {name for name in changed if ".main." not in name and ".permanent" not in name}
    assert all(".sides.tasks.1." in n or any(f".heads.tasks.{t}." in n for t in (0, 1, 2)) for n in touched)
    assert bench.strategy.permanent.tolist() == [0, 2, 1]
    assert bench.strategy.sides.task_ids == [3]
    assert not any(p.requires_grad for p in bench.strategy.main.parameters())


@pytest.mark.parametrize("network", ["vit", "cnn"])
def test_the_promotion_s_loss_weighs_the_task_fully_and_permanent_ones_by_their_number(clpu, network, monkeypatch):
    bench = clpu(network, alpha=0.3, beta=0.7).obey("R0 R2 T1")
    strategy, plans, drawn = bench.strategy, [], draws_of(bench, monkeypatch)
    monkeypatch.setattr(bench.learner.context, "run_finetuning", plans.append)
    bench.learner.composition.promote(1)
    (plan,) = plans
    first = strategy._first_head(1, [2, 3])
    assert torch.equal(strategy.heads.get(1, "weight"), first["weight"])  # nothing of the side network is left
    strategy.main.unfreeze()
    strategy.train()
    batch = plan.batch(0)
    loss = plan.loss(Pass(batch, strategy(batch), None))
    expected = 0.0
    for (task_id, rows), weight in zip(drawn, (1.0, 0.5, 0.5), strict=True):
        logits = strategy._logits(task_id, strategy.main(bench.learner.transforms.evaluate(rows.images)))
        expected += weight * 0.3 * (logits - rows.logits).square().mean()
        expected += weight * 0.7 * F.cross_entropy(logits, rows.labels - 2 * task_id)
    torch.testing.assert_close(loss, expected)
    assert [plan.momentum, plan.weight_decay, plan.rate(0)] == [0.0, 5e-4, 0.05]


def test_the_number_of_updates_can_be_set_and_none_leaves_the_first_weights(clpu):
    bench = clpu(promote_steps=5).obey("R0 T1")
    steps = bench.learner.steps
    bench.learner.composition.promote(1)
    assert bench.learner.steps == steps + 5
    idle = clpu(promote_steps=0).obey("R0 T1")
    main = copy_of(idle.strategy.main.state_dict())
    idle.learner.composition.promote(1)
    assert differing(main, dict(idle.strategy.main.state_dict())) == []


def test_promotion_lowers_the_loss_on_the_task(clpu):
    bench = clpu(promote_steps=0).obey("R0 T1", epochs=2)
    trained = clpu(promote_steps=20, per_task=64).obey("R0 T1", epochs=2)
    images, labels = bench.stream.task(1).train.images(slice(None)), bench.stream.task(1).train.labels
    values = []
    for one in (bench, trained):
        one.learner.composition.promote(1)
        values.append(float(F.cross_entropy(own_logits(one, 1, images), labels - 2)))
    assert values[1] < 0.8 * values[0]


def test_only_a_task_that_is_held_temporarily_is_promoted(clpu):
    bench = clpu().obey("R0")
    for task_id in (0, 1):
        with pytest.raises(UserError, match=f"clpu does not hold task {task_id} temporarily"):
            bench.learner.composition.promote(task_id)
