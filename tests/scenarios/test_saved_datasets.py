"""Folders that the library datasets saved: the same stream as from class folders, row by row."""

import io

import pytest
from image_trees import write_tree
from PIL import Image

from cl_platform.errors import UserError
from cl_platform.scenarios import DataConfig, ScenarioConfig, build_stream, cache

datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "images", CLASSES)


def _stream(folder, data, **keys):
    return build_stream(ScenarioConfig(kind="image_folder", path=str(folder), num_tasks=2, **keys), data, 0)


def _split(tree, split, kind=None, broken=(), **more):
    """A split of the tree as a Dataset; ``kind`` is the labels' type, ``broken`` rows hold no image."""
    files = sorted((tree / split).glob("*/*.png"))
    kind = kind or datasets.ClassLabel(names=list(CLASSES))
    labels = [name.parent.name for name in files]
    if getattr(kind, "dtype", "") != "string":
        labels = [CLASSES.index(name) for name in labels]
    images = [{"bytes": b"broken" if row in broken else f.read_bytes(), "path": f.name} for row, f in enumerate(files)]
    features = {"image": datasets.Image(), "label": kind, **{name: feature for name, (feature, _) in more.items()}}
    values = {"image": images, "label": labels, **{name: [value] * len(files) for name, (_, value) in more.items()}}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def _both(tree, **keys):
    return datasets.DatasetDict({split: _split(tree, split, **keys) for split in ("train", "test")})


def _parquet(splits, folder, name="data/{}-00000-of-00001.parquet"):
    for split, dataset in splits.items():
        file = folder / name.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(str(file), batch_size=7)  # several row groups
    return folder


def test_saved_on_disk_or_as_parquet_the_images_make_the_stream_that_class_folders_make(tree, tmp_path, data):
    wanted = _stream(tree, data)
    splits = _both(tree)
    splits.save_to_disk(str(tmp_path / "arrow"))
    layouts = [tmp_path / "arrow", _parquet(splits, tmp_path / "hub")]
    layouts += [_parquet(splits, tmp_path / name, f"{name}.parquet") for name in ("{}", "default/{}/0000")]
    for folder in layouts:
        found = _stream(folder, data)
        assert (found.digest, found.class_names) == (wanted.digest, wanted.class_names), folder
    assert str(tmp_path / "arrow") in _stream(tmp_path / "arrow", data).source


def test_an_unchanged_saved_data_set_is_not_decoded_again(tree, tmp_path, data, monkeypatch):
    _both(tree).save_to_disk(str(tmp_path / "arrow"))
    first = _stream(tmp_path / "arrow", data)
    monkeypatch.setattr(cache, "_read", None)
    assert _stream(tmp_path / "arrow", data).digest == first.digest


def test_an_unreadable_row_is_named_or_left_out_and_counted(tree, tmp_path, data):
    splits = datasets.DatasetDict({"train": _split(tree, "train", broken=(3,)), "test": _split(tree, "test")})
    splits.save_to_disk(str(tmp_path / "arrow"))
    for folder, place in ((tmp_path / "arrow", "train#3"), (_parquet(splits, tmp_path / "hub"), r"parquet#3")):
        with pytest.raises(UserError, match=rf"{place}: the image cannot be read.*data\.skip_corrupt=true"):
            _stream(folder, data)
        skipping = _stream(folder, DataConfig(cache_dir=data.cache_dir, skip_corrupt=True))
        assert skipping.skipped == 1
        assert len(skipping.tasks[0].train) == 9


def test_labels_may_be_texts_or_plain_numbers(tree, tmp_path, data):
    wanted = _stream(tree, data)
    _both(tree, kind=datasets.Value("string")).save_to_disk(str(tmp_path / "texts"))
    _both(tree, kind=datasets.Value("int64")).save_to_disk(str(tmp_path / "numbers"))
    texts, numbers = _stream(tmp_path / "texts", data), _stream(tmp_path / "numbers", data)
    assert texts.digest == numbers.digest == wanted.digest
    assert texts.class_names == CLASSES
    assert numbers.class_names == ("0", "1", "2", "3")


def test_columns_that_cannot_be_told_are_asked_for(tree, tmp_path, data):
    more = {"group": (datasets.ClassLabel(names=["insect", "mammal"]), 0), "mask": (datasets.Image(), None)}
    splits = _both(tree, **more).rename_column("label", "species")
    splits.save_to_disk(str(tmp_path / "arrow"))
    with pytest.raises(UserError, match=r"scenario\.image_column=null.*image, mask.*scenario\.image_column=image"):
        _stream(tmp_path / "arrow", data)
    with pytest.raises(UserError, match=r"several columns could hold the labels: species, group"):
        _stream(tmp_path / "arrow", data, image_column="image")
    keys = {"image_column": "image", "label_column": "species"}
    assert _stream(tmp_path / "arrow", data, **keys).digest == _stream(tree, data).digest
    with pytest.raises(UserError, match=r"label_column=spices: unknown.*Did you mean species"):
        _stream(tmp_path / "arrow", data, **{**keys, "label_column": "spices"})
    with pytest.raises(UserError, match=r"image_column=species: holds ClassLabel.*no images"):
        _stream(tmp_path / "arrow", data, **{**keys, "image_column": "species"})


def test_a_single_split_is_divided_only_when_a_share_is_asked_for(tree, tmp_path, data):
    _split(tree, "train").save_to_disk(str(tmp_path / "one"))
    with pytest.raises(UserError, match=r"the split train and nothing to test on.*scenario\.test_share=0\.2"):
        _stream(tmp_path / "one", data)
    found = _stream(tmp_path / "one", data, test_share=0.2)
    assert [(len(task.train), len(task.test)) for task in found.tasks] == [(8, 2), (8, 2)]


def test_validation_serves_as_test_set_and_other_splits_are_named(tree, tmp_path, data):
    splits = {"train": _split(tree, "train"), "validation": _split(tree, "test"), "extra": _split(tree, "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "arrow"))
    found = _stream(tmp_path / "arrow", data)
    assert found.digest == _stream(tree, data).digest
    assert "split validation serves as test set, not used: extra" in found.source


def test_rows_without_a_label_and_damaged_files_are_refused_in_one_line(tree, tmp_path, data):
    hidden = _split(tree, "test").map(lambda row: {"label": -1}, load_from_cache_file=False)
    folder = _parquet({"train": _split(tree, "train"), "test": hidden}, tmp_path / "hub", "{}.parquet")
    with pytest.raises(UserError, match=r"test\.parquet#0: has the label -1, which no class has"):
        _stream(folder, data)
    (folder / "test.parquet").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"cannot be read.*Save the data set again"):
        _stream(folder, data)


def test_classes_without_images_are_left_out_and_grey_images_stay_grey(tmp_path, data):
    def grey(value):
        file = io.BytesIO()
        Image.new("L", (8, 8), value).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    kind = datasets.ClassLabel(names=["none", "dark", "light"])
    values = {"image": [grey(10), grey(200), grey(20), grey(210)], "label": [1, 2, 1, 2]}
    split = datasets.Dataset.from_dict(values, features=datasets.Features({"image": datasets.Image(), "label": kind}))
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "arrow"))
    stream = _stream(tmp_path / "arrow", data)
    assert stream.class_names == ("dark", "light")
    assert stream.tasks[0].train.source.shape[1:] == (1, 8, 8)
