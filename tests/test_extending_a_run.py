"""Tasks added behind a learnt stream: every strategy grows as if they had been there, or says that it cannot."""

import dataclasses

import pytest
import torch
from animal_folders import ANIMALS, animals
from tiny import answers, built, config_of, differing, images_of, learn, learnt

import cl_platform.strategies  # noqa: F401
from cl_platform import registry
from cl_platform.building import instructions_of, stream_of
from cl_platform.cli.compose import compose
from cl_platform.continuing import refuse_finished_work, with_extension
from cl_platform.errors import UserError
from cl_platform.memory import BufferConfig, build_buffer
from cl_platform.run_config import parse
from cl_platform.scenarios import DataConfig, Extension, ScenarioConfig, build_extended, build_stream
from cl_platform.scenarios.facts import facts_of, stream_from
from cl_platform.strategies.context import Context
from cl_platform.unlearning.forgotten import Record
from cl_platform.unlearning.rollback import way_back

CANNOT = {"joint": "trains once on all tasks together", "k_fpf": "divides its work by the length of the stream"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four classes, two further ones, and all six in one folder."""
    root = tmp_path_factory.mktemp("folders")
    for name, classes in (("first", ANIMALS[:4]), ("more", ANIMALS[4:6]), ("whole", ANIMALS[:6])):
        animals(root / name, classes)
    return root


@pytest.fixture(scope="module")
def data(folders):
    return DataConfig(cache_dir=str(folders / "cache"))


def of_folder(folder, tasks, **keys):
    return ScenarioConfig(kind="image_folder", path=str(folder), num_tasks=tasks, **keys)


@pytest.fixture(scope="module")
def streams(folders, data):
    """Two tasks, and these with a third one behind them."""
    first, more = of_folder(folders / "first", 2), of_folder(folders / "more", 1)
    return build_stream(first, data, 0), build_extended(first, data, 0, (Extension(more, data),))


# -- streams ----------------------------------------------------------------------------------------------------------


def test_added_tasks_are_what_they_would_be_in_one_folder_with_the_others(folders, data, streams):
    whole, extended = build_stream(of_folder(folders / "whole", 3), data, 0), streams[1]
    assert extended.class_names == whole.class_names
    for one, other in zip(extended.tasks, whole.tasks, strict=True):
        assert (one.task_id, one.position, one.classes) == (other.task_id, other.position, other.classes)
        for part in ("train", "test"):
            mine, theirs = getattr(one, part), getattr(other, part)
            assert torch.equal(mine.labels, theirs.labels)
            assert torch.equal(mine.example_ids, theirs.example_ids)
            assert torch.equal(mine.images(slice(None)), theirs.images(slice(None)))
            assert torch.equal(mine.select(torch.tensor([1])).images(slice(None)), mine.images(slice(1, 2)))


@pytest.mark.parametrize("gone", [(1,), (2,), (0, 1), (1, 2)], ids=str)
def test_nothing_is_numbered_anew_where_tasks_are_left_out(folders, data, streams, gone):
    added = (Extension(of_folder(folders / "more", 1), data), Extension(of_folder(folders / "whole", 3), data))
    left = build_extended(of_folder(folders / "first", 2), data, 0, added, gone)
    assert [task.task_id for task in left.tasks] == [t for t in range(6) if t not in gone]
    assert [task.position for task in left.tasks] == list(range(len(left.tasks)))
    assert left.left_out == gone
    assert left.num_classes == 12
    assert left.task(3).classes == (6, 7)
    assert left.task(3).train.example_ids[0] == 4 * 6  # behind the images of both folders before
    assert (left.planned, left.total, left.declared) == (2, 6, (4, 6, 12))
    ends = [left.tasks[position].task_id for position in left.ends]
    assert ends == [
        max(t for t in part if t not in gone) for part in ((0, 1), (2,), (3, 4, 5)) if set(part) - set(gone)
    ]


def test_domains_are_matched_by_the_names_of_their_classes(folders, data):
    turned = ScenarioConfig(kind="rotated_digits", num_tasks=2, setting="domain", train_per_class=2, test_per_class=1)
    again = dataclasses.replace(turned, class_order=tuple(range(9, -1, -1)), domains=(30.0, 60.0))
    stream = build_extended(turned, data, 0, (Extension(again, data),))
    assert stream.num_classes == 10
    assert sorted(stream.tasks[3].classes) == list(range(10))
    written = animals(folders / "written", tuple("0123456789"))
    (added,) = build_extended(turned, data, 0, (Extension(of_folder(written, 1, setting="domain"), data),)).tasks[2:]
    assert sorted(set(added.train.labels.tolist())) == list(range(10))
    with pytest.raises(UserError, match=r"scenario.num_tasks=2.*a new one would have 5 of the 10"):
        build_extended(turned, data, 0, (Extension(of_folder(written, 2, setting="domain"), data),))
    with pytest.raises(UserError, match="ant, bee, cat, dog are new to the run and 0, 1, 2, 3, 4 and 5 more are"):
        build_extended(turned, data, 0, (Extension(of_folder(folders / "first", 1, setting="domain"), data),))


def test_an_added_permutation_is_a_new_one(data):
    mixed = ScenarioConfig(kind="permuted_digits", num_tasks=2, setting="domain", train_per_class=1, test_per_class=1)
    added = build_extended(mixed, data, 0, (Extension(mixed, data),))
    at_once = build_stream(dataclasses.replace(mixed, num_tasks=4), data, 0)
    for one, other in zip(added.tasks, at_once.tasks, strict=True):
        assert torch.equal(one.train.images(slice(None)), other.train.images(slice(None)))


def test_added_images_come_in_the_size_of_the_first_ones(folders, data):
    digits = ScenarioConfig(kind="split_digits", num_tasks=5, train_per_class=1, test_per_class=1)
    large = animals(folders / "large", ANIMALS[:2], side=20)
    small = build_extended(digits, data, 0, (Extension(of_folder(large, 1), data),))
    assert small.tasks[5].train.images(slice(None)).shape[1:] == (3, 8, 8)
    grown = build_extended(of_folder(large, 1), data, 0, (Extension(digits, data),))
    assert grown.tasks[1].test.images(slice(None)).shape[1:] == (3, 20, 20)


def test_a_stream_with_hidden_bounds_takes_no_more_tasks(folders, data):
    hidden = of_folder(folders / "first", 2, boundaries="hidden")
    with pytest.raises(UserError, match="nothing can be added"):
        build_extended(hidden, data, 0, (Extension(of_folder(folders / "more", 1), data),))


def test_the_facts_of_a_stream_hold_how_it_was_divided(streams):
    read = stream_from(facts_of(streams[1]))
    assert (read.planned, read.total, read.declared, read.ends) == (2, 3, (4, 6), (1, 2))


def test_a_sequence_of_instructions_learns_added_tasks_for_good(folders):
    words = ["scenario=image_folder", f"scenario.path={folders / 'first'}", "scenario.num_tasks=2", "strategy=clpu",
             "unlearning.sequence='T1 R0'", f"data.cache_dir={folders / 'cache'}"]  # fmt: skip
    raw = compose(words)
    more = {**raw["scenario"], "path": str(folders / "more"), "num_tasks": 1}
    config = parse(with_extension(raw, {"scenario": more, "data": raw["data"]}))
    assert config.unlearning.sequence == "T1 R0 R2"
    stream = stream_of(config, Record(), instructions_of(config, Record()))
    assert [task.task_id for task in stream.tasks] == [1, 0, 2]
    assert stream.ends == (1, 2)


# -- strategies -------------------------------------------------------------------------------------------------------


KNOWN = {}  # grown learners that another test has made
SIZES = {"num_tasks", "total_tasks", "length", "ends", "num_classes", "declared"}


class Watched(Context):
    """Notes which of the stream's sizes a strategy asks for."""

    def __post_init__(self):
        super().__post_init__()
        self.asked = set()

    def __getattribute__(self, name):
        if name in SIZES and "asked" in vars(self):
            self.asked.add(name)
        return super().__getattribute__(name)


@pytest.fixture(autouse=True)
def _watched(monkeypatch):
    monkeypatch.setattr("cl_platform.learner.Context", Watched)
    connector = "lightning.pytorch.trainer.connectors.callback_connector"
    monkeypatch.setattr(f"{connector}._load_external_callbacks", lambda group: [])  # half the time of so small a fit


def grown(config, streams, short=False):
    """A learner of two tasks whose state goes on in one that is built for three, and learns the third.

    Args:
        config: of a strategy.
        streams: two tasks, and three.
        short: where the strategy asks nothing about the stream while it learns one task, no second one is learnt.
    """
    before, after = (built(config, stream) for stream in streams)
    phases, more = (learner.composition.arrange(s.tasks) for learner, s in zip((before, after), streams, strict=True))
    refuse_finished_work(after.composition.foresees, list(config.strategy), phases, more)
    learn(before, config, phases[:1])
    if before.context.asked or not short:
        learn(before, config, phases[1:])
    state = {name: tensor.clone() for name, tensor in before.learnt_state().items()}
    after.restore(state, before.learnt, before.backbone.frozen)
    after.further_updates = before.further_updates  # a run keeps count
    return learn(after, config, more[len(phases) :])


@pytest.mark.parametrize("name", registry.strategies.names())
def test_a_strategy_goes_on_with_added_tasks_as_if_they_had_been_there(name, streams):
    config = config_of(name)
    if name in CANNOT:
        with pytest.raises(UserError, match=rf"strategy={name}: {CANNOT[name]}"):
            grown(config, streams)
        return
    longer = KNOWN[name] = grown(config, streams, short=True)
    learnt_classes = [c for task_id in longer.learnt for c in streams[1].task(task_id).classes]
    assert longer.learnt[-1] == 2
    assert longer.seen_classes() == learnt_classes
    assert answers(longer, images_of(streams[0])).shape == (8, len(learnt_classes))
    if len(longer.learnt) == 3:  # else it cannot tell a longer stream from a shorter one
        assert not differing(longer.learnt_state(), learnt(config, streams[1]).learnt_state())


VARIANTS = [
    ("k_fpf", {"every": 2}), ("joint", {"mode": "continue"}), ("gdumb", {"fit": "end"}),
    ("slda", {"update": "streaming"}), ("der", {"columns": "all"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), VARIANTS, ids=[f"{n}-{k}" for n, k in VARIANTS])
def test_so_it_does_with_keys_that_divide_or_wait_for_an_end(name, keys, streams):
    config = config_of(name, strategy=keys)
    longer, at_once = grown(config, streams), learnt(config, streams[1])
    assert not differing(longer.learnt_state(), at_once.learnt_state())


def test_a_share_stays_what_it_was_and_every_added_task_gets_one(streams):
    learner, other = (KNOWN.get(name) or grown(config_of(name), streams) for name in ("coda_prompt", "gem"))
    bank = learner.composition.strategies[0].bank
    assert [prompt.shape[1] for prompt in bank.all("prompt")] == [6, 6, 6]  # 12 of two tasks, 6 more
    ring = other.composition.strategies[0].buffer
    assert ring.policy.per_task == 100
    assert ring.capacity == 300
    assert ring.owners() == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "keys", "word"),
    [
        ("coda_prompt", {"num_components": 32}, "all 3 tasks together may have at most 32 components"),
        ("er", {"buffer": {"size": 5}}, "the stream has 6 classes"),
        ("er", {"buffer": {"policy": "class_balanced", "fixed_classes": 4}}, "the stream has 6 classes"),
        ("der", {"buffer": {"bytes": 20_000}}, "bounds the bytes of an example"),
    ],
)
def test_what_has_no_room_for_more_is_refused_by_its_key(name, keys, word, streams):
    config = config_of(name, strategy=keys)
    built(config, streams[0])
    with pytest.raises(UserError, match=word) as refusal:
        built(config, streams[1])
    assert refusal.value.key.startswith(f"strategy.{name}.")


def test_a_stored_buffer_of_another_size_is_still_refused():
    held, other = (build_buffer(BufferConfig(size=size), 0, (3, 2, 2)) for size in (4, 6))
    held.insert(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [0], [0], [0], 0)
    with pytest.raises(UserError, match="has 4 slots"):
        other.load_state_dict(held.state_dict())


def test_forgetting_the_last_task_of_a_part_goes_back_before_the_task_that_ends_it_then(tmp_path):
    for position in range(5):
        (tmp_path / "checkpoints" / f"task_{position}").mkdir(parents=True)
    order = range(5)
    assert way_back(tmp_path, order, 5, [2], "end", ends=(2,)).base == 0  # the part ends at task 1 by now
    assert way_back(tmp_path, order, 5, [1], "end", ends=(2,)).base == 0
    assert way_back(tmp_path, order, 5, [2], "nothing", ends=(2,)).base == 1
