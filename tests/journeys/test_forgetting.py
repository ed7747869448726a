"""What a person types who wants a task forgotten, and what they read."""

import json

import pytest

from cl_platform.cli.app import run as command
from cl_platform.cli.train import train

pytestmark = pytest.mark.usefixtures("tiny_backbone")

SMALL = [
    "scenario.train_per_class=12", "scenario.test_per_class=6", "trainer.max_epochs=1", "trainer.progress=false",
    "scenario.skip_tasks=[3,4]", "logger=[csv]", "report.html=false", "evaluation=boundaries", "trainer.batch_size=12",
]  # fmt: skip


@pytest.fixture
def trained(tmp_path):
    """Call with a strategy: a finished run of three tasks."""

    def make(strategy, *words):
        path = tmp_path / strategy
        assert train([f"strategy={strategy}", f"run_dir={path}", *SMALL, *words]) == 0
        return path

    return make


def test_forgetting_by_deletion_says_what_was_done(trained, capsys):
    path = trained("nmc")
    capsys.readouterr()
    assert command(["unlearn", str(path), "--task", "1"]) == 0
    said = capsys.readouterr()
    assert "task 1 is forgotten by drop, level E-bit" in said.out
    assert "no kept component has seen the task" in said.out
    assert str(path / "unlearning" / "certificate.json") in said.out
    assert json.loads((path / "metrics.json").read_text())["tasks"] == [0, 2]


def test_relearning_states_its_price_and_waits_for_a_yes(trained, capsys):
    path = trained("finetune")
    capsys.readouterr()
    assert command(["unlearn", str(path), "--task", "0"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert any("relearns 2 tasks (1, 2): 48 images, 4 steps, about" in line for line in said)
    assert said[-1].startswith("error: --yes: relearning has to be agreed to")
    assert not (path / "unlearning").exists()
    assert command(["unlearn", str(path), "--task", "0", "--yes"]) == 0
    assert "forgotten by rollback, level E-bit" in capsys.readouterr().out


def test_a_deletion_that_is_not_exact_says_what_is_left(trained, capsys):
    path = trained("finetune")
    capsys.readouterr()
    assert command(["unlearn", str(path), "--task", "1", "--method", "drop", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["level"] == "approximate" and made["leaks"]


def test_wrong_words_end_in_one_line(trained, capsys, tmp_path):
    path = trained("nmc")
    capsys.readouterr()
    for words, said in [
        (["--task", "9"], "error: --task=9: unknown"),
        (["--task", "1", "--method", "magic"], "error: --method=magic: unknown"),
        (["--task", "1", "--accept", "all"], "error: --accept=all: must be E-bit or E-law"),
        ([], "error: --task: no request was left open"),
    ]:
        assert command(["unlearn", str(path), *words]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith(said), lines
    assert command(["unlearn", str(tmp_path), "--task", "1"]) == 2
    assert not (path / "unlearning").exists()


def test_a_run_folder_in_use_is_refused(trained, capsys):
    from cl_platform.run_folder import RunFolder

    path = trained("nmc")
    capsys.readouterr()
    held = RunFolder(path)
    try:
        assert command(["unlearn", str(path), "--task", "1"]) == 2
    finally:
        held.close()
    assert "another run is writing to it" in capsys.readouterr().err


def test_a_forgotten_task_is_not_forgotten_again(trained, capsys):
    path = trained("nmc")
    assert command(["unlearn", str(path), "--task", "1"]) == 0
    capsys.readouterr()
    assert command(["unlearn", str(path), "--task", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --task=1: is forgotten already")


def test_a_request_in_the_stream_is_carried_out_between_two_tasks(trained, capsys):
    path = trained("nmc", "unlearning.requests=[{after_task: 1, forget: 0}]")
    rows = [line.split(",") for line in (path / "accuracy_matrix.csv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["after_task", "0", "1", "2"]
    assert rows[2][1] != "NaN" and rows[3][1] == "NaN"
    assert "task 0 is forgotten by drop" in capsys.readouterr().err
