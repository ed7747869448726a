"""What a person types who wants to use what was trained, and what they read."""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import NAMES, SIDE, picture_folder, run_on

from cl_platform import export as exporting
from cl_platform.cli.app import run as command
from cl_platform.errors import UserError
from cl_platform.trained import Trained

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The pictures and a run on them, not to be changed."""
    root = tmp_path_factory.mktemp("use")
    pictures = picture_folder(root / "pictures")
    return pictures, run_on(pictures, root, "strategy=er", "strategy.er.buffer.size=8").path


def typed(capsys, *words):
    """Exit code, standard output, lines of standard error."""
    capsys.readouterr()
    code = command([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err.splitlines()


# -- predict ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_answered_in_every_format_with_the_same_answers(made, capsys):
    pictures, run = made
    code, out, err = typed(capsys, "predict", run, pictures / "test", "--json", "--top-k", 99, "--batch-size", 5)
    assert (code, err) == (0, [])
    answers = json.loads(out)
    assert [a["path"] for a in answers] == [
        str(pictures / "test" / name / f"{i}.png") for name in NAMES for i in range(3)
    ]
    assert all(sorted(c["class"] for c in a["classes"]) == sorted(NAMES) for a in answers)
    tasks = dict(zip(NAMES, (0, 0, 1, 1), strict=True))
    assert all(a["task_id"] == tasks[a["classes"][0]["class"]] for a in answers)
    code, out, _ = typed(capsys, "predict", run, pictures / "test", "--format", "csv", "--top-k", 2)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and len(rows) == 24
    for row, answer in zip(rows[::2], answers, strict=True):
        best = answer["classes"][0]
        assert row["class"] == best["class"].replace("=", "'=") and row["rank"] == "1"
        assert float(row["probability"]) == pytest.approx(best["probability"], rel=1e-3)
    code, out, _ = typed(capsys, "predict", run, pictures / "test")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 12
    assert all(line.split("  ")[0].startswith(a["classes"][0]["class"]) for line, a in zip(lines, answers, strict=True))


def test_patterns_and_standard_input_name_images_as_well(made, capsys, monkeypatch, tmp_path):
    pictures, run = made
    _, out, _ = typed(capsys, "predict", run, pictures / "test" / "*" / "1.png", "--json")
    assert len(json.loads(out)) == 4
    paths = "\n".join(str(pictures / "test" / name / "2.png") for name in NAMES[1:]) + "\n\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(paths.encode())))
    file = tmp_path / "answers.csv"
    code, out, err = typed(capsys, "predict", run, "-", "--format", "csv", "--output", file)
    assert (code, out, err) == (0, "", [])
    assert len(file.read_text().splitlines()) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["answers.csv"]


def test_a_corrupt_image_is_named_and_the_rest_is_answered(made, capsys, tmp_path):
    pictures, run = made
    good = pictures / "test" / "otter" / "0.png"
    (tmp_path / "torn.png").write_bytes(good.read_bytes()[:90])
    (tmp_path / "-1+1.png").write_bytes(good.read_bytes())
    (tmp_path / "line\x1b[31m\nbreak.png").write_text("no image")
    code, out, err = typed(capsys, "predict", run, tmp_path, tmp_path / "nothing.png", good, "--json")
    assert code == 1
    assert [Path(a["path"]).name for a in json.loads(out)] == ["-1+1.png", "0.png"]
    assert len(err) == 3 and all("\x1b" not in line for line in err)
    assert any("torn.png: " in line for line in err)
    assert any(line.endswith("nothing.png: there is no such file") for line in err)
    _, out, _ = typed(capsys, "predict", run, tmp_path, "--format", "csv")
    assert [row[0] for row in csv.reader(io.StringIO(out))][1:] == [str(tmp_path / "-1+1.png")]


def test_answers_come_while_later_images_are_not_looked_at_yet(made):
    pictures, run = made
    asked = []

    def files():
        for number in range(10):
            asked.append(number)
            yield pictures / "test" / "heron" / f"{number % 3}.png"

    answers = Trained.open(run).answers(files(), batch_size=4)
    next(answers)
    assert asked == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["predict", "RUN", "nowhere.png"], "error: images=nowhere.png: there is no such file"),
        (["predict", "RUN", "*.tiff"], "error: images=*.tiff: matches no file"),
        (["predict", "RUN", "EMPTY"], "the folder holds no image"),
        (["predict", "EMPTY", "PICTURE"], "is no run folder"),
        (["predict", "RUN", "PICTURE", "--format", "yaml"], "error: --format=yaml: unknown"),
        (["predict", "RUN", "PICTURE", "--output", "nowhere/answers.csv"], "error: --output=nowhere/answers.csv"),
        (["predict", "RUN", "PICTURE", "--device", "tpu9"], "error: device=tpu9: cannot be used"),
        (["predict", "RUN"], "error: Missing argument"),
        (["evaluate", "RUN", "--on", "nowhere"], "error: --on=nowhere: there is no such folder"),
        (["evaluate", "RUN", "--on", "PICTURES"], "Name PICTURES/test"),
        (["export", "RUN", "--format", "pickle", "--output", "x"], "error: --format=pickle: unknown"),
        (["export", "RUN", "--format", "safetensors", "--output", "RUN/x"], "lies in the run folder"),
        (["export", "RUN", "--format", "safetensors", "--output", "EMPTY"], "is a folder"),
        (["export", "RUN", "--format", "safetensors", "--output", "a/b"], "its folder is not there"),
    ],
)
def test_wrong_words_end_in_one_line(made, capsys, tmp_path, words, said):
    pictures, run = made
    places = {"RUN": run, "EMPTY": tmp_path, "PICTURES": pictures, "PICTURE": pictures / "test/otter/0.png"}

    def filled(text):
        return re.sub("|".join(places), lambda found: str(places[found[0]]), text)

    code, out, err = typed(capsys, *map(filled, words))
    assert (code, out, len(err)) == (2, "", 1), err
    assert filled(said) in err[0]


# -- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluation_counts_what_the_run_counted(made, capsys):
    _, run = made
    code, out, err = typed(capsys, "evaluate", run, "--json")
    assert (code, err) == (0, [])
    found = json.loads(out)
    assert found["same_as_recorded"] is True
    last = [float(cell) for cell in (run / "accuracy_matrix.csv").read_text().splitlines()[-1].split(",")[1:]]
    assert [task["accuracy"] for task in found["spaces"]["cil"]["tasks"]] == last
    metrics = json.loads((run / "metrics.json").read_text())
    assert found["spaces"]["cil"]["mean_of_tasks"] == pytest.approx(metrics["acc"]["value"])
    assert found["spaces"]["til"]["mean_of_tasks"] == pytest.approx(metrics["acc_til"]["value"])
    code, out, _ = typed(capsys, "evaluate", run)
    assert code == 0 and "class-incremental" in out and "the same counts" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_other_data_than_the_runs_are_noticed(made, capsys, monkeypatch):
    from cl_platform import reevaluation

    def without_some(config, record, instructions):
        stream = building(config, record, instructions)
        tasks = tuple(replace(task, test=task.test.select(torch.arange(4))) for task in stream.tasks)
        return replace(stream, tasks=tasks, digest="other")

    from dataclasses import replace

    building = reevaluation.stream_of
    monkeypatch.setattr(reevaluation, "stream_of", without_some)
    code, out, err = typed(capsys, "evaluate", made[1], "--json")
    assert code == 0 and json.loads(out)["same_as_recorded"] is False
    assert len(err) == 2 and all(line.startswith("note: ") for line in err)


def test_own_images_are_counted_by_the_names_of_their_folders(made, capsys, tmp_path):
    pictures, run = made
    code, out, err = typed(capsys, "evaluate", run, "--on", pictures / "test", "--json")
    whole = json.loads(typed(capsys, "evaluate", run, "--json")[1])
    found = json.loads(out)
    assert (code, err, found["spaces"]) == (0, [], whole["spaces"])
    for name in ("otter", "unicorn"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes((pictures / "test" / "otter" / "0.png").read_bytes())
    (tmp_path / "otter" / "torn.png").write_text("torn")
    code, out, err = typed(capsys, "evaluate", run, "--on", tmp_path, "--json")
    found = json.loads(out)
    assert code == 1 and [c["class"] for c in found["per_class"]] == ["otter"]
    assert found["unknown_classes"] == ["unicorn"] and found["per_class"][0]["images"] == 1
    assert err[0].startswith("unicorn: no class") and "torn.png" in err[1]


# -- export -----------------------------------------------------------------------------------------------------------


def test_a_traced_function_answers_alone_as_the_live_learner(made, capsys, tmp_path):
    _, run = made
    file = tmp_path / "learner.pt2"
    code, out, err = typed(capsys, "export", run, "--format", "torch_export", "--output", file)
    assert (code, err) == (0, []) and "checked on random images" in out
    images = torch.randint(0, 256, (7, 3, SIDE, SIDE), dtype=torch.uint8)
    facts = {"metadata.json": ""}
    function = torch.export.load(file, extra_files=facts).module()
    torch.testing.assert_close(function(images), Trained.open(run).logits(images), rtol=1e-4, atol=1e-4)
    facts = json.loads(facts["metadata.json"])
    assert [entry["name"] for entry in facts["classes"]] == list(NAMES)
    assert facts["input"]["shape"] == ["batch", 3, SIDE, SIDE]
    before = file.read_bytes()
    code, _, err = typed(capsys, "export", run, "--format", "torch_export", "--output", file)
    assert code == 2 and "is there already" in err[0] and file.read_bytes() == before


def test_an_answer_whose_way_depends_on_the_image_is_refused_with_the_strategys_name(made, tmp_path):
    trained = Trained.open(made[1])
    plain = trained.learner.composition.predict
    trained.learner.composition.predict = lambda batch: plain(batch) if batch.images.sum() > 0 else -plain(batch)
    with pytest.raises(UserError, match=r"^strategy=er: its answers cannot be written down in this format \(.*\)\."):
        exporting.export(trained, "torch_export", tmp_path / "learner.pt2")
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_model_answers_as_the_live_learner(made, capsys, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, run = made
    file = tmp_path / "learner.onnx"
    code, out, err = typed(capsys, "export", run, "--format", "onnx", "--output", file, "--json")
    assert (code, err) == (0, []) and json.loads(out)["difference"] < 1e-3
    images = torch.randint(0, 256, (7, 3, SIDE, SIDE), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Trained.open(run).logits(images), rtol=1e-3, atol=1e-3)
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    assert [entry["name"] for entry in classes] == list(NAMES)


def test_learnt_tensors_are_the_checkpoints(made, capsys, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    _, run = made
    file = tmp_path / "learner.safetensors"
    code, _, err = typed(capsys, "export", run, "--format", "safetensors", "--output", file)
    assert code == 0 and err == ["note: 8 remembered training images are in the file"]
    own, saved = load_file(file), load_file(run / "checkpoints" / "task_1" / "model.safetensors")
    assert own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in own)
    with safe_open(file, "pt") as held:
        assert json.loads(held.metadata()["state"])["learnt"] == [0, 1]


@pytest.mark.parametrize("wrong", [lambda x: x + 0.01, lambda x: x[:, :2], lambda x: x * float("nan")])
def test_a_failed_check_leaves_no_file(made, capsys, tmp_path, monkeypatch, wrong):
    right = exporting._safetensors

    def harmed(trained):
        blob, function, images = right(trained)
        return blob, lambda given: wrong(function(given)), images

    monkeypatch.setitem(exporting.MAKERS, "safetensors", harmed)
    code, out, err = typed(capsys, "export", made[1], "--format", "safetensors", "--output", tmp_path / "x")
    assert (code, out, len(err)) == (3, "", 1) and "the check failed" in err[0]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_command_that_brings_it(made, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    code, _, err = typed(capsys, "export", made[1], "--format", "onnx", "--output", tmp_path / "x")
    assert code == 2 and len(err) == 1 and "pip install 'cl-platform[onnx]'" in err[0]


def test_the_commands_start_without_torch():
    code = "import sys, cl_platform.cli.app; print('torch' in sys.modules, 'onnx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "False"], done.stderr
