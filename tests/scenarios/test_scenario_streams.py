"""Streams of the built-in scenarios that need no download, and of small folders."""

import numpy as np
import pytest
import torch
from image_trees import write_tree

from cl_platform.config import typed
from cl_platform.errors import UserError
from cl_platform.registry import scenarios
from cl_platform.scenarios import DataConfig, ScenarioConfig, build_stream, stream_from_datasets


def _digits(seed=0, kind="split_digits", **keys):
    return build_stream(typed(ScenarioConfig, {"kind": kind, **keys}, "scenario"), DataConfig(), seed)


@pytest.fixture
def data(tmp_path):
    return DataConfig(root=str(tmp_path / "root"), cache_dir=str(tmp_path / "cache"), download=False)


def _folder(path, data, **keys):
    return build_stream(ScenarioConfig(kind="image_folder", path=str(path), num_tasks=2, **keys), data, 0)


def test_digits_are_five_tasks_of_two_classes_with_all_images():
    stream = _digits()
    assert [t.classes for t in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert sum(len(t.train) + len(t.test) for t in stream.tasks) == 1797
    assert stream.image_shape == (3, 8, 8)
    assert stream.num_classes == 10
    images = stream.tasks[0].train.images(torch.tensor([3, 0]))
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert images.max() == 255
    assert torch.equal(images[:, 0], images[:, 2])


def test_the_digits_test_set_does_not_depend_on_the_seed():
    assert _digits(seed=0).digest == _digits(seed=1).digest


def test_the_digest_changes_with_the_split():
    kept = {
        _digits().digest,
        _digits(class_order=1).digest,
        _digits(train_per_class=5).digest,
        _digits(skip_tasks=[1]).digest,
    }
    assert len(kept) == 4


def test_a_smaller_training_set_is_a_prefix_of_a_larger_one():
    few, more = _digits(train_per_class=3), _digits(train_per_class=6)
    for a, b in zip(few.tasks, more.tasks, strict=True):
        assert set(a.train.example_ids.tolist()) < set(b.train.example_ids.tolist())


def test_skipping_a_task_changes_nothing_about_the_others():
    whole = _digits(validation_share=0.1, class_order=3)
    rest = _digits(validation_share=0.1, class_order=3, skip_tasks=[1])
    assert [t.task_id for t in rest.tasks] == [0, 2, 3, 4]
    assert [t.position for t in rest.tasks] == [0, 1, 2, 3]
    assert rest.num_classes == 10
    for task in rest.tasks:
        same = whole.task(task.task_id)
        assert task.classes == same.classes
        for part in ("train", "validation", "test"):
            assert torch.equal(getattr(task, part).example_ids, getattr(same, part).example_ids)


def test_in_the_domain_setting_labels_are_places_within_the_task():
    stream = _digits(setting="domain")
    assert stream.num_classes == 2
    assert all(set(t.train.labels.tolist()) == {0, 1} and t.classes == (0, 1) for t in stream.tasks)


@pytest.mark.parametrize("kind", ["rotated_digits", "permuted_digits"])
def test_domain_scenarios_hold_all_classes_and_keep_the_first_task_as_it_is(kind):
    stream, plain = _digits(kind=kind, setting="domain"), _digits(num_tasks=1)
    for task in stream.tasks:
        assert set(task.train.labels.tolist()) == set(range(10))
    rows = torch.arange(20)
    assert torch.equal(stream.tasks[0].train.images(rows), plain.tasks[0].train.images(rows))
    assert not torch.equal(stream.tasks[1].train.images(rows), plain.tasks[0].train.images(rows))


@pytest.mark.parametrize("kind", ["rotated_digits", "permuted_digits"])
def test_a_domains_change_does_not_depend_on_the_batch(kind):
    train = _digits(kind=kind, setting="domain").tasks[2].train
    together = train.images(slice(0, 40))
    alone = torch.cat([train.images(torch.tensor([row])) for row in range(40)])
    assert torch.equal(together, alone)


def test_a_permutation_only_moves_pixels_and_depends_on_the_seed():
    first, second = (_digits(seed=s, kind="permuted_digits", setting="domain").tasks[1].train for s in (0, 1))
    plain = _digits(num_tasks=1).tasks[0].train
    rows = torch.arange(5)
    assert torch.equal(first.images(rows).flatten(1).sort(1).values, plain.images(rows).flatten(1).sort(1).values)
    assert not torch.equal(first.images(rows), second.images(rows))


def test_a_quarter_turn_is_exact():
    turned = _digits(kind="rotated_digits", setting="domain", num_tasks=2, domains=[0.0, 90.0])
    rows = torch.arange(10)
    plain = turned.tasks[0].train.images(rows)
    assert torch.equal(turned.tasks[1].train.images(rows), plain.rot90(1, (2, 3)))


def test_an_image_held_out_in_one_domain_is_trained_on_in_none():
    stream = _digits(kind="rotated_digits", setting="domain", validation_share=0.2)
    held = {i for t in stream.tasks for i in t.validation.example_ids.tolist()}
    trained = {i for t in stream.tasks for i in t.train.example_ids.tolist()}
    assert held
    assert not held & trained


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_tasks": 3}, r"scenario\.num_tasks=3.*1, 2, 5, 10"),
        ({"kind": "split_digit"}, "split_digits"),
        ({"kind": "rotated_digits"}, r"scenario\.setting=class"),
        ({"kind": "rotated_digits", "setting": "domain", "domains": [0.0]}, r"scenario\.domains"),
        ({"augment_scale": [0.5]}, r"scenario\.augment_scale"),
        ({"boundaries": "visible"}, r"scenario\.boundaries=visible.*shown"),
        ({"traim_per_class": 3}, "train_per_class"),
        ({"kind": "image_folder"}, r"scenario\.path"),
        ({"kind": "avalanche", "benchmark": "SplitMNST"}, "SplitMNIST"),
    ],
)
def test_bad_keys_are_refused_by_name(keys, message):
    with pytest.raises(UserError, match=message):
        _digits(**keys)


