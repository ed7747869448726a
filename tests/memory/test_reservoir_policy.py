import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from cl_platform.errors import UserError
from cl_platform.memory import policies
from cl_platform.memory.policies import BLOCK, Contents, Offers, Reservoir, last_writes, reservoir_slots
from cl_platform.memory.uniforms import counter_uniforms, philox

ORACLE = np.array([0.10, 0.90, 0.30, 0.05, 0.999, 0.55, 0.20])


def loop(uniforms, capacity):
    """Algorithm R as it is usually written: the buffer's item indices, slot by slot."""
    held = []
    for i, u in enumerate(uniforms):
        j = i if i < capacity else int(u * (i + 1))
        if j < capacity:
            held[j : j + 1] = [i]
    return held


def apply(held, first, slots):
    for slot, source in zip(*last_writes(slots), strict=True):
        held[slot] = first + source
    return held


def offers(count, task_id=0, label=0):
    return Offers.of([label] * count, [task_id] * count, list(range(count)))


NO_ROWS = Contents(*(np.empty(0, dtype=np.int64) for _ in range(3)))


# -- uniforms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert tuple(int(w[0]) for w in philox(key, tuple(np.array([c], dtype=np.uint64) for c in counter))) == words


def test_a_uniform_depends_on_its_counter_alone():
    index = np.array([5, 2**40, 0, 7])
    first, second = counter_uniforms(11, index)
    for k, i in enumerate(index):
        alone = counter_uniforms(11, [i])
        assert (first[k], second[k]) == (alone[0][0], alone[1][0])
    others = [counter_uniforms(12, index), counter_uniforms(11, index, 1), counter_uniforms(11, index, 0, 1)]
    assert all(not np.isin(first, other).any() for other, _ in others)
    assert not np.isin(first, second).any()


def test_uniforms_fill_the_unit_interval_evenly():
    for values in counter_uniforms(3, np.arange(20000)):
        assert values.min() >= 0.0
        assert values.max() < 1.0
        counts = np.histogram(values, bins=50, range=(0, 1))[0]
        assert chi2.sf(((counts - 400) ** 2 / 400).sum(), 49) > 1e-4


# -- decisions --------------------------------------------------------------------------------------------------------


def test_the_slots_of_known_uniforms():
    slots = reservoir_slots(ORACLE, 0, 3)
    assert slots.tolist() == [0, 1, 2, 0, -1, -1, 1]
    assert apply([None] * 3, 0, slots) == [3, 6, 2]


def test_every_subset_is_equally_likely():
    """All 60 equally likely sequences of slots for two slots and five offers, one uniform for each."""
    subsets, at = Counter(), [Counter(), Counter()]
    for draws in itertools.product(range(3), range(4), range(5)):
        uniforms = np.array([0.5, 0.5, *((j + 0.5) / (i + 3) for i, j in enumerate(draws))])
        held = apply([None] * 2, 0, reservoir_slots(uniforms, 0, 2))
        subsets[frozenset(held)] += 1
        for slot in range(2):
            at[slot][held[slot]] += 1
    assert set(subsets.values()) == {6}
    assert len(subsets) == 10
    assert at[0] == {0: 24, 2: 12, 3: 12, 4: 12}
    assert at[1] == {1: 24, 2: 12, 3: 12, 4: 12}


@settings(max_examples=60, deadline=None)
@given(
    uniforms=st.lists(st.floats(0, 1, exclude_max=True), max_size=60),
    capacity=st.integers(1, 12),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_vectorised_decisions_equal_the_loop_for_any_chunking(uniforms, capacity, cuts):
    bounds = sorted({0, len(uniforms), *(min(c, len(uniforms)) for c in cuts)})
    held = {}
    for first, stop in itertools.pairwise(bounds):
        slots = reservoir_slots(np.array(uniforms[first:stop]), first, capacity)
        written, sources = last_writes(slots)
        assert len(set(written.tolist())) == len(written) == len(sources)
        apply(held, first, slots)
    assert [held[slot] for slot in range(len(held))] == loop(uniforms, capacity)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), counts=st.lists(st.integers(0, 3000), min_size=1, max_size=6))
