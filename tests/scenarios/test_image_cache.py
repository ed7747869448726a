"""Decoded images on disk: content keys, bad files, two processes."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import write_tree
from PIL import Image

from cl_platform.errors import UserError
from cl_platform.scenarios import DataConfig, ScenarioConfig, build_stream, cache
from cl_platform.scenarios.decode import UnreadableImageError, decode


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "images")


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache with blanks"))


def _stream(tree, data, **keys):
    return build_stream(ScenarioConfig(kind="image_folder", path=str(tree), num_tasks=2, **keys), data, 0)


def _entries(data):
    return sorted(os.listdir(Path(data.cache_dir) / "entries"))


def test_pixels_come_back_as_they_were(tree, data):
    stream = _stream(tree, data)
    with Image.open(tree / "train" / "bee" / "img_002.png") as image:
        wanted = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(stream.tasks[0].train.images(torch.tensor([7]))[0], wanted)


def test_an_unchanged_folder_is_not_read_again(tree, data, monkeypatch):
    first = _stream(tree, data)
    monkeypatch.setattr(cache, "_read", None)
    assert _stream(tree, data).digest == first.digest


def test_a_touched_or_copied_folder_finds_the_same_entry(tree, data, monkeypatch):
    first = _stream(tree, data)
    os.utime(tree / "train" / "ant" / "img_000.png", (1, 1))
    monkeypatch.setattr(cache, "decode", None)
    assert _stream(tree, data).digest == first.digest
    assert len(_entries(data)) == 1


def test_a_changed_image_makes_a_new_entry(tree, data):
    first = _stream(tree, data)
    Image.new("RGB", (8, 8), "red").save(tree / "train" / "ant" / "img_000.png")
    assert _stream(tree, data).digest != first.digest
    assert len(_entries(data)) == 2


def test_a_damaged_entry_is_built_again(tree, data):
    first = _stream(tree, data)
    entry = Path(data.cache_dir) / "entries" / _entries(data)[0]
    (entry / "train.npy").write_bytes(b"half")
    assert _stream(tree, data).digest == first.digest


def test_images_of_varying_size_are_cut_to_one(tmp_path, data):
    tree = write_tree(tmp_path / "wide", size=(40, 20))
    assert _stream(tree, data).image_shape == (3, 256, 256)
    assert _stream(tree, data, image_size=16).image_shape == (3, 16, 16)


def test_grey_images_are_stored_once_and_read_as_three_channels(tmp_path, data):
    stream = _stream(write_tree(tmp_path / "grey", grey=True), data)
    assert stream.tasks[0].train.source.shape[1] == 1
    assert stream.tasks[0].train.images(slice(0, 2)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_an_unreadable_image_is_named_or_skipped_and_counted(tree, data, content):
    file = tree / "train" / "bee" / "img_001.png"
    file.write_bytes(file.read_bytes()[:60] if content is None else content)
    with pytest.raises(UserError, match=r"bee/img_001\.png.*data\.skip_corrupt=true") as caught:
        _stream(tree, data)
    assert caught.value.key == "scenario.path"
    assert not any(name.startswith("building") for name in _entries(data))
    skipping = DataConfig(cache_dir=data.cache_dir, skip_corrupt=True)
    for _ in range(2):
        stream = _stream(tree, skipping)
        assert stream.skipped == 1
        assert len(stream.tasks[0].train) == 9


def test_empty_and_one_class_folders_are_refused(tmp_path, data):
    with pytest.raises(UserError, match="only one class folder, ant"):
        _stream(write_tree(tmp_path / "one", classes=("ant",)), data)
    (tmp_path / "none" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="there is no folder"):
        _stream(tmp_path / "none", data)
    (tmp_path / "none" / "test").mkdir()
    with pytest.raises(UserError, match="no class folder"):
        _stream(tmp_path / "none", data)
    tree = write_tree(tmp_path / "hole")
    (tree / "train" / "eel").mkdir()
    with pytest.raises(UserError, match="eel.*no images"):
        _stream(tree, data)
    with pytest.raises(UserError, match="no such folder"):
        _stream(tmp_path / "nowhere", data)


def test_links_that_leave_the_folder_are_refused_and_others_followed(tree, tmp_path, data):
    (tree / "train" / "ant" / "img_900.png").symlink_to(tree / "train" / "bee" / "img_000.png")
    assert len(_stream(tree, data).tasks[0].train) == 11
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    (tree / "train" / "ant" / "img_901.png").symlink_to(outside)
    with pytest.raises(UserError, match=r"img_901\.png.*leads out"):
        _stream(tree, data)


def test_a_name_that_is_not_utf8_is_read(tree, data):
    folder = os.fsencode(tree) + b"/train/ant/"
    try:
        os.rename(folder + b"img_000.png", folder + b"img_\xff.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert len(_stream(tree, data).tasks[0].train) == 10


def test_a_cache_folder_that_cannot_be_made_is_named(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        _stream(tree, DataConfig(cache_dir=str(tmp_path / "file" / "below")))


def test_two_processes_may_build_the_same_entry(tree, data):
    code = (
        "from cl_platform.scenarios import *\n"
        f"s = build_stream(ScenarioConfig(kind='image_folder', path={str(tree)!r}, num_tasks=2),"
        f" DataConfig(cache_dir={data.cache_dir!r}), 0)\n"
        "print(s.digest)"
    )
    root = Path(__file__).parents[2]
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root) for _ in range(2)]
    digests = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert digests == {(_stream(tree, data).digest + "\n").encode()}
    assert len(_entries(data)) == 1


def test_a_loser_of_the_race_uses_the_winners_entry(tree, data, monkeypatch):
    first = _stream(tree, data)
    opened = iter([None])
    real = cache._open
    monkeypatch.setattr(cache, "_read_index", lambda path: None)
    monkeypatch.setattr(cache, "_open", lambda entry: next(opened, real(entry)))
    assert _stream(tree, data).digest == first.digest
    assert len(_entries(data)) == 1


def _bytes(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_the_exif_orientation_is_applied():
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(_bytes(image, exif=exif), None, 1)
    assert np.array_equal(turned[0], np.rot90(np.asarray(image), -1))


def test_colour_modes():
    palette = Image.new("RGB", (4, 4), (200, 10, 10)).convert("P")
    assert decode(_bytes(palette), None, 3)[0].min() > 190
    clear = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    assert decode(_bytes(clear), None, 3).max() == 0
    deep = Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16))
    assert set(decode(_bytes(deep), None, 3).ravel().tolist()) == {128}
    printed = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    assert decode(_bytes(printed, "JPEG"), None, 3).min() > 250
    moving = _bytes(
        Image.new("RGB", (4, 4), "red"), "WEBP", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")]
    )
    assert decode(moving, None, 3)[0].min() > 200
    assert decode(_bytes(Image.new("RGB", (1, 1), "white")), 8, 3).shape == (3, 8, 8)


def test_a_huge_image_is_refused_by_its_pixel_count():
    with pytest.raises(UnreadableImageError, match="pixels"):
        decode(_bytes(Image.new("1", (20_000, 20_000))), 32, 3)


@pytest.mark.skipif(
    "CL_DATA_ROOT" not in os.environ, reason="CIFAR-100 is looked for in CL_DATA_ROOT, which is not set"
)
def test_real_cifar100_is_ten_tasks_of_ten_classes():
    if not Path(os.environ["CL_DATA_ROOT"], "cifar100", "train").is_dir():
        pytest.skip("CL_DATA_ROOT has no cifar100/train")
    stream = build_stream(ScenarioConfig(kind="split_cifar100", num_tasks=10, class_order=0), DataConfig(), 0)
    assert [len(t.train) for t in stream.tasks] == [5000] * 10
    assert [len(t.test) for t in stream.tasks] == [1000] * 10
    assert stream.tasks[0].classes[:5] == (44, 19, 93, 90, 71)
    assert stream.class_names[0] == "apple"
    assert stream.image_shape == (3, 32, 32)
