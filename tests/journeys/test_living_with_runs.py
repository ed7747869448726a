"""What a user types about runs that are there: add tasks, go on, list them, and ask whether the machine is well."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from animal_folders import ANIMALS, animals

from cl_platform import checkup
from cl_platform.callbacks.interruption import Interrupted
from cl_platform.cli import app
from cl_platform.cli.compose import compose
from cl_platform.cli.findings import lines_of
from cl_platform.cli.runs import table
from cl_platform.errors import UserError
from cl_platform.report.run_list import list_runs
from cl_platform.run import Course, carry_on, run
from cl_platform.run_config import parse
from cl_platform.run_folder import RunFolder
from cl_platform.unlearning import forgotten


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders of images, and a finished run of two tasks in closed form."""
    root = tmp_path_factory.mktemp("home")
    for name, classes in (("first", ANIMALS[:4]), ("more", ANIMALS[4:6]), ("last", ANIMALS[6:8])):
        animals(root / name, classes)
    trained(root, "strategy=nmc", f"run_dir={root / 'done'}")
    return root


def trained(root: Path, *words: str):
    """A run of two tasks with few images, which are decoded once for all tests here."""
    made = [
        "scenario=image_folder", f"scenario.path={root / 'first'}", "scenario.num_tasks=2", "trainer.max_epochs=1",
        "trainer.batch_size=8", "trainer.accelerator=cpu", "trainer.progress=false", "evaluation=boundaries",
        f"data.cache_dir={root / 'cache'}", "report.html=false", "logger=[]",
    ]  # fmt: skip
    return run(parse(compose([*made, *words])))


@pytest.fixture
def done(home, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(home / "done", tmp_path / "run"))


