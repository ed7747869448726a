"""A stream with hidden bounds is one task for whoever learns; evaluation still knows the scenario's tasks."""

import dataclasses

import pytest
import torch
from tiny import config_of, digits

from cl_platform.errors import UserError
from cl_platform.scenarios import StreamLoader, TaskLoader, as_told, build_stream


def hidden(num_tasks=3, **changes):
    return dataclasses.replace(digits(num_tasks, **changes), hidden=True)


def batches(loader):
    return list(loader)


def test_the_configuration_hides_the_bounds_and_leaves_the_scenario_as_it_is():
    config = config_of("finetune")
    shown = build_stream(config.scenario, config.data, 0)
    covered = build_stream(dataclasses.replace(config.scenario, boundaries="hidden"), config.data, 0)
    assert (shown.hidden, covered.hidden) == (False, True)
    assert covered.digest == shown.digest
    assert [task.classes for task in covered.tasks] == [task.classes for task in shown.tasks]
    assert as_told(shown) is shown


def test_learners_are_told_of_one_task_that_declares_all_classes():
    stream = hidden()
    told = as_told(stream)
    (whole,) = told.tasks
    assert told.online
    assert whole.classes == (0, 1, 2, 3, 4, 5)
    assert (whole.task_id, whole.position) == (0, 0)
    rows = torch.arange(len(whole.train))
    images = torch.cat([task.train.images(torch.arange(len(task.train))) for task in stream.tasks])
    assert torch.equal(whole.train.images(rows), images)
    assert torch.equal(whole.train.labels, torch.cat([task.train.labels for task in stream.tasks]))
    (again,) = as_told(told).tasks
    assert again.classes == whole.classes
    assert torch.equal(again.train.labels, whole.train.labels)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("size", [5, 7, 16, 40])
def test_the_tasks_images_come_in_turn_each_in_its_own_loaders_order(size, passes):
    stream = hidden()
    whole = as_told(stream).tasks[0]
    loader = StreamLoader(stream.tasks, whole, size, 3, passes)
    found = batches(loader)
    assert len(found) == len(loader) == -(-len(whole.train) * passes // size)
    assert all(len(batch) == size for batch in found[:-1])  # no batch is cut short where a task ends
    expected = []
    for task in stream.tasks:
        own = TaskLoader(task.train, task.task_id, size, 3)
        expected += [task.train.example_ids[own.order(number)] for number in range(passes)]
    assert torch.equal(torch.cat([batch.example_ids for batch in found]), torch.cat(expected))
    assert {int(t) for batch in found for t in batch.task_ids} == {0}
    rows = torch.cat([batch.extra["row"] for batch in found])
    assert torch.equal(whole.train.labels[rows], torch.cat([batch.labels for batch in found]))
    assert torch.equal(whole.train.images(rows), torch.cat([batch.images for batch in found]))


def test_a_batch_holds_the_images_of_two_tasks_where_one_ends_inside_it():
    stream = hidden()
    found = batches(StreamLoader(stream.tasks, as_told(stream).tasks[0], 10, 0))
    assert [int((found[1].labels < 2).sum()), int((found[1].labels >= 2).sum())] == [6, 4]  # 16 images a task


@pytest.mark.parametrize(
    ("size", "passes", "drop_last", "ends"),
    [
        (8, 1, False, [2, 4, 6]),
        (10, 1, False, [2, 4, 5]),
        (10, 1, True, [2, 4, 4]),
        (40, 1, False, [1, 1, 2]),
        (8, 2, False, [4, 8, 12]),
    ],
)
def test_a_task_has_come_with_the_batch_of_its_last_image(size, passes, drop_last, ends):
    stream = hidden()
    loader = StreamLoader(stream.tasks, as_told(stream).tasks[0], size, 0, passes, drop_last)
    assert loader.ends() == ends
    labels = [batch.labels for batch in loader]
    assert len(labels) == ends[-1]
    for task, end in zip(stream.tasks[:-1], ends, strict=False):
        after = torch.cat([*labels[end:], labels[0][:0]])
        assert not set(after.tolist()) & set(task.classes)


def test_a_stream_shorter_than_a_batch_is_refused_where_short_batches_are_left_out():
    stream = hidden()
    with pytest.raises(UserError, match=r"trainer\.batch_size=100"):
        StreamLoader(stream.tasks, as_told(stream).tasks[0], 100, 0, drop_last=True)
