"""Which classes and rows a task gets."""

import numpy as np
import pytest
import torch

from cl_platform.errors import UserError
from cl_platform.scenarios.splits import RowPicker, class_chunks, class_order, hold_out, kept_tasks

HUNDRED = [f"class {i:03d}" for i in range(100)]


@pytest.mark.parametrize(
    ("order", "first"),
    [
        ("natural", [0, 1, 2, 3]),
        (0, [44, 19, 93, 90, 71, 69, 37, 95, 53, 91]),
        ("0", [44, 19, 93, 90, 71]),
        (1234, [75, 67, 30, 51, 48]),
        ("coda:0", [0, 1, 2, 3]),
        ("coda:1", [53, 37, 65, 51, 4]),
        ("pilot:1993", [68, 56, 78, 8, 23]),
    ],
)
def test_class_orders_start_as_the_code_bases_have_them(order, first):
    found = class_order(order, HUNDRED)
    assert list(found[: len(first)]) == first
    assert sorted(found) == list(range(100))


def test_a_class_order_leaves_the_global_generators_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    before = (torch.rand(1).item(), np.random.rand())
    torch.manual_seed(5)
    np.random.seed(5)
    class_order(3, HUNDRED)
    class_order("pilot:3", HUNDRED)
    assert (torch.rand(1).item(), np.random.rand()) == before


def test_a_file_may_name_classes_or_ids(tmp_path):
    file = tmp_path / "order.txt"
    file.write_text("# wanted order\nbee\n- 'ant'\n2\n")
    assert class_order(str(file), ["ant", "bee", "cat"]) == (1, 0, 2)


@pytest.mark.parametrize("order", [["bee", "ant", "cat"], [1, 0, 2], [1, "ant", 2], ["1", "0", "2"]])
def test_a_list_may_hold_names_or_ids(order):
    assert class_order(order, ["ant", "bee", "cat"]) == (1, 0, 2)


def test_a_text_that_is_a_class_name_means_the_class_and_a_number_means_an_id():
    assert class_order(["2", "1", "0"], ["2", "0", "1"]) == (0, 2, 1)
    assert class_order([2, 1, 0], ["2", "0", "1"]) == (2, 1, 0)


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (["bee", "and", "cat"], ["[bee,and,cat]", "and is no class", "Did you mean ant"]),
        (["bee", "xyzzy", "cat"], ["xyzzy is no class", "ant, bee, cat"]),
        (["bee", "bee", "ant"], ["cat is missing", "bee stands 2 times", "0..2"]),
        ([0, 1, 3], ["3 is no class id", "cat is missing"]),
    ],
)
def test_a_wrong_list_says_which_class_is_wrong(order, words):
    with pytest.raises(UserError, match=r"scenario\.class_order=\[") as refused:
        class_order(order, ["ant", "bee", "cat"])
    for word in words:
        assert word in str(refused.value)


def test_a_wrong_name_in_a_file_gets_the_nearest(tmp_path):
    file = tmp_path / "order.txt"
    file.write_text("bee\ncatt\nant\n")
    with pytest.raises(UserError, match=r"order\.txt: catt is no class.*Did you mean cat"):
        class_order(str(file), ["ant", "bee", "cat"])


def test_the_command_line_takes_a_list_of_names():
    from cl_platform.config import typed
    from cl_platform.scenarios import ScenarioConfig

    built = typed(ScenarioConfig, {"kind": "image_folder", "class_order": ["cat", "dog", 0]}, "scenario")
    assert built.class_order == ("cat", "dog", 0)


@pytest.mark.parametrize("order", ["random", [0, 0, 1], [0, 1], "coda:x"])
def test_other_class_orders_are_refused(order):
    with pytest.raises(UserError, match=r"scenario\.class_order"):
        class_order(order, ["a", "b", "c"])


def test_classes_that_do_not_divide_are_refused_with_the_divisors():
    with pytest.raises(UserError, match=r"scenario\.num_tasks=3: 10 classes.*Set scenario\.num_tasks=2; .*1, 2, 5, 10"):
        class_chunks(range(10), 3)
    with pytest.raises(UserError, match=r"Set scenario\.num_tasks=3; .*1, 3\."):  # one task would be no stream
        class_chunks(range(3), 2)


