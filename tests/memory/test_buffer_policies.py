import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from cl_platform.errors import UserError
from cl_platform.memory.balanced import ClassBalanced, Greedy, ReservoirBalanced
from cl_platform.memory.grouping import Ledger, occurrence, shares
from cl_platform.memory.herding import Herding, herding_order
from cl_platform.memory.policies import Contents, Offers, Reservoir, Ring
from cl_platform.memory.uniforms import counter_uniforms


class Rows:
    """What a buffer would hold, without pixels."""

    def __init__(self, policy):
        self.policy = policy
        self.columns = {name: np.empty(0, dtype=np.int64) for name in ("labels", "task_ids", "example_ids")}
        self.columns["keys"] = np.empty(0)

    @property
    def contents(self):
        return Contents(**self.columns)

    def offer(self, labels, ids=None, task_id=0, features=None):
        ids = range(1000 * task_id, 1000 * task_id + len(labels)) if ids is None else ids
        offers = Offers.of(labels, np.full(len(labels), task_id), list(ids), features)
        decision = self.policy.decide(offers, self.contents)
        slots = decision.slots
        assert len(set(slots.tolist())) == len(slots) == len(decision.sources)
        for name, column in self.columns.items():
            column = column if decision.keep is None else column[decision.keep]
            given = decision.keys if name == "keys" else getattr(offers, name)[decision.sources]
            if given is None:
                given = np.zeros(len(slots))
            grown = np.r_[column, np.zeros(max(0, slots.max(initial=-1) + 1 - len(column)), dtype=column.dtype)]
            assert set(range(len(column), len(grown))) <= set(slots.tolist())  # no gap
            grown[slots] = given
            self.columns[name] = grown
        assert len(self.contents) <= self.policy.capacity
        return decision

    def drop(self, task_id):
        contents = self.contents
        self.policy.drop_task(task_id, contents)
        self.columns = {name: column[contents.task_ids != task_id] for name, column in self.columns.items()}

    @property
    def ids(self):
        return set(self.contents.example_ids.tolist())

    def counts(self):
        return Counter(self.contents.labels.tolist())


POLICIES = {
    "reservoir": lambda: Reservoir(9, 3),
    "class_balanced": lambda: ClassBalanced(9, 3),
    "fixed": lambda: ClassBalanced(9, 3, fixed_classes=4),
    "reservoir_balanced": lambda: ReservoirBalanced(9, 3),
    "ring": lambda: Ring(9, 3),
    "greedy": lambda: Greedy(9, 3),
    "first_k": lambda: Greedy(9, 3, "first_k", fixed_classes=4),
    "herding": lambda: Herding(9),
}


def a_stream(seed=0, batches=6, size=13, classes=4):
    generator = np.random.default_rng(seed)
    for k in range(batches):
        yield generator.integers(0, classes, size), range(k * size, (k + 1) * size), generator.normal(size=(size, 5))