def said(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code and what a command printed on standard output and error."""
    code = app.run([str(word) for word in words])
    return code, *capsys.readouterr()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


LEARNT = ("accuracy_matrix.csv", "continual_eval.csv", "confusion.json", "metrics.json")


# -- extend and resume ------------------------------------------------------------------------------------------------


def test_a_finished_run_learns_more_tasks_in_its_folder(home, done, capsys):
    before = {name: (done / name).read_text() for name in LEARNT}
    code, out, _ = said(capsys, "extend", done, f"scenario.path={home / 'more'}", "scenario.num_tasks=1", "--json")
    assert code == 0
    assert json.loads(out)["metrics"]["tasks"] == [0, 1, 2]
    matrix, log = (done / "accuracy_matrix.csv").read_text(), (done / "continual_eval.csv").read_text()
    assert matrix.splitlines()[0] == "after_task,task_0,task_1,task_2"
    assert [line.split(",")[0] for line in matrix.splitlines()[1:]] == ["0", "1", "2"]
    assert log.startswith(before["continual_eval.csv"])
    assert len(log) > len(before["continual_eval.csv"])
    config = yaml.safe_load((done / "config.yaml").read_text())
    (added,) = config["extensions"]
    assert added["scenario"]["path"] == str(home / "more")
    assert config["scenario"]["path"] == str(home / "first")
    assert said(capsys, "evaluate", done)[0] == 0
    assert said(capsys, "report", done)[0] == 0
    raw = yaml.safe_load((home / "done" / "config.yaml").read_text())  # what train.py would be typed with
    with pytest.raises(UserError, match=f"python -m cl_platform resume {done}"):
        carry_on(parse({**raw, "run_dir": None, "resume": str(done)}))
    picture = next((home / "more" / "test" / "fox").iterdir())
    _, out, _ = said(capsys, "predict", done, picture, "--top-k", "6", "--json")
    assert {"eel", "fox", "ant"} <= set(re.findall(r"[a-z]+", out))


def test_an_extension_that_is_cut_off_goes_on_to_the_same_bytes(home, tmp_path, monkeypatch, capsys):
    trained(home, "strategy=linear_probe", f"run_dir={tmp_path / 'whole'}")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    words = f"scenario.path={home / 'whole'}", "scenario.num_tasks=2"
    animals(home / "whole", ANIMALS[4:8])
    assert said(capsys, "extend", tmp_path / "whole", *words)[0] == 0
    fit, started = Course._fit, []

    def stopped(course, phase):
        started.append(phase.task.task_id)
        if len(started) == 2:
            raise Interrupted(2)
        return fit(course, phase)

    with monkeypatch.context() as patch:
        patch.setattr(Course, "_fit", stopped)
        code, _, err = said(capsys, "extend", tmp_path / "cut", *words)
    assert code == 130
    assert f"python -m cl_platform resume {tmp_path / 'cut'}" in err
    assert not (tmp_path / "cut" / "metrics.json").exists()
    code, out, _ = said(capsys, "resume", tmp_path / "cut")
    assert code == 0
    assert "final average accuracy" in out
    names = [*LEARNT, "checkpoints/task_3/model.safetensors", "config.yaml"]
    assert [(tmp_path / "cut" / n).read_bytes() for n in names] == [
        (tmp_path / "whole" / n).read_bytes() for n in names
    ]


def test_a_training_that_fails_before_a_new_task_is_learnt_leaves_the_run_as_it_was(home, done, monkeypatch, capsys):
    before = content(done)
    announce = Course._announce

    def failing(course, look):
        announce(course, look)
        raise UserError("optimizer.lr", 9, "the loss stopped being finite", "Lower it")

    monkeypatch.setattr(Course, "_announce", failing)
    code, _, err = said(capsys, "extend", done, f"scenario.path={home / 'more'}", "scenario.num_tasks=1")
    assert (code, "stopped being finite" in err) == (2, True)
    after = content(done)
    kept = [*LEARNT, "config.yaml", "stream.json"]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_a_run_that_died_between_the_two_writes_of_an_extension_has_its_old_end(home, done, monkeypatch, capsys):
    before = content(done)
    monkeypatch.setattr(RunFolder, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert said(capsys, "extend", done, f"scenario.path={home / 'more'}", "scenario.num_tasks=1")[0] == 130
    monkeypatch.undo()
    assert said(capsys, "resume", done)[0] == 0
    after = content(done)
    assert {name: after[name] for name in LEARNT} == {name: before[name] for name in LEARNT}


def test_a_forgotten_task_comes_back_under_another_id_only(home, done, capsys):
    more = f"scenario.path={home / 'more'}", "scenario.num_tasks=1"
    assert said(capsys, "extend", done, *more)[0] == 0
    assert said(capsys, "unlearn", done, "--task", "2", "--yes")[0] == 0
    assert said(capsys, "extend", done, *more)[0] == 0
    assert (done / "accuracy_matrix.csv").read_text().splitlines()[0].endswith("task_3")
    facts = json.loads((done / "stream.json").read_text())
    assert [task["classes"] for task in facts["tasks"] if not task["forgotten"]] == [[0, 1], [2, 3], [6, 7]]
    code, out, _ = said(capsys, "verify", done)
    assert code == 0, out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ["nothing says which tasks", "scenario=image_folder"]),
        (("trainer.max_epochs=3",), ["trainer.max_epochs=3", "stays as it is"]),
        (("strategy=nmc",), ["strategy=nmc", "stays as it is"]),
        (("scenario.setting=domain",), ["scenario.setting=domain", "holds for all tasks"]),
        (("scenario.skip_tasks=[0]",), ["scenario.skip_tasks"]),
        (("scenario.pth=x",), ["scenario.pth=x", "scenario.path"]),
        (("scenario=image_foldr",), ["image_foldr", "image_folder"]),
        (("more",), ["more", "KEY=VALUE"]),
        (("scenario.path=/nowhere",), ["scenario.path=/nowhere"]),
        (("scenario.num_tasks=1",), ["ant, bee, cat, dog", "already"]),
        (("scenario.path=MORE", "scenario.num_tasks=3"), ["scenario.num_tasks=3", "do not divide"]),
    ],
    ids=str,
)
def test_words_that_add_no_task_are_refused_in_one_line_and_change_nothing(home, capsys, words, expected):
    before = content(home / "done")
    code, _, err = said(capsys, "extend", home / "done", *(w.replace("MORE", str(home / "more")) for w in words))
    assert code == 2
    (line,) = [line for line in err.splitlines() if not line.startswith("decod")]
    for word in expected:
        assert word in line
    assert content(home / "done") == before


def test_runs_that_cannot_take_tasks_say_what_to_do_first(home, done, tmp_path, capsys):
    more = f"scenario.path={home / 'more'}", "scenario.num_tasks=1"
    (done / "metrics.json").unlink()
    assert f"resume {done}" in said(capsys, "extend", done, *more)[2]
    assert "config.yaml" in said(capsys, "extend", tmp_path, *more)[2]
    folder = RunFolder(home / "done")
    try:
        assert "another run is writing" in said(capsys, "extend", home / "done", *more)[2]
    finally:
        folder.close()


def test_resume_needs_no_words(home, done, tmp_path, capsys):
    code, out, _ = said(capsys, "resume", done)
    assert (code, "has finished" in out) == (0, True)
    before = content(done)
    for path in (done / "checkpoints").iterdir():
        shutil.rmtree(path)
    (done / "metrics.json").unlink()
    assert said(capsys, "resume", done)[0] == 0
    after = content(done)
    assert {name: after[name] for name in LEARNT} == {name: before[name] for name in LEARNT}
    code, _, err = said(capsys, "resume", tmp_path / "nothing")
    assert (code, "no such folder" in err) == (2, True)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(home, tmp_path):
    """A finished run that forgot a task, one that stopped, one that is running, a damaged one, and what is no run."""
    root = tmp_path / "outputs"
    finished = root / "image_folder" / "nmc" / "2026-01-02_030405"
    for path in (finished, root / "stopped", root / "running", root / "damaged"):
        shutil.copytree(home / "done", path)
    forgotten.write(finished, forgotten.Record((forgotten.Forgotten(1, "drop", "E-bit", 1, True),)))
    for name in ("stopped", "running"):
        (root / name / "metrics.json").unlink()
    shutil.rmtree(root / "stopped" / "checkpoints" / "task_1")
    (root / "damaged" / "metrics.json").write_text("{")
    (root / "conf").mkdir()
    (root / "conf" / "config.yaml").write_text("defaults: [strategy]\n")
    return root


def test_runs_are_listed_by_date_with_what_became_of_them(shelf, capsys, monkeypatch):
    lock = RunFolder(shelf / "running")
    try:
        code, out, err = said(capsys, "runs", shelf, "--json")
    finally:
        lock.close()
    found = json.loads(out)
    assert code == 1
    assert [line for line in err.splitlines() if "damaged" in line] == err.splitlines()
    assert "metrics.json" in err
    assert [entry["date"] for entry in found] == sorted(entry["date"] for entry in found)
    by_name = {Path(entry["path"]).name: entry for entry in found}
    assert set(by_name) == {"2026-01-02_030405", "stopped", "running"}
    first = by_name["2026-01-02_030405"]
    assert (first["date"], first["state"], first["forgotten"]) == ("2026-01-02T03:04:05", "finished", [1])
    assert first["accuracy"] is not None
    assert [by_name[n]["state"] for n in ("stopped", "running")] == ["stopped", "running"]
    assert (by_name["stopped"]["done"], by_name["stopped"]["tasks"]) == (1, 2)
    assert json.loads(said(capsys, "runs", shelf, "--json", "--strategy", "er")[1]) == []
    assert len(json.loads(said(capsys, "runs", shelf, "--json", "--scenario", "image_folder")[1])) == 3
    assert said(capsys, "runs", shelf / "nowhere")[0] == 2


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_of_runs_fits_the_terminal(shelf, width):
    found = list_runs([shelf]).runs
    lines = table(found, width)
    for run_ in found:
        (line,) = [line for line in lines if str(run_.path) in line]
        lines.remove(line)
        if width == 140:
            assert "nmc" in line
        assert ("forgot 1" in line) == bool(run_.forgotten)
    assert max(len(line) for line in lines) <= width
    assert all(word in lines[0] for word in ("scenario", "strategy", "seed", "state", "time"))


# -- doctor -----------------------------------------------------------------------------------------------------------


def test_a_healthy_machine_is_told_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CL_DATA_ROOT", str(tmp_path))
    (tmp_path / "cifar100" / "train").mkdir(parents=True)
    code, out, _ = said(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0, out
    assert {entry["topic"] for entry in found} >= {topic for topic, _ in checkup.CHECKS}
    texts = " ".join(entry["text"] for entry in found)
    for word in ("cifar100", "vit_nano: SHA-256 as on its card", "free", "none installed", "8 images"):
        assert word in texts


def test_a_broken_machine_is_described_line_by_line(capsys, monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n == "torch"]:
        monkeypatch.setitem(sys.modules, name, None)  # as where it is not installed
    known = checkup._version
    versions = {"torch": None, "timm": "0.1"}
    monkeypatch.setattr(checkup, "_version", lambda name: versions.get(name, known(name)))
    monkeypatch.setattr(checkup, "HERE", tmp_path / "cl_platform")
    weights = tmp_path / "cl_platform" / "backbones" / "weights"
    weights.mkdir(parents=True)
    (weights / "small.md").write_text(f"| SHA-256 of the file | `{'0' * 64}` |")
    (weights / "small.safetensors").write_bytes(b"torn")
    shutil.copy(Path(checkup.__file__).parents[1] / "pyproject.toml", tmp_path)
    monkeypatch.setenv("CL_DATA_ROOT", str(tmp_path / "nowhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    code, out, err = said(capsys, "doctor")
    assert code == 1
    assert "Traceback" not in out + err
    for words in ("torch is missing", "timm 0.1, needed is", "pip install 'timm", "SHA-256 is not", "cannot be written",
                  "nowhere is not there", "cannot be checked"):  # fmt: skip
        assert words in re.sub(r"\s+", " ", out)
    assert re.search(r"\d problems and 1 warning", out)
    assert max(map(len, out.splitlines())) <= 80 + len(str(tmp_path))


def test_a_finding_has_its_next_step_below_it():
    lines = lines_of(checkup.Finding("data", "warning", "word " * 30, "do this " * 12), 60)
    assert lines[0].startswith("data       warning word")
    assert max(map(len, lines)) <= 60
    assert sum("->" in line for line in lines) == 1
