"""What a person gets who hides the bounds between tasks."""

import csv
import json

import pytest

from cl_platform.cli.train import train
from cl_platform.metrics.continual_log import parse

pytestmark = pytest.mark.usefixtures("tiny_backbone")

HIDDEN = "scenario.boundaries=hidden"
SMALL = ["scenario.train_per_class=6", "scenario.test_per_class=6", "trainer.batch_size=10"]


def filled(run):
    rows = list(csv.reader((run / "accuracy_matrix.csv").read_text().splitlines()))[1:]
    return [sum(cell != "NaN" for cell in row[1:]) for row in rows]


def test_replay_runs_and_is_evaluated_task_by_task(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["strategy=er", "scenario=split_digits", HIDDEN, *SMALL, "trainer.max_epochs=2", f"run_dir={run}"]
    assert train([*words, "logger=[]"]) == 0
    assert "final average accuracy" in capsys.readouterr().out
    assert filled(run) == [1, 2, 3, 4, 5]
    metrics = json.loads((run / "metrics.json").read_text())
    for key in ("acc", "forgetting", "bwt", "min_acc", "wc_acc"):
        assert metrics[key]["value"] is not None, key
    cost = json.loads((run / "cost.json").read_text())
    assert cost["images_trained"] == 5 * 12 * 2
    assert cost["updates"] == 12
    log = parse((run / "continual_eval.csv").read_text())
    assert not log.bad_rows
    assert {(row.position, row.task_id) for row in log.rows} == {(t, t) for t in range(5)}
    assert sorted({row.global_step for row in log.rows if row.event == "end"}) == [3, 5, 8, 10, 12]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["task_4"]
    assert (run / "report.html").stat().st_size > 0


def test_the_learner_sees_one_task_without_a_bound_in_it(small_run, tmp_path, monkeypatch):
    from cl_platform.learner import ContinualLearner

    calls = []
    for name in ("begin_task", "end_task", "configure_optimizers"):
        real = getattr(ContinualLearner, name)

        def spy(self, *args, _name=name, _real=real, **kwargs):
            calls.append(_name)
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(ContinualLearner, name, spy)
    result = small_run("strategy=er", HIDDEN, "trainer.max_epochs=2", f"run_dir={tmp_path / 'run'}", "logger=[]")
    assert calls == ["begin_task", "configure_optimizers", "end_task"]
    assert result.learner.context.num_tasks == 1
    assert result.learner.context.num_classes == 10
    assert not result.learner.context.boundaries
    assert [task.task_id for task in result.stream.tasks] == [0, 1, 2, 3, 4]
    assert set(result.learner.composition.strategies[0].buffer.owners()) == {0}


def test_watching_or_not_the_weights_are_the_same(small_run, tmp_path):
    words = ("strategy=er", HIDDEN, "scenario.skip_tasks=[3,4]", "trainer.batch_size=10", "logger=[]")
    for grid in ("off", "every_step"):
        small_run(*words, f"evaluation={grid}", f"run_dir={tmp_path / grid}")
    one, other = (tmp_path / grid / "checkpoints/task_2/model.safetensors" for grid in ("off", "every_step"))
    assert one.read_bytes() == other.read_bytes()


def test_tasks_smaller_than_a_batch_are_all_evaluated(small_run, tmp_path):
    run = tmp_path / "run"
    small_run(
        "strategy=finetune",
        HIDDEN,
        "scenario.train_per_class=3",
        "trainer.batch_size=16",
        f"run_dir={run}",
        "logger=[]",
    )
    assert filled(run) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["joint", "linear_probe", "nmc", "online_lora"])
def test_closed_forms_joint_training_and_probes_end_with_all_tasks_evaluated(name, small_run, tmp_path):
    run = tmp_path / "run"
    result = small_run(
        f"strategy={name}", HIDDEN, "scenario.train_per_class=3", "scenario.test_per_class=3", "trainer.batch_size=10",
        "evaluation=boundaries", f"run_dir={run}", "logger=[]",
    )  # fmt: skip
    assert filled(run) == ([1, 2, 3, 4, 5] if name in ("linear_probe", "online_lora") else [0, 0, 0, 0, 5])
    assert result.learner.seen_classes() == list(range(10))


def test_a_strategy_that_needs_bounds_is_refused_in_one_line(tmp_path, capsys):
    assert train(["strategy=ewc", HIDDEN, f"run_dir={tmp_path / 'run'}", "logger=[]"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "scenario.boundaries=hidden: ewc has to be told" in line
    assert ", er, " in line
    assert not (tmp_path / "run").exists()


def test_never_drawing_the_current_task_is_refused_where_all_is_the_current_task(tmp_path, capsys):
    words = ["strategy=er", "strategy.er.exclude_current=true", HIDDEN, f"run_dir={tmp_path / 'run'}"]
    assert train(words) == 2
    assert "strategy.er.exclude_current=true" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_again(small_run, tmp_path):
    words = ("strategy=er", HIDDEN, "scenario.skip_tasks=[3,4]", f"run_dir={tmp_path / 'run'}", "logger=[]")
    small_run(*words)
    before = (tmp_path / "run" / "accuracy_matrix.csv").read_bytes()
    small_run(*words, "resume=auto")
    assert (tmp_path / "run" / "accuracy_matrix.csv").read_bytes() == before