@pytest.mark.parametrize("dataset", ["mnist", "fmnist", "cifar10", "cifar100", "tiny_imagenet", "imagenet_r", "cub200"])
def test_missing_data_names_the_folder_and_the_embedded_alternative(dataset, data):
    with pytest.raises(UserError, match=rf"{dataset}.*scenario=split_digits") as caught:
        build_stream(ScenarioConfig(kind=f"split_{dataset}"), data, 0)
    for words in (f"{data.root}/{dataset}", "data.root=FOLDER", "$CL_DATA_ROOT"):
        assert words in str(caught.value)


def test_a_folder_whose_classes_do_not_divide_is_refused_before_its_images_are_read(tmp_path, data, monkeypatch):
    from cl_platform.scenarios import sources

    monkeypatch.setattr(sources, "decoded", None)  # reading would fail otherwise
    tree = write_tree(tmp_path / "images")
    with pytest.raises(UserError, match=r"scenario\.num_tasks=5: 4 classes.*Set scenario\.num_tasks=4; .*1, 2, 4"):
        build_stream(ScenarioConfig(kind="image_folder", path=str(tree)), data, 0)
    with pytest.raises(UserError, match=r"kat is no class.*Did you mean cat"):
        _folder(tree, data, class_order=("kat", "dog", "ant", "bee"))


def test_a_folders_classes_are_ordered_by_name(tmp_path, data):
    stream = _folder(write_tree(tmp_path / "images"), data, class_order=("cat", "dog", "ant", "bee"))
    assert [task.classes for task in stream.tasks] == [(2, 3), (0, 1)]


