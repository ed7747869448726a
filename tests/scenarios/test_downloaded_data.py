"""Data in the form in which torchvision and Avalanche leave a download, made up on the spot."""

import struct

import numpy as np
import pytest
import torch

from cl_platform.errors import UserError
from cl_platform.scenarios import DataConfig, ScenarioConfig, build_stream


def _write_mnist(folder):
    folder.mkdir(parents=True)
    for prefix, count in (("train", 60), ("t10k", 20)):
        draw = np.random.RandomState(count)
        images = draw.randint(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())


@pytest.fixture
def data(tmp_path):
    _write_mnist(tmp_path / "downloads" / "MNIST" / "raw")
    _write_mnist(tmp_path / "downloads" / "avalanche" / "mnist" / "MNIST" / "raw")
    return DataConfig(root=str(tmp_path), cache_dir=str(tmp_path / "cache"), download=False)


@pytest.mark.parametrize("kind", ["split_mnist", "rotated_mnist", "permuted_mnist"])
def test_a_torchvision_download_is_read_without_network(kind, data):
    setting = "class" if kind == "split_mnist" else "domain"
    stream = build_stream(ScenarioConfig(kind=kind, setting=setting), data, 0)
    assert [len(t.train) for t in stream.tasks] == ([12] * 5 if setting == "class" else [60] * 5)
    assert stream.image_shape == (3, 28, 28)
    assert "torchvision" in stream.source


def test_the_classic_split_by_config_is_our_own_split(data):
    keys = {"num_tasks": 5, "class_order": 3, "validation_share": 0.2, "skip_tasks": (1,)}
    theirs = build_stream(ScenarioConfig(kind="avalanche", benchmark="SplitMNIST", **keys), data, 0)
    ours = build_stream(ScenarioConfig(kind="split_mnist", **keys), data, 0)
    assert [t.task_id for t in theirs.tasks] == [0, 2, 3, 4]
    for a, b in zip(theirs.tasks, ours.tasks, strict=True):
        assert set(a.classes) == set(b.classes)
        assert len(a.validation) == len(b.validation)
        first, second = (t.test.images(slice(None)).flatten(1).sum(1).sort().values for t in (a, b))
        assert torch.equal(first, second)


@pytest.mark.parametrize("benchmark", ["PermutedMNIST", "RotatedMNIST"])
def test_classic_domain_benchmarks_keep_their_own_change(benchmark, data):
    stream = build_stream(ScenarioConfig(kind="avalanche", benchmark=benchmark, num_tasks=2, setting="domain"), data, 0)
    assert [t.classes for t in stream.tasks] == [tuple(range(10))] * 2
    first, second = (t.train.images(slice(0, 10)) for t in stream.tasks)
    assert not torch.equal(first, second)
    if benchmark == "PermutedMNIST":
        assert torch.equal(first.flatten(1).sort(1).values, second.flatten(1).sort(1).values)
    with pytest.raises(UserError, match=r"scenario\.setting=domain"):
        build_stream(ScenarioConfig(kind="avalanche", benchmark=benchmark, num_tasks=2), data, 0)


def test_a_number_of_tasks_that_avalanche_refuses_is_one_line(data):
    with pytest.raises(UserError, match=r"scenario\.benchmark=SplitMNIST.*3 tasks"):
        build_stream(ScenarioConfig(kind="avalanche", benchmark="SplitMNIST", num_tasks=3), data, 0)
