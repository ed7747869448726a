"""A run opened for use answers as it did when it was evaluated, without its data, and names nothing it forgot."""

import json
import shutil

import numpy as np
import pytest
import torch
from pictures import CHEAP, NAMES, SIDE, picture_folder, run_on
from PIL import Image

from cl_platform.building import stream_of
from cl_platform.cli.app import run as command
from cl_platform.errors import UserError
from cl_platform.run_folder import to_json
from cl_platform.scenarios import facts
from cl_platform.trained import Trained


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The pictures and a finished run on them, not to be changed."""
    root = tmp_path_factory.mktemp("opening")
    return picture_folder(root / "pictures"), run_on(root / "pictures", root)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run folder, to be changed."""
    return shutil.copytree(finished[1].path, tmp_path / "run")


def evaluated(result, task):
    with result.learner.answering():
        return result.learner.logits_of(task.task_id, "test", task.test, torch.arange(len(task.test)))


def test_a_file_gets_the_logits_of_its_evaluation_and_so_do_its_pixels(finished):
    pictures, result = finished
    trained = Trained.open(result.path)
    assert trained.classes == [0, 1, 2, 3] and trained.class_names == list(NAMES)
    for task in result.stream.tasks:
        files = [pictures / "test" / NAMES[c] / f"{number}.png" for c in task.classes for number in range(3)]
        stored = task.test.images(slice(None))
        assert torch.equal(torch.stack([trained.prepared(file) for file in files]), stored)
        want = evaluated(result, task)
        assert torch.allclose(trained.logits(stored), want, atol=1e-5)
        for images in (files, list(map(str, files)), stored, [Image.open(file) for file in files]):
            answers = trained.predict(images, top_k=9)
            assert [answer.classes[0][0] for answer in answers] == [NAMES[c] for c in want.argmax(1)]
            assert {answer.task_id for answer in answers} <= {0, 1}
            assert all(len(a.classes) == 4 and abs(sum(p for _, p in a.classes) - 1) < 1e-5 for a in answers)


def test_grey_digits_saved_as_coloured_files_are_the_same_images(small_run, tmp_path):
    result = small_run("strategy=nmc", "scenario.skip_tasks=[1,3,4]", *CHEAP)
    trained, task = Trained.open(result.path), result.stream.tasks[1]
    stored = task.test.images(slice(None))
    Image.fromarray(stored[0].permute(1, 2, 0).numpy()).save(tmp_path / "digit.png")
    Image.fromarray(stored[0, 0].numpy()).save(tmp_path / "grey.png")
    assert torch.equal(trained.prepared(tmp_path / "digit.png"), stored[0])
    assert torch.equal(trained.prepared(tmp_path / "grey.png"), stored[0])
    assert torch.allclose(trained.logits(stored), evaluated(result, task), atol=1e-5)
    answer = trained.predict(tmp_path / "digit.png")[0]
    assert answer.task_id == {0: 0, 1: 0, 4: 2, 5: 2}[int(answer.classes[0][0])]
    coloured = np.zeros((8, 8, 3), np.uint8)
    coloured[..., 0] = 200  # red: the run has only met grey, so it becomes a grey of its brightness
    assert trained.prepared(Image.fromarray(coloured)).unique().tolist() == [60]


def test_no_data_are_needed_to_answer_and_their_absence_is_said_when_they_are(finished, copied, tmp_path):
    pictures, result = finished
    before = Trained.open(result.path).predict(pictures / "test" / "otter" / "0.png", top_k=4)[0]
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace(str(pictures), str(tmp_path / "gone")))
    trained = Trained.open(copied)
    assert all(len(task.train) + len(task.test) == 0 for task in trained.stream.tasks)
    after = trained.predict(pictures / "test" / "otter" / "0.png", top_k=4)[0]
    assert (after.classes, after.task_id) == (before.classes, 1)
    with pytest.raises(UserError, match="scenario.path"):
        trained.evaluate()


def test_a_run_from_before_the_facts_were_written_is_opened_from_its_data(finished, copied):
    pictures, result = finished
    (copied / facts.FILE).unlink()
    images = result.stream.tasks[0].test.images(slice(None))
    trained = Trained.open(copied)
    assert len(trained.stream.tasks[0].test) == 6
    assert torch.equal(trained.logits(images), Trained.open(result.path).logits(images))


@pytest.mark.parametrize("method", ["drop", "rollback"])
def test_names_of_a_forgotten_task_leave_the_facts_and_stay_out(copied, method, capsys):
    assert b"otter" in (copied / facts.FILE).read_bytes()
    assert command(["unlearn", str(copied), "--task", "1", "--method", method, "--yes"]) == 0
    text = (copied / facts.FILE).read_text()
    assert "otter" not in text and "trout" not in text and "heron" in text
    listed = json.loads((copied / "unlearning" / "certificate.json").read_text())["files"]
    assert [entry["action"] for entry in listed if entry["path"] == facts.FILE] == ["rewritten"]
    trained = Trained.open(copied)
    assert trained.class_names == list(NAMES[:2]) and trained.kept_tasks == [0]
    stream = stream_of(trained.config, trained.record)
    assert to_json(facts.facts_of(stream, trained.record.ids)) == text  # what a resumed run writes


def test_a_task_of_an_open_request_is_not_answered_with(copied):
    from cl_platform.unlearning import journal

    journal.begin(copied, {"task_id": 1, "method": "drop"})
    with pytest.raises(UserError, match="a request to forget a task is open"):
        Trained.open(copied)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: shutil.rmtree(run), "is no run folder"),
        (lambda run: (run / "config.yaml").write_text("a: [\n"), "no readable config.yaml"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "no checkpoint to open"),
        (lambda run: (run / facts.FILE).write_text('{"schema": 3}'), "stream.json cannot be understood"),
        (lambda run: (run / facts.FILE).write_text("[]"), "stream.json cannot be understood"),
    ],
)
def test_what_is_no_trained_run_is_refused(copied, harm, said):
    harm(copied)
    with pytest.raises(UserError, match=said):
        Trained.open(copied)


def test_another_backbone_is_refused(copied):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match="the backbone's weights are not those"):
        Trained.open(copied)


def test_pixels_come_in_every_usual_shape_and_others_are_refused(finished):
    trained = Trained.open(finished[1].path)
    grey = np.full((14, 20), 77, np.uint8)
    for image in (grey, grey[None], torch.from_numpy(grey), torch.full((1, 14, 20), 77 / 255), Image.fromarray(grey)):
        assert torch.equal(trained.prepared(image), torch.full((3, SIDE, SIDE), 77, dtype=torch.uint8))
    for image in (torch.zeros(4, 8, 8), torch.full((3, 8, 8), 2.0), object()):
        with pytest.raises(UserError, match="^images="):
            trained.predict([image])


def test_a_class_of_several_tasks_names_none(small_run):
    result = small_run("strategy=nmc", "scenario=rotated_digits", "scenario.num_tasks=2", *CHEAP)
    trained = Trained.open(result.path)
    answers = trained.predict(result.stream.tasks[0].test.images(slice(0, 4)))
    assert {answer.task_id for answer in answers} == {None}