def test_a_policys_decisions_do_not_depend_on_the_size_of_its_batches(seed, counts):
    whole, parts = Reservoir(7, seed), Reservoir(7, seed)
    expected = whole.take(sum(counts))
    assert np.array_equal(np.concatenate([parts.take(count) for count in counts]), expected)
    assert np.array_equal(expected, reservoir_slots(counter_uniforms(seed, np.arange(sum(counts)))[0], 0, 7))


def test_the_largest_uniform_stays_below_its_bound():
    largest = 1.0 - 2.0**-53
    for first in (1, 2, 3, 10, 10**6 - 1, 2**40):
        assert reservoir_slots(np.array([largest]), first, first + 1)[0] in (first, -1)
        assert np.floor(largest * (first + 1)) == first


# -- law --------------------------------------------------------------------------------------------------------------


def test_ids_and_pairs_are_held_equally_often(monkeypatch):
    monkeypatch.setattr(policies, "BLOCK", 8)
    capacity, count, repeats = 2, 7, 3000
    ids, pairs = Counter(), Counter()
    for seed in range(repeats):
        held = apply([None] * capacity, 0, Reservoir(capacity, seed).take(count))
        ids.update(held)
        pairs[tuple(sorted(held))] += 1
    expected = repeats * capacity / count
    statistic = sum((ids[i] - expected) ** 2 / expected for i in range(count)) * (count - 1) / (count - capacity)
    assert chi2.sf(statistic, count - 1) > 1e-4  # each draw holds two of seven: the variance is 5/6 of a multinomial's
    expected = repeats / 21
    assert chi2.sf(sum((pairs[p] - expected) ** 2 / expected for p in itertools.combinations(range(7), 2)), 20) > 1e-4


def test_after_a_task_is_dropped_the_buffer_stays_uniform_over_the_others(monkeypatch):
    monkeypatch.setattr(policies, "BLOCK", 8)
    repeats, pairs = 2000, Counter()
    for seed in range(repeats):
        policy, held = Reservoir(2, seed), []
        for task_id, ids in enumerate([(0, 1, 2), (3, 4), (5, 6, 7)]):
            tasks = np.array([0 if i < 3 else 1 if i < 5 else 2 for i in held], dtype=np.int64)
            if task_id == 2:
                policy.drop_task(0, Contents(tasks, tasks, tasks))
                held = [i for i in held if i >= 3]
            decision = policy.decide(offers(len(ids), task_id), Contents(*[np.array(held, dtype=np.int64)] * 3))
            held += [None] * (2 - len(held))
            for slot, source in zip(decision.slots, decision.sources, strict=True):
                held[slot] = ids[source]
            held = [i for i in held if i is not None]
        assert policy.gaps == policy.ghosts == 0
        pairs[tuple(sorted(held))] += 1
    wanted = list(itertools.combinations(range(3, 8), 2))
    assert set(pairs) == set(wanted)
    assert chi2.sf(sum((pairs[p] - repeats / 10) ** 2 / (repeats / 10) for p in wanted), 9) > 1e-4


def test_a_task_dropped_before_the_buffer_was_full_leaves_only_room():
    policy = Reservoir(10, 1)
    policy.decide(offers(4, task_id=0), NO_ROWS)
    zeros = np.zeros(4, dtype=np.int64)
    policy.drop_task(0, Contents(zeros, zeros, zeros))
    decision = policy.decide(offers(10, task_id=1), NO_ROWS)
    assert decision.slots.tolist() == list(range(10))


# -- state ------------------------------------------------------------------------------------------------------------


def test_a_loaded_policy_goes_on_with_the_same_decisions():
    one, other = Reservoir(20, 5), Reservoir(20, 5)
    one.decide(offers(BLOCK - 10), NO_ROWS)
    other.load_state_dict(one.state_dict())
    again = other.decide(offers(500, task_id=1), NO_ROWS)
    expected = one.decide(offers(500, task_id=1), NO_ROWS)
    assert np.array_equal(again.slots, expected.slots)
    assert np.array_equal(again.sources, expected.sources)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert other.ledger.tasks == {0: BLOCK - 10, 1: 500}


def test_no_global_generator_is_drawn_from():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    Reservoir(20, 5).decide(offers(100), NO_ROWS)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()


def test_a_buffer_without_a_slot_is_refused():
    with pytest.raises(UserError, match="buffer.size=0"):
        Reservoir(0)