@pytest.mark.parametrize("name", POLICIES)
def test_a_loaded_policy_goes_on_with_the_same_decisions(name):
    one, other = Rows(POLICIES[name]()), Rows(POLICIES[name]())
    for k, (labels, ids, features) in enumerate(a_stream()):
        one.offer(labels, ids, task_id=k // 3, features=features)
        if k < 3:
            other.offer(labels, ids, task_id=k // 3, features=features)
        else:
            loaded = Rows(POLICIES[name]())
            loaded.policy.load_state_dict(other.policy.state_dict())
            loaded.columns = other.columns
            other = loaded
            other.offer(labels, ids, task_id=k // 3, features=features)
    assert all(np.array_equal(one.columns[c], other.columns[c]) for c in one.columns)
    state = other.policy.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in one.policy.state_dict().items())


@pytest.mark.parametrize("name", POLICIES)
def test_after_a_drop_a_policy_goes_on_without_gaps_and_within_its_capacity(name):
    rows = Rows(POLICIES[name]())
    for k, (labels, ids, features) in enumerate(a_stream(batches=9)):
        if k == 4:
            rows.drop(0)
            assert 0 not in rows.policy.ledger.tasks
            assert 0 not in rows.contents.task_ids
        rows.offer(labels, ids, task_id=k // 3, features=features)
    assert set(rows.contents.task_ids.tolist()) <= {1, 2}
    assert len(rows.contents) > 0


# -- counting and shares ----------------------------------------------------------------------------------------------


def test_places_of_known_counts():
    assert shares(np.array([10, 2, 7]), 9).tolist() == [4, 2, 3]


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(0, 12), max_size=7), total=st.integers(0, 40))
def test_shares_are_those_of_water_filling(counts, total):
    if sum(counts) <= total:
        expected = counts
    else:
        level = max(x for x in range(13) if sum(min(n, x) for n in counts) <= total)
        expected = [min(n, level) for n in counts]
        left = total - sum(expected)
        for k, n in enumerate(counts):
            if n > level and left:
                expected[k], left = expected[k] + 1, left - 1
    assert shares(np.array(counts, dtype=np.int64), total).tolist() == expected


@settings(max_examples=50, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=30), cut=st.integers(0, 30))
def test_a_ledger_counts_classes_and_tasks_in_order_of_first_appearance(pairs, cut):
    ledger, before = Ledger(), []
    for part in (pairs[:cut], pairs[cut:]):
        columns = np.array(part, dtype=np.int64).reshape(-1, 2)
        before += ledger.add(columns[:, 0], columns[:, 1]).tolist()
    assert before == [pairs[:k].count(pair) for k, pair in enumerate(pairs)]
    assert list(ledger.counts.items()) == list(Counter(pairs).items())
    assert ledger.total == len(pairs)


def test_occurrence_counts_earlier_members():
    assert occurrence(np.array([4, 7, 4, 4, 7])).tolist() == [0, 0, 1, 2, 1]


# -- class balanced ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    capacity=st.integers(1, 15),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_class_balanced_holds_the_largest_keys_of_each_class_for_any_chunking(labels, capacity, cuts):
    rows = Rows(ClassBalanced(capacity, 8))
    bounds = sorted({0, len(labels), *(min(c, len(labels)) for c in cuts)})
    for first, stop in itertools.pairwise(bounds):
        rows.offer(labels[first:stop], range(first, stop))
    keys, _ = counter_uniforms(8, occurrence(np.array(labels)), labels)
    classes = list(dict.fromkeys(labels))
    places = shares(np.array([labels.count(c) for c in classes]), capacity)
    expected = set()
    for c, quota in zip(classes, places, strict=True):
        members = [i for i, label in enumerate(labels) if label == c]
        expected |= set(sorted(members, key=lambda i: -keys[i])[:quota])
    assert rows.ids == expected
    saturated = [rows.counts()[c] for c in classes if labels.count(c) > rows.counts()[c]]
    assert not saturated or max(saturated) - min(saturated) <= 1


def test_quotas_of_classes_with_more_offers_than_places_never_rise():
    generator = np.random.default_rng(0)
    for _ in range(30):
        counts, before = np.zeros(5, dtype=np.int64), np.zeros(5, dtype=np.int64)
        appeared, saturated = [], np.zeros(5, dtype=bool)
        for label in generator.choice(5, 60, p=generator.dirichlet(np.ones(5))):
            if label not in appeared:
                appeared.append(label)
            counts[label] += 1
            now = np.zeros(5, dtype=np.int64)
            now[appeared] = shares(counts[appeared], 11)
            assert (now[saturated] <= before[saturated]).all()
            before, saturated = now, now < counts


def test_with_fixed_classes_a_class_does_not_see_the_others():
    alone, among = Rows(ClassBalanced(12, 2, fixed_classes=3)), Rows(ClassBalanced(12, 2, fixed_classes=3))
    alone.offer([1] * 40, range(40))
    among.offer([0] * 25, range(100, 125))
    among.offer([1] * 10 + [2] * 5 + [1] * 30, [*range(10), *range(200, 205), *range(10, 40)])
    assert {i for i in among.ids if i < 100} == alone.ids
    assert len(alone.ids) == 4
    with pytest.raises(UserError, match="buffer.fixed_classes=3"):
        among.offer([3], [300])