def test_an_unreachable_server_is_one_line_within_seconds(data, monkeypatch):
    from cl_platform.scenarios import downloads

    monkeypatch.setitem(downloads._FETCHERS, "mnist", (*downloads._FETCHERS["mnist"][:2], "http://127.0.0.1:9/x"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    online = DataConfig(root=data.root, cache_dir=data.cache_dir)
    with pytest.raises(UserError, match=r"cannot be reached.*scenario=split_digits"):
        build_stream(ScenarioConfig(kind="split_mnist"), online, 0)


def test_a_folder_is_read_in_bytewise_order(tmp_path, data):
    stream = _folder(write_tree(tmp_path / "a", classes=("b", "a", "B", "ü")), data)
    assert stream.class_names == ("B", "a", "b", "ü")
    assert [len(t.train) for t in stream.tasks] == [10, 10]
    assert stream.image_shape == (3, 8, 8)


def test_a_named_data_set_in_folder_form_wins_over_a_download(tmp_path, data):
    write_tree(tmp_path / "root" / "cifar10", classes=tuple("abcdefghij"), train=2, test=1)
    stream = build_stream(ScenarioConfig(kind="split_cifar10"), data, 0)
    assert sum(len(t.train) for t in stream.tasks) == 20
    assert "cifar10" in stream.source


def test_core50_folders_give_a_task_per_session_and_one_test_set(tmp_path, data):
    for session in ("s1", "s2"):
        write_tree(tmp_path / "tree" / session, classes=("o1", "o2"))
        for split in ("train", "test"):
            target = tmp_path / "root" / "core50" / split
            target.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / session / split).rename(target / session)
    stream = build_stream(ScenarioConfig(kind="core50", num_tasks=2, setting="domain"), data, 0)
    assert [len(t.train) for t in stream.tasks] == [10, 10]
    assert all(len(t.test) == 12 for t in stream.tasks)
    with pytest.raises(UserError, match=r"scenario\.num_tasks=8.*num_tasks=2"):
        build_stream(ScenarioConfig(kind="core50", num_tasks=8, setting="domain"), data, 0)


def test_imagenet_r_without_a_split_gets_a_fixed_stratified_one(tmp_path, data):
    write_tree(tmp_path / "tree", classes=("n1", "n2"), train=10, test=1)
    (tmp_path / "root").mkdir()
    (tmp_path / "tree" / "train").rename(tmp_path / "root" / "imagenet_r")
    config = ScenarioConfig(kind="split_imagenet_r", num_tasks=2)
    first, second = build_stream(config, data, 0), build_stream(config, data, 1)
    assert [(len(t.train), len(t.test)) for t in first.tasks] == [(8, 2), (8, 2)]
    assert first.digest == second.digest
    assert "split: own" in first.source
    listed = tmp_path / "test.txt"
    listed.write_text("- 'x/n1/img_000.png'\n- 'x/n2/img_003.png'\n")
    named = build_stream(ScenarioConfig(kind="split_imagenet_r", num_tasks=2, split_file=str(listed)), data, 0)
    assert [(len(t.train), len(t.test)) for t in named.tasks] == [(9, 1), (9, 1)]


def test_two_torch_data_sets_of_images_or_tensors(tmp_path):
    from PIL import Image

    pictures = [(Image.fromarray(np.full((6, 6, 3), i, dtype=np.uint8)), i % 4) for i in range(8)]
    tensors = [(torch.full((3, 6, 6), i / 255.0), i % 4) for i in range(8)]
    a, b = (stream_from_datasets(d, d, 2) for d in (pictures, tensors))
    assert a.digest == b.digest
    with pytest.raises(UserError, match=r"within 0\.\.1"):
        stream_from_datasets([(torch.randn(3, 6, 6) * 5, 0)], tensors, 1)


def test_every_scenario_has_its_yaml_and_every_yaml_builds_a_config():
    from pathlib import Path

    import yaml

    folder = Path(__file__).parents[2] / "conf" / "scenario"
    files = {f.stem: f for f in folder.glob("*.yaml")}
    assert set(files) == set(scenarios.names())
    for name, file in files.items():
        config = typed(ScenarioConfig, yaml.safe_load(file.read_text()), "scenario")
        assert config.kind == name


@pytest.mark.parametrize("kind", ["split_digits", "rotated_digits", "permuted_digits"])
def test_the_yamls_of_embedded_data_build(kind):
    from pathlib import Path

    import yaml

    text = (Path(__file__).parents[2] / "conf" / "scenario" / f"{kind}.yaml").read_text()
    assert len(build_stream(typed(ScenarioConfig, yaml.safe_load(text), "scenario"), DataConfig(), 0)) == 5
