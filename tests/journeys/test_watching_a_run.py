"""A person turns continual evaluation up, down and off, and looks at what it left."""

import json
import logging

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import SHAPED

from cl_platform.cli.train import train
from cl_platform.errors import UserError
from cl_platform.metrics.continual_log import Curves, parse

pytestmark = pytest.mark.usefixtures("tiny_backbone")

FAST = ("strategy=linear_probe", "trainer.batch_size=8")  # 5 tasks x 3 updates
CODA = (
    "strategy=coda_prompt", "strategy.coda_prompt.num_components=10", f"strategy.coda_prompt.layers={SHAPED['layers']}",
)  # fmt: skip
THREE = "scenario.skip_tasks=[3,4]"


def offsets(run, position):
    log = parse((run / "continual_eval.csv").read_text())
    assert not log.bad_rows
    curves = Curves.of(log, "cil")
    found = [
        e.step - curves.begins[position] for e in curves.evaluations if (e.position, e.event) == (position, "step")
    ]
    assert curves.boundary(position, "start") is not None
    assert curves.boundary(position, "end") is not None
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("evaluation=every_step",), [1, 2, 3]),
        (("evaluation=every", "evaluation.k=2"), [2, 3]),
        (("evaluation=boundaries",), []),
        (("evaluation=adaptive", "evaluation.min_per_task=2"), [1, 3]),
    ],
)
def test_each_grid_looks_at_its_updates(small_run, tmp_path, words, expected):
    result = small_run(*FAST, *words, THREE, f"run_dir={tmp_path / 'run'}", "logger=[]")
    assert [offsets(result.path, k) for k in range(3)] == [expected] * 3
    assert result.metrics["continual"]["evaluations"] == 3 * len(expected)
    assert result.metrics["continual"]["bad_rows"] == []


def test_off_leaves_no_curves_and_says_why(small_run, tmp_path):
    result = small_run(*FAST, "evaluation=off", THREE, f"run_dir={tmp_path / 'run'}", "logger=[]")
    assert not (result.path / "continual_eval.csv").exists()
    assert result.metrics["min_acc"] == {**result.metrics["min_acc"], "value": None, "reason": "evaluation_off"}
    assert result.metrics["acc"]["value"] is not None


def test_joint_training_has_no_gaps_and_says_why(small_run, tmp_path):
    result = small_run("strategy=joint", f"run_dir={tmp_path / 'run'}", "logger=[]")
    assert result.metrics["gap_depth"]["reason"] == "joint_trains_once"
    assert result.metrics["gaps"] == []


