"""Batches of a task."""

import pytest
import torch

from cl_platform.errors import UserError
from cl_platform.scenarios import DataConfig, ScenarioConfig, TaskLoader, build_stream


@pytest.fixture(scope="module")
def train():
    return build_stream(ScenarioConfig(kind="split_digits", train_per_class=5), DataConfig(), 0).tasks[0].train


def _rows(loader):
    return [batch.extra["row"] for batch in loader]


def test_a_batch_says_what_it_holds(train):
    batch = next(iter(TaskLoader(train, 7, 4, seed=0)))
    rows = batch.extra["row"]
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images, train.images(rows))
    assert torch.equal(batch.labels, train.labels[rows])
    assert torch.equal(batch.example_ids, train.example_ids[rows])
    assert batch.task_ids.tolist() == [7] * 4
    assert not batch.is_replay.any()


def test_every_epoch_has_every_image_once_in_an_order_of_its_own(train):
    loader = TaskLoader(train, 0, 4, seed=0)
    first, second = torch.cat(_rows(loader)), torch.cat(_rows(loader))
    assert loader.epoch == 2
    assert len(loader) == 3
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    loader.epoch = 0
    assert torch.equal(torch.cat(_rows(loader)), first)


def test_the_epoch_counts_although_a_reader_stops_at_the_known_length(train):
    loader = TaskLoader(train, 0, 4, seed=0)
    reading = iter(loader)
    for _ in range(len(loader)):
        next(reading)
    assert loader.epoch == 1


def test_without_shuffling_the_order_is_the_sets_own(train):
    assert torch.cat(_rows(TaskLoader(train, 0, 4, seed=0, shuffle=False))).tolist() == list(range(10))


def test_drop_last_leaves_the_short_batch_out(train):
    assert [len(r) for r in _rows(TaskLoader(train, 0, 4, seed=0, drop_last=True))] == [4, 4]


@pytest.mark.parametrize("drop_last", [False, True])
def test_processes_share_an_epoch_in_equal_parts(train, drop_last):
    parts = [_rows(TaskLoader(train, 0, 2, 0, drop_last=drop_last, rank=r, world_size=3)) for r in range(3)]
    assert len({tuple(len(rows) for rows in part) for part in parts}) == 1
    seen = torch.cat([torch.cat(part) for part in parts])
    assert len(set(seen.tolist())) == (6 if drop_last else 10)


def test_a_batch_size_that_leaves_no_step_is_refused(train):
    with pytest.raises(UserError, match=r"trainer\.batch_size=16.*at most 10"):
        TaskLoader(train, 0, 16, seed=0, drop_last=True)


def test_a_task_without_images_is_refused(train):
    with pytest.raises(UserError, match="no images"):
        TaskLoader(train.select(torch.arange(0)), 0, 4, seed=0)
