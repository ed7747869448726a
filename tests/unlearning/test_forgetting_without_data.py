"""What was learnt can be removed where the images are gone: deletion, and the newest task; nothing that must learn."""

import json
import shutil

import pytest
import yaml
from image_runs import images, words_for
from shelf import newest

from cl_platform.cli.app import run as command
from cl_platform.cli.compose import compose
from cl_platform.errors import UserError
from cl_platform.requests import paused
from cl_platform.run import run as start
from cl_platform.run_config import parse
from cl_platform.scenarios.facts import FILE
from cl_platform.unlearning.canonical import compare_files
from cl_platform.unlearning.engine import Wish

NOT_MEASURED = "accuracies of the kept tasks"


pytestmark = pytest.mark.usefixtures("tiny_backbone")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs by name on a folder of images."""
    root = tmp_path_factory.mktemp("place")
    tree, cache = images(root / "images"), root / "cache"
    for name, words in (("nmc", ()), ("er", ("strategy.er.buffer.size=12",))):
        start(parse(compose([*words_for(tree, cache, f"strategy={name}", *words), f"run_dir={root / name}"])))
    return root


@pytest.fixture
def gone(place, tmp_path):
    """Call with a run's name: two copies of it, the second one of a run whose images nobody has any more."""

    def make(name):
        copies = []
        for kind in ("here", "gone"):
            copies.append(shutil.copytree(place / name, tmp_path / name / kind))
        config = yaml.safe_load((copies[1] / "config.yaml").read_text())
        config["scenario"]["path"] = str(tmp_path / "nowhere")
        (copies[1] / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        return copies

    return make


def forget(path, task_id, method):
    with paused(path) as folder:
        choice = folder.plan(Wish(task_id, method))
        certificate = folder.carry_out(Wish(task_id, method))
    assert certificate["method"]["used"] == choice.option.method
    return certificate


def uncovered(certificate):
    return {entry["what"] for entry in certificate["not_covered"]}


def test_deletion_needs_no_image_and_leaves_the_same_bytes_and_results(gone):
    here, away = gone("nmc")
    one, other = forget(here, 1, "auto"), forget(away, 1, "auto")
    assert one["method"]["used"] == other["method"]["used"] == "drop"
    assert one["level"] == other["level"] == "E-bit"
    assert compare_files(newest(here), newest(away)).equal
    for name in ("accuracy_matrix.csv", "confusion.json", "metrics.json", "environment.json", FILE):
        assert (here / name).read_text() == (away / name).read_text(), name
    assert one["target"] == other["target"]
    assert other["target"]["n_train"] == 12
    assert uncovered(other) - uncovered(one) == {NOT_MEASURED}


def test_the_newest_task_is_forgotten_exactly_without_an_image(gone, place):
    _, away = gone("er")
    certificate = forget(away, 2, "rollback")
    assert certificate["level"] == "E-bit"
    assert NOT_MEASURED in uncovered(certificate)
    assert compare_files(newest(away), place / "er" / "checkpoints" / "task_1" / "model.safetensors").equal
    whole, left = ((p / "accuracy_matrix.csv").read_text().splitlines() for p in (place / "er", away))
    assert [line.split(",")[:3] for line in whole[:3]] == [line.split(",") for line in left]
    facts = json.loads((away / "environment.json").read_text())["dataset"]["tasks"]
    assert [(task["task_id"], task["train"]) for task in facts] == [(0, 12), (1, 12)]
    assert json.loads((away / "metrics.json").read_text())["tasks"] == [0, 1]
    assert [task["task_id"] for task in json.loads((away / FILE).read_text())["tasks"]] == [0, 1]


def test_what_must_learn_again_says_whose_images_are_missing(gone, capsys):
    _, away = gone("er")
    before = {path: path.read_bytes() for path in away.rglob("*") if path.is_file()}
    with paused(away) as folder:
        with pytest.raises(UserError, match=r"--method=rollback: .*the data of tasks 2 cannot be had.*nowhere"):
            folder.plan(Wish(1, "rollback"))
        with pytest.raises(
            UserError, match=r"--method=auto: no exact way to forget task 1 .*--method approximate:NAME"
        ):
            folder.plan(Wish(1))
    assert {path: path.read_bytes() for path in away.rglob("*") if path.is_file()} == before
    assert command(["unlearn", str(away), "--task", "1", "--method", "rollback", "--yes"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: --method=rollback: task 1 cannot be forgotten so")
    )


def test_an_approximate_method_takes_the_images_of_the_buffer_and_refuses_where_there_is_none(gone):
    _, away = gone("er")
    certificate = forget(away, 1, "approximate:grad_ascent")
    params = certificate["method"]["params"]
    assert params["source"] == "buffer"
    assert 0 < params["facts"]["forget_images"] < 12
    with paused(gone("nmc")[1]) as folder, pytest.raises(UserError, match="no image of the task can be had"):
        folder.plan(Wish(1, "approximate:grad_ascent"))


def test_a_run_that_noted_no_facts_names_its_data(gone):
    _, away = gone("nmc")
    (away / FILE).unlink()
    with paused(away) as folder, pytest.raises(UserError, match="nowhere"):
        folder.plan(Wish(1, "drop"))


def test_a_folder_that_forgot_without_data_can_forget_again_with_them(gone, place):
    _, away = gone("nmc")
    forget(away, 1, "drop")
    config = yaml.safe_load((place / "nmc" / "config.yaml").read_text())
    (away / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    certificate = forget(away, 0, "drop")
    assert certificate["level"] == "E-bit"
    assert NOT_MEASURED not in uncovered(certificate)
    assert json.loads((away / "metrics.json").read_text())["tasks"] == [2]