def test_every_example_of_a_class_is_held_equally_often_even_after_a_drop():
    repeats, held = 1500, Counter()
    for seed in range(repeats):
        rows = Rows(ClassBalanced(4, seed))
        rows.offer([0, 0, 0, 1, 1, 1], range(6), task_id=0)
        rows.offer([2] * 4, range(10, 14), task_id=1)  # one row is left to class 1
        rows.drop(1)
        rows.offer([1, 1, 1], range(6, 9), task_id=2)  # class 1 may hold two again
        held.update(rows.ids)
    ids = [held[i] for i in range(3, 9)]
    expected = np.mean(ids)
    assert expected > repeats / 6
    assert chi2.sf(sum((n - expected) ** 2 for n in ids) / expected, 5) > 1e-4


# -- reservoir balanced -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 90])
def test_reservoir_balanced_evicts_from_the_largest_class_and_accepts_as_a_reservoir(chunk):
    labels = np.random.default_rng(1).choice(3, 90, p=[0.8, 0.15, 0.05])
    rows = Rows(ReservoirBalanced(10, 4))
    for first in range(0, 90, chunk):
        rows.offer(labels[first : first + chunk], range(first, min(first + chunk, 90)))
    accept, evict = counter_uniforms(4, np.arange(90))
    held = []
    for i, label in enumerate(labels.tolist()):
        if int(accept[i] * (i + 1)) >= 10:
            continue
        if len(held) < 10:
            held.append((label, i))
            continue
        counts = Counter(c for c, _ in held)
        largest = sorted(c for c in counts if counts[c] == max(counts.values()))
        slots = [slot for c in largest for slot, (other, _) in enumerate(held) if other == c]
        held[slots[int(evict[i] * len(slots))]] = (label, i)
    assert rows.contents.example_ids.tolist() == [i for _, i in held]


# -- ring -------------------------------------------------------------------------------------------------------------


def test_a_batch_that_crosses_the_rings_end_leaves_its_last_examples():
    rows = Rows(Ring(4, 4))
    rows.offer([0] * 3, [100, 101, 102])
    rows.offer([0] * 6, range(6))
    assert rows.contents.example_ids.tolist() == [5, 2, 3, 4]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), max_size=8), per_task=st.integers(1, 4))
def test_a_ring_holds_exactly_the_last_offers_of_each_task(sizes, per_task):
    rows, offered = Rows(Ring(3 * per_task, per_task)), {0: [], 1: [], 2: []}
    for k, (task_id, size) in enumerate(sizes):
        ids = range(100 * k, 100 * k + size)
        rows.offer([task_id] * size, ids, task_id)
        offered[task_id] += ids
    for task_id, ids in offered.items():
        own = rows.contents.example_ids[rows.contents.task_ids == task_id]
        assert set(own.tolist()) == set(ids[-per_task:])
        for k, i in enumerate(ids[-per_task:], start=max(0, len(ids) - per_task)):
            assert own[k % per_task] == i


def test_a_task_beyond_the_last_ring_is_refused():
    rows = Rows(Ring(5, 2))
    rows.offer([0, 0, 0], task_id=0)
    rows.offer([1, 1, 1], task_id=1)
    with pytest.raises(UserError, match=r"buffer.per_task=2: the 5 slots hold rings of 2 for 2 tasks only"):
        rows.offer([2, 2], task_id=2)


# -- herding ----------------------------------------------------------------------------------------------------------

FIVE = np.array([(1, 0), (0.8, 0.6), (0.6, 0.8), (0, 1), (0.96, 0.28)])


