import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy.stats import chi2

from cl_platform.config import typed
from cl_platform.errors import UserError
from cl_platform.memory.balanced import ClassBalanced
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.memory.build import BufferConfig, build_buffer
from cl_platform.memory.columns import bytes_per_slot, slots_for_bytes
from cl_platform.memory.herding import Herding
from cl_platform.memory.policies import Offers, Reservoir, Ring
from cl_platform.random_streams import stream
from cl_platform.registry import buffer_policies

SHAPE = (3, 4, 4)
STEP_POLICIES = [n for n in buffer_policies.names() if buffer_policies.get(n).when == "step"]


def pixels(ids):
    """The image of an example, a function of its id."""
    return torch.stack([torch.randint(0, 256, SHAPE, generator=stream(0, i, "test"), dtype=torch.uint8) for i in ids])


def a_buffer(policy="reservoir", size=12, num_columns=None, **keys):
    config = BufferConfig(policy=policy, size=size, **keys)
    return build_buffer(config, seed=1, image_shape=SHAPE, num_columns=num_columns, num_tasks=3)


def fill(buffer, first=0, stop=40, task_id=0, classes=2, logits=None):
    for start in range(first, stop, 8):
        ids = range(start, min(start + 8, stop))
        labels = [i % classes + classes * task_id for i in ids]
        given = None if logits is None else logits(ids)
        buffer.insert(pixels(ids), labels, [task_id] * len(ids), ids, start // 8, given)
    return buffer


def some_logits(ids, columns=5):
    return torch.stack([torch.randn(columns, generator=stream(1, i, "test")) for i in ids])


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return sorted(one) == sorted(other) and all(torch.equal(value, other[key]) for key, value in one.items())


# -- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"), [({}, 3094), ({"num_columns": 100}, 3496), ({"keyed": True}, 3102)], ids=str
)
def test_bytes_of_a_slot(keys, expected):
    assert bytes_per_slot((3, 32, 32), **keys) == expected
    assert slots_for_bytes(10 * expected + expected - 1, (3, 32, 32), **keys) == 10


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
@pytest.mark.parametrize("columns", [None, 5])
def test_columns_take_the_bytes_of_the_formula(policy, columns):
    buffer = a_buffer(policy, num_columns=columns)
    assert buffer.bytes == 0
    fill(buffer, stop=8, logits=some_logits if columns else None)
    assert buffer.bytes == 12 * bytes_per_slot(SHAPE, policy == "class_balanced", columns)
    saved = sum(t.numel() * t.element_size() for t in buffer.state_dict().values())
    assert saved - buffer.bytes < 200  # counters


def test_a_size_in_bytes_is_rounded_down_to_slots():
    assert a_buffer(bytes=799).capacity == 799 // 70
    assert a_buffer("class_balanced", bytes=799).capacity == 799 // 78
    with pytest.raises(UserError, match="buffer.bytes=60: one example takes 70 bytes"):
        a_buffer(bytes=60)