def test_a_subset_larger_than_a_task_is_said_once(small_run, tmp_path):
    logging.getLogger("cl_platform").setLevel(logging.INFO)  # as the command does
    result = small_run(*FAST, "evaluation.images_per_task=500", f"run_dir={tmp_path / 'run'}", "logger=[]")
    text = (result.path / "run.log").read_text()
    assert text.count("evaluation.images_per_task=500") == 1
    assert "all of which are used" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evaluation=every", "evaluation.k=0"], "evaluation.k=0"),
        (["evaluation.images_per_task=0"], "evaluation.images_per_task=0"),
        (["evaluation.images_per_task=many"], "evaluation.images_per_task=many"),
        (["evaluation.gap_tolerance=2"], "evaluation.gap_tolerance=2"),
        (["evaluation.max_overhead=0"], "evaluation.max_overhead=0"),
        (["evaluation=evry_step"], "every_step"),
        (["diagnostics.gradients=on"], "diagnostics.gradients=on"),
    ],
)
def test_a_wrong_key_is_one_line(words, expected, capsys, tmp_path):
    assert train([*words, f"run_dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_the_same_weights_with_evaluation_on_and_off(small_run, tmp_path):
    words = (*CODA, THREE, "logger=[]", "diagnostics.gradients=switch")
    for name in ("every_step", "off"):
        small_run(f"evaluation={name}", f"run_dir={tmp_path / name}", *words)
    on, off = (tmp_path / name / "checkpoints" / "task_2" / "model.safetensors" for name in ("every_step", "off"))
    assert on.read_bytes() == off.read_bytes()
    lines = (tmp_path / "off" / "gradients.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 2


def test_metrics_follow_from_the_log_alone(small_run, tmp_path):
    result = small_run(*FAST, "evaluation=every_step", f"run_dir={tmp_path / 'run'}", "logger=[]")
    curves = Curves.of(parse((result.path / "continual_eval.csv").read_text()), "cil")
    lows = []
    for j in range(4):
        lows.append(min(right / total for step, (right, total) in curves.visited(j).items() if step > curves.ends[j]))
    assert result.metrics["min_acc"]["value"] == pytest.approx(sum(lows) / 4)
    assert result.metrics["min_acc"]["per_task"][:4] == pytest.approx(lows)
    assert len(result.metrics["gaps"]) == 10
    confusion = json.loads((result.path / "confusion.json").read_text())
    assert [len(after["counts"]) for after in confusion["after"]] == [2, 4, 6, 8, 10]
    right = sum(row[i] for i, row in enumerate(confusion["after"][-1]["counts"]))
    assert right / 60 == pytest.approx(result.metrics["acc_samples"]["value"])


def test_tensorboard_holds_curves_zooms_figures_and_comparable_runs(small_run, tmp_path):
    words = ("evaluation=every_step", "report.tensorboard_figures=true", "logger=[tensorboard]")
    result = small_run(*FAST, *words, f"run_dir={tmp_path / 'run'}")
    events = EventAccumulator(str(result.path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    scalars = "accuracy/task_00 accuracy/seen_mean continual/min_acc continual/wc_acc continual/aaa switch/task"
    more = "gap/depth_switch_01 hparam/acc hparam/min_acc calibration/ece_15"
    for tag in f"{scalars} {more}".split():
        assert tag in tags["scalars"]
    for tag in ("matrix/accuracy", "confusion/after_task_04", "gap_figure/switch_02"):
        assert tag in tags["images"]
    assert "custom_scalars__config__" in tags["tensors"]
    assert [e.step for e in events.Scalars("gap_zoom/switch_01/task_00")] == [-1, 1, 2, 3]
    assert [e.step for e in events.Scalars("accuracy/task_04")] == [13, 14, 15, 15]


def test_a_resume_finds_the_grid_where_it_was(small_run, tmp_path, monkeypatch):
    words = ("strategy=linear_probe", "trainer.batch_size=2", "trainer.max_epochs=3", THREE, "logger=[]")
    whole = small_run(*words, f"run_dir={tmp_path / 'whole'}")
    import cl_platform.run as spine

    real, saved = spine.RunFolder.save_checkpoint, []

    def stop_after_two(self, *rest):
        path = real(self, *rest)
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(spine.RunFolder, "save_checkpoint", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        small_run(*words, f"run_dir={tmp_path / 'cut'}")
    log = tmp_path / "cut" / "continual_eval.csv"
    log.write_text(log.read_text() + "72,2,2,0,start,0,cil,1,6\n73,2,2,0,st")  # what a killed process may leave
    monkeypatch.setattr(spine.RunFolder, "save_checkpoint", real)
    small_run(*words, f"run_dir={tmp_path / 'cut'}", "resume=auto")
    assert log.read_bytes() == (whole.path / "continual_eval.csv").read_bytes()
    assert (tmp_path / "cut" / "metrics.json").read_bytes() == (whole.path / "metrics.json").read_bytes()


def test_a_loss_that_explodes_leaves_the_rows_so_far(small_run, tmp_path):
    with pytest.raises(UserError, match=r"optimizer.lr=1e\+30"):
        small_run("strategy=finetune", "optimizer.lr=1e30", f"run_dir={tmp_path / 'run'}", "logger=[]")
    log = parse((tmp_path / "run" / "continual_eval.csv").read_text())
    assert log.rows
    assert not log.bad_rows
