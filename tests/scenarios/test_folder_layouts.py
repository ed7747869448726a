"""Image folders without a test folder, and with metadata files in place of class folders."""

import csv
import json
import shutil
import sys

import pytest
from image_trees import write_tree

from cl_platform.errors import UserError
from cl_platform.scenarios import DataConfig, ScenarioConfig, build_stream


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "images")


def _stream(tree, data, **keys):
    return build_stream(ScenarioConfig(kind="image_folder", path=str(tree), num_tasks=2, **keys), data, 0)


def _with_metadata(tree, write, split_files=True):
    """The same images as ``<split>/<class>_<file>``, and what ``write(folder, rows)`` puts beside them."""
    flat = tree.with_name("flat")
    rows = []
    for split in ("train", "test"):
        (flat / split).mkdir(parents=True)
        own = []
        for file in sorted((tree / split).glob("*/*.png")):
            name = f"{file.parent.name}_{file.name}"
            shutil.copy(file, flat / split / name)
            own.append((name, file.parent.name))
        rows += [(f"{split}/{name}", label) for name, label in own]
        if split_files:
            write(flat / split, own)
    if not split_files:
        write(flat, rows)
    return flat


def _csv(folder, rows):
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "label"), *rows])


def _jsonl(folder, rows):
    lines = [json.dumps({"file_name": name, "kind": label, "caption": f"a {label}"}) for name, label in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def test_images_named_by_metadata_make_the_stream_that_class_folders_make(tree, data):
    wanted = _stream(tree, data).digest
    beside = _with_metadata(tree, _csv)
    assert _stream(beside, data).digest == wanted
    shutil.rmtree(beside)
    above = _with_metadata(tree, _jsonl, split_files=False)
    with pytest.raises(UserError, match=r"scenario\.label_column.*kind, caption.*scenario\.label_column=kind"):
        _stream(above, data)
    stream = _stream(above, data, label_column="kind")
    assert stream.digest == wanted
    assert stream.class_names == ("ant", "bee", "cat", "dog")


def test_captions_beside_class_folders_are_no_labels(tree, data):
    wanted = _stream(tree, data).digest
    for split in ("train", "test"):
        names = sorted(str(file.relative_to(tree / split)) for file in (tree / split).glob("*/*.png"))
        with open(tree / split / "metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "text"), *((name, f"about {name}") for name in names)])
    assert _stream(tree, data).digest == wanted


def test_labels_that_are_numbers_are_counted_in_their_order(tree, data):
    def numbered(folder, rows):
        _csv(folder, [(name, {"ant": 10, "bee": 9, "cat": 0, "dog": 1}[label]) for name, label in rows])

    assert _stream(_with_metadata(tree, numbered), data).class_names == ("0", "1", "9", "10")


def test_what_metadata_get_wrong_is_named(tree, data):
    seen = {}
    flat = _with_metadata(tree, lambda folder, rows: (_csv(folder, rows), seen.update({folder.name: rows})))
    (flat / "train" / "ant_img_000.png").unlink()
    with pytest.raises(UserError, match=r"ant_img_000\.png.*named by the metadata"):
        _stream(flat, data)
    _csv(flat / "train", [("../../images/train/ant/img_000.png", "ant"), *seen["train"][1:]])
    with pytest.raises(UserError, match="leads out of"):
        _stream(flat, data)
    _csv(flat / "train", [(seen["train"][0][0], ""), *seen["train"][1:]])
    with pytest.raises(UserError, match=r"train/ant_img_000\.png: has no label"):
        _stream(flat, data)
    _csv(flat / "train", [row for row in seen["train"] if row[1] != "cat"])
    with pytest.raises(UserError, match="cat: the class has no training images"):
        _stream(flat, data)


def test_a_saved_data_set_without_the_library_says_what_to_install(tree, data, monkeypatch):
    (tree / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'cl-platform\[hub\]'") as refusal:
        _stream(tree, data)
    assert refusal.value.exit_code == 2


def test_validation_serves_as_test_set_where_there_is_no_test_and_it_is_said(tree, data):
    wanted = _stream(tree, data)
    (tree / "test").rename(tree / "validation")
    found = _stream(tree, data)
    assert found.digest == wanted.digest
    assert "split validation serves as test set" in found.source


def test_a_single_split_needs_a_share_to_test_on_which_is_the_same_for_every_seed(tree, data):
    shutil.rmtree(tree / "test")
    with pytest.raises(UserError, match=r"no folder.*test.*scenario\.test_share=0\.2"):
        _stream(tree, data)
    found = _stream(tree, data, test_share=0.4)
    assert [(len(task.train), len(task.test)) for task in found.tasks] == [(6, 4), (6, 4)]
    (tree / "train").rename(tree.with_name("classes"))
    bare = _stream(tree.with_name("classes"), data, test_share=0.4)
    assert [(len(task.train), len(task.test)) for task in bare.tasks] == [(6, 4), (6, 4)]
    with pytest.raises(UserError, match=r"test_share=0\.01: class ant has 5 images, of which 0"):
        _stream(tree.with_name("classes"), data, test_share=0.01)


def test_keys_that_would_change_nothing_are_refused(tree, data):
    with pytest.raises(UserError, match=r"test_share=0\.2: the data have the split test"):
        _stream(tree, data, test_share=0.2)
    with pytest.raises(UserError, match=r"image_column=image.*no saved data set"):
        _stream(tree, data, image_column="image")
    with pytest.raises(UserError, match=r"label_column=label.*metadata\.csv"):
        _stream(tree, data, label_column="label")