def test_the_herding_order_of_five_known_features():
    order = herding_order(FIVE * np.array([[3.0], [1.0], [0.5], [2.0], [1.0]]), 5)  # lengths do not matter
    assert order.tolist() == [1, 2, 4, 3, 0]
    mean = FIVE.mean(axis=0)
    assert mean == pytest.approx([0.672, 0.536])
    distances = [np.linalg.norm(mean - FIVE[order[:k]].mean(axis=0)) for k in range(1, 6)]
    assert distances == pytest.approx([0.143108351, 0.166373075, 0.117151374, 0.157098695, 0.0], abs=1e-8)
    pair = FIVE[order[:2]].mean(axis=0)
    assert pair / np.linalg.norm(pair) == pytest.approx([0.707106781, 0.707106781])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_each_pick_brings_the_mean_closest_and_fewer_picks_are_a_prefix(seed, count):
    features = np.random.default_rng(seed).normal(size=(12, 4))
    order = herding_order(features, count)
    assert herding_order(features, 12)[:count].tolist() == order.tolist()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for k in range(count):
        picked = order[:k]
        distances = np.linalg.norm(unit.mean(0) - (unit + unit[picked].sum(0)) / (k + 1), axis=1)
        distances[picked] = np.inf
        assert distances[order[k]] == pytest.approx(distances.min(), abs=1e-12)


def test_equal_features_are_picked_in_the_order_of_their_ids():
    rows = Rows(Herding(4))
    rows.offer([0] * 4, [7, 3, 9, 5], features=np.ones((4, 37)))
    assert rows.contents.example_ids.tolist() == [3, 5, 7, 9]


def test_older_classes_are_cut_to_their_first_exemplars():
    features = np.random.default_rng(3).normal(size=(20, 6))
    rows = Rows(Herding(13))
    rows.offer([0] * 10, range(10), 0, features[:10])
    first = rows.contents.example_ids.tolist()
    assert len(first) == 10
    rows.offer([1] * 10, range(10, 20), 1, features[10:])
    assert rows.contents.example_ids.tolist()[:6] == first[:6]
    assert rows.contents.labels.tolist() == [0] * 6 + [1] * 6
    assert rows.contents.example_ids.tolist()[6:] == (10 + herding_order(features[10:], 6)).tolist()


def test_herding_refuses_more_classes_than_slots_and_missing_features():
    with pytest.raises(UserError, match=r"buffer.size=2: holds no exemplar for each of 3 classes"):
        Rows(Herding(2)).offer([0, 1, 2], features=np.eye(3))
    with pytest.raises(ValueError, match="feature vector"):
        Rows(Herding(5)).offer([0, 1, 2])


# -- greedy -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_greedy_stores_while_its_class_is_small_and_evicts_from_the_largest(chunk):
    labels = np.sort(np.random.default_rng(5).integers(0, 4, 60))
    rows = Rows(Greedy(10, 6))
    for first in range(0, 60, chunk):
        rows.offer(labels[first : first + chunk], range(first, min(first + chunk, 60)))
    _, evict = counter_uniforms(6, np.arange(60))
    held, seen = [], set()
    for i, label in enumerate(labels.tolist()):
        new, counts = label not in seen, Counter(c for c, _ in held)
        seen.add(label)
        if not new and counts[label] >= 10 // len(seen):
            continue
        if len(held) < 10:
            held.append((label, i))
            continue
        largest = sorted(c for c in counts if counts[c] == max(counts.values()))
        slots = [slot for c in largest for slot, (other, _) in enumerate(held) if other == c]
        held[slots[int(evict[i] * len(slots))]] = (label, i)
    assert rows.contents.example_ids.tolist() == [i for _, i in held]
    assert max(rows.counts().values()) - min(rows.counts().values()) <= 2


def test_first_k_takes_the_first_examples_of_each_class():
    rows = Rows(Greedy(7, 0, "first_k", fixed_classes=3))
    rows.offer([0, 1, 0, 0, 1, 2, 1, 2, 2])
    assert rows.contents.example_ids.tolist() == [0, 1, 2, 4, 5, 7]
    with pytest.raises(UserError, match="needed by the mode first_k"):
        Greedy(7, 0, "first_k")
