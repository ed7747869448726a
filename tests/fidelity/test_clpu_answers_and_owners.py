"""CLPU: which network answers, who shaped what, what a state restores, and how the strategy is written."""

import pytest
import torch
import yaml
from obeying import PUBLISHED, obeying, own_logits
from tiny import copy_of, differing
from torch.nn import functional as F

from cl_platform import efficiency
from cl_platform.cli.compose import compose, config_folder
from cl_platform.errors import UserError
from cl_platform.evaluation import count_correct
from cl_platform.run_config import parse as parse_config
from cl_platform.strategies import build_strategies
from cl_platform.unlearning.sequence import parse, refuse_unable


@pytest.fixture
def clpu(learner_of, monkeypatch):
    return obeying(learner_of, monkeypatch)


# -- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pretrained", [False, True])
def test_given_the_task_the_network_that_owns_it_answers(clpu, pretrained):
    bench = clpu(pretrained=pretrained).obey("R0 T1 R2 T3")
    seen, images = bench.learner.seen_classes(), bench.images()
    logits = bench.logits(images)
    for task_id in range(4):
        columns = [seen.index(c) for c in (2 * task_id, 2 * task_id + 1)]
        expected = own_logits(bench, task_id, images)
        margins = logits[:, columns[0]] - logits[:, columns[1]]
        torch.testing.assert_close(margins, expected[:, 0] - expected[:, 1], rtol=1e-3, atol=1e-4)


def test_without_a_pretrained_trunk_every_network_gives_its_probabilities_and_none_is_preferred(clpu):
    bench = clpu().obey("R0 T1 R2")
    shares = bench.logits().exp()
    torch.testing.assert_close(shares[:, [0, 1, 4, 5]].sum(1), torch.ones(len(shares)))
    torch.testing.assert_close(shares[:, [2, 3]].sum(1), torch.ones(len(shares)))
    assert bench.strategy.inspect()["router"].startswith("uniform")


def test_a_pretrained_trunk_sends_an_image_to_the_network_of_the_nearest_centroid(clpu):
    bench = clpu(pretrained=True).obey("R0 T1 R2")
    logits, strategy = bench.logits(), bench.strategy
    query = F.normalize(bench.batch().extra["query"].double(), dim=1)
    distances = torch.stack([torch.cdist(query, strategy.router.get(t, "centroids")).amin(1) for t in (0, 1, 2)], 1)
    side = distances.argmin(1) == 1
    assert bool(side.any()) and not bool(side.all())
    answers = logits.argmax(1)
    assert torch.equal((answers == 2) | (answers == 3), side)
    probabilities = logits.softmax(1)
    assert float(probabilities[side][:, [0, 1, 4, 5]].max()) == 0.0
    assert strategy.inspect()["router"] == "auto"


def test_both_prediction_spaces_come_from_one_answer(clpu):
    bench = clpu(pretrained=True).obey("R0 T1", epochs=4)
    counts = count_correct(bench.learner, bench.stream.tasks[:2])
    assert set(counts.correct) == {"cil", "til"}
    assert all(til >= cil for til, cil in zip(counts.correct["til"], counts.correct["cil"], strict=True))


# -- who shaped what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side_init", ["main", "scratch"])
def test_every_tensor_lists_the_tasks_that_could_have_shaped_it(clpu, side_init):
    bench = clpu(side_init=side_init, pretrained=True).obey("R0 T1 R2 T3 R3")
    owners = {part.name: part.tasks for part in bench.strategy.components()}
    copied = (0, 1) if side_init == "main" else (1,)
    assert owners["main"] == owners["heads.tasks.0"] == owners["heads.tasks.3"] == owners["permanent"] == (0, 2, 3)
    assert owners["sides.tasks.1"] == owners["heads.tasks.1"] == owners["partitions.tasks.1"] == copied
    assert owners["partitions.tasks.0"] == (0,)
    assert owners["partitions.tasks.2"] == (0, 2)  # logits by a network that knew task 0
    assert owners["partitions.tasks.3"] == ((0, 2, 3) if side_init == "main" else (3,))
    assert owners["router.tasks.1"] == (1,)
    assert "sides.tasks.3" not in owners
    assert "undeclared" not in efficiency.memory_bytes(bench.learner)["strategy_state_bytes"]


def test_a_main_network_that_learnt_nothing_lists_nobody(clpu):
    bench = clpu().obey("T1")
    assert {part.name: part.tasks for part in bench.strategy.components()}["main"] == ()
    assert bench.learner.composition.apart(1)