def test_skipped_tasks_keep_the_ids_of_the_others():
    assert kept_tasks(4, (1,)) == [0, 2, 3]
    with pytest.raises(UserError, match=r"scenario\.skip_tasks"):
        kept_tasks(4, (4,))
    with pytest.raises(UserError, match="at least one task"):
        kept_tasks(2, (0, 1))


@pytest.mark.parametrize("subset", ["first", "seeded"])
def test_subsets_have_the_wanted_number_of_each_class(subset):
    labels = np.array([0, 1, 2] * 10)
    picker = RowPicker(labels, 4, subset, seed=0, split="train")
    for label in range(3):
        rows = picker.of(label)
        assert len(rows) == 4
        assert (labels[rows] == label).all()
        assert (np.diff(rows) > 0).all()
    if subset == "first":
        assert picker.of(1).tolist() == [1, 4, 7, 10]


def test_seeded_subsets_differ_by_seed_and_by_split():
    labels = np.zeros(100, dtype=int)
    drawn = {RowPicker(labels, 5, "seeded", s, p).of(0).tobytes() for s in (0, 1) for p in ("train", "test")}
    assert len(drawn) == 4


def test_held_out_rows_and_training_rows_are_a_partition_of_each_class():
    labels = np.repeat([0, 1], [10, 7])
    train, held = hold_out(RowPicker(labels, None, "first", 0, "train"), (0, 1), 0.2, seed=0, key=0)
    assert sorted([*train, *held]) == list(range(17))
    assert np.bincount(labels[held]).tolist() == [2, 1]


def test_no_validation_share_holds_nothing_out():
    train, held = hold_out(RowPicker(np.array([0, 0, 1]), None, "first", 0, "train"), (0, 1), 0.0, seed=0, key=0)
    assert train.tolist() == [0, 1, 2]
    assert len(held) == 0


class _Tensors(torch.utils.data.Dataset):
    def __init__(self, classes, per_class):
        self.targets = (torch.arange(classes * per_class) % classes).tolist()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        return torch.full((1, 4, 4), row % 256, dtype=torch.uint8), self.targets[row]


@pytest.mark.parametrize(("seed", "num_tasks"), [(0, 5), (1234, 2), (None, 5)])
def test_class_splits_equal_avalanches(seed, num_tasks):
    from avalanche.benchmarks import nc_benchmark

    from cl_platform.scenarios import stream_from_datasets

    train, test = _Tensors(10, 4), _Tensors(10, 2)
    theirs = nc_benchmark(train, test, num_tasks, task_labels=False, seed=seed, shuffle=seed is not None)
    ours = stream_from_datasets(train, test, num_tasks, class_order="natural" if seed is None else seed)
    assert len(theirs.train_stream) == len(ours)
    for task, element, test_element in zip(ours.tasks, theirs.train_stream, theirs.test_stream, strict=True):
        assert set(task.classes) == set(element.classes_in_this_experience)
        assert task.train.labels.tolist() == sorted_by_row(element)
        assert task.test.labels.tolist() == sorted_by_row(test_element)


def sorted_by_row(element):
    pairs = sorted(
        (int(element.dataset[i][0].flatten()[0]), int(element.dataset[i][1])) for i in range(len(element.dataset))
    )
    return [label for _, label in pairs]


def test_an_avalanche_benchmark_becomes_the_same_stream():
    from avalanche.benchmarks import nc_benchmark

    from cl_platform.scenarios import stream_from_datasets
    from cl_platform.scenarios.avalanche import stream_from_avalanche

    train, test = _Tensors(6, 4), _Tensors(6, 2)
    noise = lambda image: image.float() - 100.0  # noqa: E731  a transform that must be left out
    theirs = nc_benchmark(train, test, 3, task_labels=False, seed=1, train_transform=noise, eval_transform=noise)
    converted = stream_from_avalanche(theirs)
    ours = stream_from_datasets(train, test, 3, class_order=1)
    assert converted.setting == "class"
    for a, b in zip(converted.tasks, ours.tasks, strict=True):
        assert set(a.classes) == set(b.classes)
        order = a.train.images(slice(None))[:, 0, 0, 0].argsort()
        assert torch.equal(a.train.images(order), b.train.images(slice(None)))
        assert torch.equal(a.train.labels[order], b.train.labels)