# -- filling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", STEP_POLICIES)
def test_rows_are_byte_equal_to_what_was_offered_and_never_more_than_the_slots(policy):
    buffer = a_buffer(policy)
    for task_id in range(3):
        fill(buffer, 40 * task_id, 40 * task_id + 40, task_id)
        assert 0 < len(buffer) <= buffer.capacity == 12
        rows = buffer.read(np.arange(len(buffer)))
        assert torch.equal(rows.images, pixels(rows.example_ids.tolist()))
        assert torch.equal(rows.labels, rows.example_ids % 2 + 2 * rows.task_ids)
        assert torch.equal(rows.task_ids, rows.example_ids // 40)
        assert torch.equal(buffer.steps[: len(buffer)], rows.example_ids // 8)
        contents = buffer.contents
        assert contents.labels.tolist() == rows.labels.tolist()
        assert contents.example_ids.tolist() == rows.example_ids.tolist()
        assert contents.task_ids.tolist() == rows.task_ids.tolist()
    assert buffer.unique == len(buffer)
    assert buffer.owners() <= buffer.offered() == {0, 1, 2}


def test_a_reservoir_holds_what_its_decisions_say_for_any_batches():
    one, other = a_buffer(), a_buffer()
    fill(one, stop=40)
    other.insert(pixels(range(33)), [i % 2 for i in range(33)], [0] * 33, range(33), 0)
    fill(other, 33, 40)
    assert torch.equal(one.images, other.images)
    assert one.contents.example_ids.tolist() == other.contents.example_ids.tolist()


def test_logits_are_stored_as_given_and_padded_to_the_width_of_the_buffer():
    buffer = a_buffer(size=30, num_columns=5)
    logits = some_logits(range(8), 3).requires_grad_()
    buffer.insert(pixels(range(8)), [0] * 8, [0] * 8, range(8), 0, logits)
    fill(buffer, 8, 16, logits=some_logits)
    rows = buffer.read(np.arange(16))
    assert torch.equal(rows.logits[:8, :3], logits)
    assert not rows.logits[:8, 3:].any()
    assert torch.equal(rows.logits[8:], some_logits(range(8, 16)))
    assert rows.num_columns.tolist() == [3] * 8 + [5] * 8
    assert not rows.logits.requires_grad
    with pytest.raises(ValueError, match="6 logits do not fit into 5 columns"):
        fill(buffer, 16, 17, logits=lambda ids: some_logits(ids, 6))
    with pytest.raises(ValueError, match="with every insertion or with none"):
        fill(buffer, 17, 25)


def test_only_the_accepted_rows_are_needed_to_carry_out_a_decision():
    one, other = fill(a_buffer()), fill(a_buffer())
    offers = Offers.of([3] * 20, [1] * 20, range(40, 60))
    decision = one.decide(offers)
    one.write(decision, offers, pixels(offers.example_ids[decision.sources].tolist()), 9)
    other.insert(pixels(range(40, 60)), [3] * 20, [1] * 20, range(40, 60), 9)
    assert same_state(one, other)


def test_whole_tasks_are_offered_with_features_to_a_policy_that_needs_them():
    buffer = ReplayBuffer(Herding(6))
    features = torch.randn(10, 4, generator=stream(0, 0, "test"))
    buffer.insert(pixels(range(10)), [0] * 5 + [1] * 5, [0] * 10, range(10), 0, features=features)
    buffer.insert(pixels(range(10, 15)), [2] * 5, [1] * 5, range(10, 15), 0, features=features[:5])
    rows = buffer.read(np.arange(len(buffer)))
    assert rows.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(rows.images, pixels(rows.example_ids.tolist()))


def test_what_cannot_be_stored_is_refused():
    buffer = a_buffer()
    with pytest.raises(ValueError, match="uint8"):
        buffer.insert(pixels(range(3)).float(), [0] * 3, [0] * 3, range(3), 0)
    with pytest.raises(ValueError, match="2 images for 3 labels"):
        buffer.insert(pixels(range(2)), [0] * 3, [0] * 3, range(3), 0)
    with pytest.raises(ValueError, match="one row per example"):
        buffer.insert(pixels(range(3)), [0] * 3, [0] * 2, range(3), 0)
    with pytest.raises(ValueError, match="task ids must be from 0 to 32767"):
        buffer.insert(pixels(range(1)), [0], [40000], [0], 0)
    with pytest.raises(ValueError, match="the copy that the host has"):
        buffer.insert(pixels(range(1)), torch.zeros(1, device="meta"), [0], [0], 0)
    with pytest.raises(ValueError, match="holds rows already"):
        fill(a_buffer()).allocate(SHAPE)


def test_an_empty_batch_changes_nothing():
    buffer = fill(a_buffer())
    state = {key: value.clone() for key, value in buffer.state_dict().items()}
    buffer.insert(pixels(range(1))[:0], [], [], [], 3)
    assert all(torch.equal(value, state[key]) for key, value in buffer.state_dict().items())


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", STEP_POLICIES)
@pytest.mark.parametrize("columns", [None, 5])
def test_a_state_dict_alone_restores_the_buffer_which_goes_on_alike(policy, columns):
    logits = some_logits if columns else None
    one, other = a_buffer(policy, num_columns=columns), a_buffer(policy, num_columns=columns)
    fill(one, logits=logits)
    other.load_state_dict(load(save(one.state_dict())))
    assert same_state(one, other)
    for buffer in (one, other):
        fill(buffer, 40, 80, 1, logits=logits)
    assert same_state(one, other)
    draws = [buffer.sample(5, stream(0, 1, "buffer.sample", 3)) for buffer in (one, other)]
    assert torch.equal(draws[0].images, draws[1].images)


def test_loading_an_empty_buffer_empties_a_full_one():
    full, empty = fill(a_buffer()), a_buffer()
    full.load_state_dict(empty.state_dict())
    assert len(full) == 0
    assert full.images is None
    assert same_state(fill(full), fill(empty))


def test_a_buffer_of_another_size_is_refused():
    with pytest.raises(UserError, match="buffer.size=20: the stored buffer has 12 slots"):
        a_buffer(size=20).load_state_dict(fill(a_buffer()).state_dict())


def test_keys_missing_from_a_state_are_named():
    state = fill(a_buffer()).state_dict()
    del state["policy.offers"]
    assert a_buffer().load_state_dict(state, strict=False).missing_keys == ["policy.offers"]


def test_another_number_format_of_the_model_leaves_the_columns_as_they_are():
    buffer = fill(a_buffer("class_balanced", num_columns=5), logits=some_logits)
    before = {key: value.clone() for key, value in buffer.state_dict().items()}
    torch.nn.ModuleList([buffer]).to(torch.bfloat16)
    assert all(torch.equal(value, before[key]) for key, value in buffer.state_dict().items())


def test_columns_are_made_where_the_module_was_moved_to():
    buffer = torch.nn.ModuleList([a_buffer("class_balanced", num_columns=5)]).to("meta")[0]
    fill(buffer, logits=some_logits)
    assert {column.device.type for column in buffer.buffers()} == {"meta"}
    here = fill(a_buffer("class_balanced", num_columns=5), logits=some_logits)  # no decision reads a column
    assert buffer.contents.example_ids.tolist() == here.contents.example_ids.tolist()
    assert buffer.sample(4, stream(0, 0, "buffer.sample")).images.shape == (4, *SHAPE)
    buffer.drop_task(0)
    assert len(buffer) == 0


# -- dropping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", STEP_POLICIES)
def test_dropping_a_task_removes_its_rows_and_wipes_its_pixels(policy):
    buffer = a_buffer(policy, size=30, num_columns=5)
    for task_id in range(3):
        fill(buffer, 40 * task_id, 40 * task_id + 40, task_id, logits=some_logits)
    others = [i for i in buffer.contents.example_ids.tolist() if i // 40 != 1]
    buffer.drop_task(1)
    assert buffer.contents.example_ids.tolist() == others
    assert buffer.owners() == buffer.offered() == {0, 2}
    rows = buffer.read(np.arange(len(buffer)))
    assert torch.equal(rows.images, pixels(others))
    assert torch.equal(rows.logits, some_logits(others))
    for name in ("images", "labels", "task_ids", "example_ids", "steps", "logits"):
        assert not getattr(buffer, name)[len(buffer) :].any()
    fill(buffer, 120, 160, 3, logits=some_logits) if policy != "ring" else None
    rows = buffer.read(np.arange(len(buffer)))
    assert torch.equal(rows.images, pixels(rows.example_ids.tolist()))


def test_with_shares_of_their_own_the_other_tasks_rows_are_as_if_the_dropped_one_never_was():
    for policy, keys in (("ring", {"per_task": 4}), ("class_balanced", {"fixed_classes": 6})):
        dropped, never = (a_buffer(policy, **keys) for _ in range(2))
        for task_id in range(3):
            fill(dropped, 40 * task_id, 40 * task_id + 40, task_id)
            if task_id != 1:
                fill(never, 40 * task_id, 40 * task_id + 40, task_id)
        dropped.drop_task(1)
        same = [sorted(b.contents.example_ids.tolist()) for b in (dropped, never)]
        assert same[0] == same[1]
        if policy == "ring":
            assert torch.equal(dropped.images, never.images)


# -- drawing ----------------------------------------------------------------------------------------------------------


def uneven():
    """Twelve rows: one of task 0, three of task 1, eight of task 2; a class per task."""
    buffer = ReplayBuffer(Ring(24, 8))
    for task_id, size in enumerate((1, 3, 8)):
        ids = range(10 * task_id, 10 * task_id + size)
        buffer.insert(pixels(ids), [task_id] * size, [task_id] * size, ids, 0)
    return buffer


@pytest.mark.parametrize("sampler", ["uniform", "task_weighted", "class_balanced"])
def test_a_draw_takes_no_row_twice_and_touches_no_global_generator(sampler):
    buffer, state = uneven(), torch.get_rng_state()
    before = {key: value.clone() for key, value in buffer.state_dict().items()}
    for step in range(20):
        rows = buffer.sample(7, stream(0, 2, "buffer.sample", step), sampler=sampler)
        assert len(set(rows.slots.tolist())) == 7
        assert torch.equal(rows.images, pixels(rows.example_ids.tolist()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in buffer.state_dict().items())
    everything = buffer.sample(99, stream(0, 2, "buffer.sample"), sampler=sampler)
    assert sorted(everything.slots.tolist()) == list(range(12))
    others = buffer.sample(99, stream(0, 2, "buffer.sample"), exclude_task=2, sampler=sampler)
    assert sorted(others.slots.tolist()) == list(range(4))
    assert buffer.sample(3, stream(0, 2, "buffer.sample"), exclude_task=2, sampler=sampler).task_ids.max() < 2


def test_nothing_is_drawn_from_an_empty_buffer():
    assert a_buffer().sample(4, stream(0, 0, "buffer.sample")) is None
    assert fill(a_buffer()).sample(4, stream(0, 0, "buffer.sample"), exclude_task=0) is None


def test_a_uniform_draw_takes_every_row_equally_often():
    buffer, repeats = uneven(), 2000
    counts = np.zeros(12)
    for step in range(repeats):
        counts[buffer.sample(3, stream(0, 2, "buffer.sample", step)).slots.numpy()] += 1
    expected = repeats / 4
    assert chi2.sf(((counts - expected) ** 2 / expected).sum() * 11 / 9, 11) > 1e-4


def test_a_task_weighted_draw_takes_every_task_equally_often():
    buffer, repeats = uneven(), 1500
    counts = np.zeros(3)
    for step in range(repeats):
        counts[int(buffer.sample(1, stream(0, 2, "buffer.sample", step), sampler="task_weighted").task_ids)] += 1
    assert chi2.sf(((counts - repeats / 3) ** 2 / (repeats / 3)).sum(), 2) > 1e-4


def test_a_class_balanced_draw_takes_as_many_rows_of_each_class_as_there_are():
    buffer, extra = uneven(), np.zeros(3)
    for step in range(600):
        rows = buffer.sample(6, stream(0, 2, "buffer.sample", step), sampler="class_balanced")
        counts = np.bincount(rows.labels.numpy(), minlength=3)
        assert counts[0] == 1
        assert sorted(counts[1:].tolist()) == [2, 3]
        extra += counts == 3
    assert 240 < extra[1] < 360  # who gets the sixth row is drawn


def test_a_draw_is_a_batch_of_replayed_rows():
    rows = fill(a_buffer(num_columns=5), logits=some_logits).sample(4, stream(0, 0, "buffer.sample"))
    batch = rows.batch()
    assert batch.is_replay.tolist() == [True] * 4
    assert torch.equal(batch.labels, rows.labels)
    assert torch.equal(batch.extra["logits"], some_logits(rows.example_ids.tolist()))


def test_an_unknown_sampler_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="Did you mean class_balanced"):
        fill(a_buffer()).sample(4, stream(0, 0, "buffer.sample"), sampler="class_balance")


# -- configuration ----------------------------------------------------------------------------------------------------


def test_each_policy_is_built_by_its_name():
    for name in STEP_POLICIES + ["herding"]:
        assert a_buffer(name).policy.name == name
    assert isinstance(a_buffer("class_balanced").policy, ClassBalanced)
    assert a_buffer("ring").policy.per_task == 4
    assert a_buffer("greedy", mode="first_k", fixed_classes=5).policy.quota == 2
    with pytest.raises(UserError, match=r"buffer.policy=reservoire: .*Did you mean reservoir"):
        typed(BufferConfig, {"policy": "reservoire"}, "buffer")
    with pytest.raises(UserError, match="buffer.per_task=null: is needed"):
        build_buffer(BufferConfig(policy="ring"), 0, SHAPE)


def test_a_buffer_of_one_task_draws_from_that_tasks_stream():
    buffers = [build_buffer(BufferConfig(size=5), 1, SHAPE, task_id=t) for t in (0, 1, 1)]
    seeds = [buffer.policy.seed for buffer in buffers]
    assert seeds[0] != seeds[1] == seeds[2]
    assert isinstance(buffers[0].policy, Reservoir)
