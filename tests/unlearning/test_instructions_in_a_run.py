"""A run that follows instructions: learn for good or temporarily, take over, forget."""

import json

import pytest
from shelf import learn, newest

from cl_platform.errors import UserError
from cl_platform.run_folder import checkpoint_positions
from cl_platform.unlearning.canonical import compare_files

pytestmark = pytest.mark.usefixtures("tiny_backbone")

CLPU = ("strategy=[clpu,derpp]", "strategy.clpu.per_task=4", "strategy.clpu.memory_batch=4")


def test_a_task_learnt_temporarily_and_forgotten_leaves_no_byte(tmp_path):
    run, reference = tmp_path / "run", tmp_path / "reference"
    result = learn(run, *CLPU, "unlearning.sequence='R0 T1 T2 R1 F2 T3 F3'")
    learn(reference, *CLPU, "unlearning.sequence='R0 T1 R1'")
    assert checkpoint_positions(run)[-1] == 3
    found = compare_files(newest(run), newest(reference))
    assert found.equal, found.differences
    assert result.metrics["tasks"] == [0, 1]
    told = json.loads((run / "instructions.json").read_text())
    assert [(e["instruction"], sorted(map(int, e["right_of"]["cil"]))) for e in told["after"]] == [
        ("R0", [0]), ("T1", [0, 1]), ("T2", [0, 1, 2]), ("R1", [0, 1, 2]), ("F2", [0, 1]), ("T3", [0, 1, 3]),
        ("F3", [0, 1]),
    ]  # fmt: skip
    assert set(told["averages"]) == {"cil", "til"}
    assert 0 <= told["averages"]["til"]["accuracy"] <= 1
    certificates = [json.loads(path.read_text()) for path in (run / "unlearning").glob("certificate_*.json")]
    assert sorted((c["target"]["task_id"], c["level"], c["target"]["trigger"]) for c in certificates) == [
        (2, "E-bit", "sequence"), (3, "E-bit", "sequence"),
    ]  # fmt: skip


def test_an_interrupted_sequence_goes_on_where_it_was(tmp_path, monkeypatch):
    from cl_platform.run import Course

    words = (*CLPU, "unlearning.sequence='R0 T1 R1 T2 F2'")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    learn(whole, *words)
    real = Course.evaluate

    def stop(self, phase):
        if phase.position == 2:
            raise KeyboardInterrupt
        real(self, phase)

    with monkeypatch.context() as patched:
        patched.setattr(Course, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            learn(stopped, *words)
    learn(stopped, *words, "resume=auto")
    assert compare_files(newest(whole), newest(stopped)).equal
    for name in ("accuracy_matrix.csv", "instructions.json"):
        assert (whole / name).read_text() == (stopped / name).read_text()


@pytest.mark.parametrize(
    "words, said",
    [
        ((*CLPU, "unlearning.sequence='R0 F0'"), "cannot be obeyed: task 0 is learnt for good"),
        ((*CLPU, "unlearning.sequence='R0 T9'"), "a task that the stream does not have"),
        (("strategy=linear_probe", "unlearning.sequence='R0 T1'"), "cannot hold a task temporarily"),
        ((*CLPU, "unlearning.sequence='R0'", "unlearning.requests=[{after_task: 0, forget: 0}]"), "Set one of the two"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_before_the_run(tmp_path, words, said):
    with pytest.raises(UserError, match=said):
        learn(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
