"""Reading a run folder: what is there, what is missing, what is damaged."""

import json

import pytest
from run_folders import Made, write_run

from cl_platform.errors import UserError
from cl_platform.metrics.continual_log import HEADER
from cl_platform.report.run_view import read_run


@pytest.fixture
def finished(tmp_path):
    return write_run(tmp_path / "run", Made(tasks=3, space="dil", scenario="rotated_digits"))


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        read_run(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_finished_run_is_read_whole(finished):
    view = read_run(finished)
    assert view.name == "finetune on rotated_digits, seed 0"
    assert view.primary == "dil"
    assert view.task_ids == (0, 1, 2)
    assert [len(row) for row in view.matrix] == [3, 3, 3]
    assert view.matrix[0][1] is None
    assert view.matrix[2][0] == pytest.approx(view.metrics["acc"]["per_task"][0])
    assert view.log is not None
    assert not view.log.bad_rows
    assert view.cost["seconds"]["train"] == 31.4
    assert view.environment["backbone"]["tag"] == "vit_nano"
    assert view.confusion["after"][2]["task_id"] == 2


def test_a_composition_is_named_by_all_its_strategies(tmp_path):
    path = write_run(tmp_path / "run")
    text = (path / "config.yaml").read_text().replace("  finetune:", "  derpp:\n    alpha: 0.5\n  bfp:")
    (path / "config.yaml").write_text(text)
    assert read_run(path).name == "derpp+bfp on split_digits, seed 0"


@pytest.mark.parametrize("space", ["cil", "dil", "til"])
def test_the_gaps_are_those_of_the_scenarios_own_space(tmp_path, space):
    view = read_run(write_run(tmp_path / "run", Made(space=space)))
    assert [(pair.k, pair.j) for pair in view.pairs()] == [(1, 0), (2, 0), (2, 1)]
    curves = view.curves()
    assert curves is not None
    assert curves.begins == (0, 60, 120)
    depths = [pair.depth for pair in view.pairs()]
    assert sum(depths) / 3 == pytest.approx(view.metrics["gap_depth"]["value"])


def test_window_and_tolerance_are_those_of_the_config(finished):
    text = (finished / "config.yaml").read_text()
    whole = read_run(finished).pairs()
    text = text.replace("gap_window: null", "gap_window: 3").replace("gap_tolerance: 0.02", "gap_tolerance: 0.9")
    (finished / "config.yaml").write_text(text)
    assert all(pair.low_offset <= 3 for pair in read_run(finished).pairs())
    assert any(pair.low_offset > 3 for pair in whole)
    assert {pair.status for pair in read_run(finished).pairs()} == {"no_gap"}


@pytest.mark.parametrize("text", [None, HEADER])
def test_without_evaluations_there_is_no_log(finished, text):
    if text is None:
        (finished / "continual_eval.csv").unlink()
    else:
        (finished / "continual_eval.csv").write_text(text)
    view = read_run(finished)
    assert view.log is None
    assert view.curves() is None
    assert view.pairs() == []


def test_a_space_without_rows_has_no_curves(finished):
    assert read_run(finished).curves("cil") is None


def test_a_torn_last_line_is_named_and_the_rest_used(finished):
    whole = read_run(finished)
    with open(finished / "continual_eval.csv", "ab") as file:
        file.write(b"180,2,2,0,st\xff")
    view = read_run(finished)
    assert len(view.log.rows) == len(whole.log.rows)
    assert [row.reason for row in view.log.bad_rows] == ["truncated: does not end in a line feed"]


def test_a_running_run_has_what_was_written_so_far(tmp_path):
    view = read_run(write_run(tmp_path / "run", Made(tasks=3, finished=False)))
    assert view.metrics == {}
    assert view.cost == {}
    assert len(view.matrix) == 2
    assert view.task_ids == (0, 1, 2)
    assert len(view.pairs()) == 3


def test_only_the_config_is_needed(tmp_path):
    path = write_run(tmp_path / "run")
    for file in path.iterdir():
        if file.name != "config.yaml":
            file.unlink()
    view = read_run(path)
    assert view.primary == "cil"
    assert view.task_ids == ()
    assert view.matrix == []
    assert view.pairs() == []


def test_tasks_before_the_first_evaluation_come_from_the_environment(tmp_path):
    path = write_run(tmp_path / "run", Made(tasks=4))
    (path / "accuracy_matrix.csv").unlink()
    (path / "continual_eval.csv").unlink()
    assert read_run(path).task_ids == (0, 1, 2, 3)


def test_a_forgotten_task_leaves_the_curves(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    metrics["tasks"] = [0, 2]
    (finished / "metrics.json").write_text(json.dumps(metrics))
    view = read_run(finished)
    assert view.forgotten == {1}
    assert view.curves().kept == (0, 2)


@pytest.mark.parametrize("reason", ["joint_trains_once", "starts_afresh"])
def test_a_run_without_switches_has_no_gaps(finished, reason):
    metrics = json.loads((finished / "metrics.json").read_text())
    metrics["gap_depth"] = {**metrics["gap_depth"], "value": None, "reason": reason}
    (finished / "metrics.json").write_text(json.dumps(metrics))
    view = read_run(finished)
    assert view.no_switches == reason
    assert view.pairs() == []


def test_the_row_of_the_untrained_model_is_no_task_end(finished):
    lines = (finished / "accuracy_matrix.csv").read_text().splitlines()
    (finished / "accuracy_matrix.csv").write_text("\n".join([lines[0], "init,0.1,0.1,NaN", *lines[1:]]) + "\n")
    assert len(read_run(finished).matrix) == 3


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    assert "holds no config.yaml" in refusal(tmp_path)


def test_a_folder_of_runs_names_its_newest(tmp_path):
    path = write_run(tmp_path / "outputs" / "split_digits" / "finetune" / "2026-01-01_120000")
    assert f"Its newest run is {path}" in refusal(tmp_path / "outputs")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("metrics.json", "{", "metrics.json cannot be understood"),
        ("metrics.json", "[]", "no JSON object"),
        ("config.yaml", "a: [", "config.yaml cannot be understood"),
        ("config.yaml", "- 1", "no mapping"),
        ("accuracy_matrix.csv", "after_task,task_0\n0,abc\n", "accuracy_matrix.csv cannot be understood"),
        ("accuracy_matrix.csv", "after_task,task_0\n0,0.5,0.5\n", "rows of different lengths"),
        ("continual_eval.csv", "step,task\n1,2\n", "the first line is not"),
    ],
)
def test_a_damaged_file_is_named(finished, name, content, said):
    (finished / name).write_text(content)
    assert said in refusal(finished)