def test_a_permanent_task_that_is_dropped_stays_listed_by_the_network_it_was_learnt_in(clpu):
    bench = clpu().obey("R0 R1 T2")
    assert not bench.learner.composition.apart(0)
    bench.learner.drop_task(0)
    owners = {part.name: part.tasks for part in bench.strategy.components()}
    assert owners["main"] == (0, 1)
    assert not any(name.endswith("tasks.0") for name in owners)
    bench.obey("R3 T4")
    assert bench.learner.seen_classes() == list(range(2, 10))


# -- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "cut", "rest"), [("vit", "R0 T1 T2", "R1 F2 R3"), ("cnn", "R0 T1", "R1"), ("cnn", "T0 R1 F0", "R2")]
)
def test_a_restored_learner_goes_on_with_the_same_bytes(clpu, network, cut, rest):
    straight, restored = clpu(network).obey(cut), clpu(network)
    restored.learner.load_learnt_state(copy_of(straight.learner.learnt_state()))
    assert differing(straight.whole(), restored.whole()) == []
    restored.epochs = straight.epochs
    restored.trainer.fit_loop.load_state_dict(straight.trainer.fit_loop.state_dict())
    images = straight.images()
    assert torch.equal(straight.logits(images), restored.logits(images))
    for bench in (straight, restored):
        bench.carry_out(parse(f"{cut} {rest}").stages[len(cut.split()) :])
    assert differing(straight.whole(), restored.whole()) == []


def test_loading_an_earlier_state_takes_later_parts_away(clpu):
    bench = clpu().obey("R0")
    earlier = bench.whole()
    bench.obey("T1")
    bench.learner.load_state_dict(earlier)
    assert differing(earlier, bench.whole()) == []


# -- how it is written ----------------------------------------------------------------------------------------------


def test_without_a_sequence_tasks_are_learnt_as_the_configuration_says(clpu):
    assert clpu().learn(0, 1).strategy.permanent.tolist() == [0, 1]
    bench = clpu(instruction="T").learn(0, 1, 2)
    assert bench.strategy.sides.task_ids == [0, 1, 2]
    bench.learner.drop_task(1)
    assert differing(bench.whole(), clpu(instruction="T").learn(0, 2).whole()) == []


def test_clpu_derpp_is_another_name_for_the_list():
    one, other = compose(["strategy=clpu_derpp"]), compose(["strategy=[clpu,derpp]"])
    assert one["strategy"] == other["strategy"]
    assert list(one["strategy"]) == ["clpu", "derpp"]
    config = parse_config(one)
    assert config.optimizer.lr == 0.01
    assert config.strategy["clpu"]["per_task"] == 200
    changed = compose(["strategy=clpu_derpp", "strategy.clpu.alpha=0.2"])
    assert changed["strategy"]["clpu"]["alpha"] == 0.2
    with pytest.raises(UserError, match=r"clpu_derpp is another name for .*Did you mean strategy.clpu.alpha"):
        compose(["strategy=clpu_derpp", "strategy.clpu_derpp.alpha=0.2"])
    composition = build_strategies(config.strategy)
    assert [strategy.name for strategy in composition.strategies] == ["clpu"]
    assert composition.holds_temporarily


@pytest.mark.parametrize("inner", ["er", "der", "derpp"])
def test_the_recommended_keys_of_an_inner_strategy_are_accepted(inner):
    keys = yaml.safe_load((config_folder() / "strategy" / f"{inner}.yaml").read_text())
    build_strategies({"clpu": {}, inner: keys})


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ({"clpu": {}, "ewc": {}}, "behind clpu stands one of"),
        ({"clpu": {}, "derpp": {}, "bfp": {}}, "behind clpu stands one of"),
        ({"clpu": {}, "er_ace": {}}, "both own the classification"),
        ({"clpu": {}, "derpp": {"alpha": 0.2}}, "strategy.derpp.alpha=0.2: has no say inside clpu"),
        ({"clpu": {}, "der": {"buffer": {"size": 500}}}, "strategy.der.buffer.size=500: has no say inside clpu"),
    ],
)
def test_what_cannot_stand_behind_it_is_refused(strategies, message):
    with pytest.raises(UserError) as caught:
        build_strategies(strategies)
    assert message in str(caught.value)


def test_a_strategy_before_it_is_refused(learner_of):
    with pytest.raises(UserError, match="clpu stands alone"):
        learner_of({"derpp": {}, "clpu": {}})


def test_a_strategy_that_cannot_hold_a_task_temporarily_refuses_before_anything_runs():
    able = build_strategies({"clpu": {}, "derpp": {}})
    unable = build_strategies({"finetune": {}})
    for sequence in ("R0 R1", PUBLISHED):
        refuse_unable(parse(sequence), able)
    refuse_unable(parse("R0 R1"), unable)
    with pytest.raises(UserError, match="unlearning.sequence=T1: finetune cannot hold a task temporarily"):
        refuse_unable(parse(PUBLISHED), unable)
