"""Every registered strategy trains on every kind of scenario; every preset composes."""

import json
import shutil

import pytest

import cl_platform.strategies  # noqa: F401
from cl_platform import registry
from cl_platform.cli.compose import compose, groups
from cl_platform.run_config import parse


@pytest.mark.parametrize("name", registry.strategies.names())
@pytest.mark.parametrize("scenario", ["split_digits", "rotated_digits"])
def test_a_strategy_learns_a_stream(name, scenario, small_run, tmp_path):
    result = small_run(
        f"strategy={name}",
        f"scenario={scenario}",
        "scenario.train_per_class=6",
        f"run_dir={tmp_path / 'run'}",
        "logger=[]",
    )
    space = "cil" if scenario == "split_digits" else "dil"
    assert result.metrics[f"acc_{space}"]["value"] is not None
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == result.metrics
    assert result.learner.seen_classes() == list(range(10))


@pytest.mark.parametrize("setting", ["class", "task"])
def test_task_incremental_answers_are_given_within_the_task(setting, small_run, tmp_path):
    result = small_run("strategy=nmc", f"scenario.setting={setting}", f"run_dir={tmp_path / 'run'}", "logger=[]")
    assert result.metrics["acc_til"]["value"] >= result.metrics["acc_cil"]["value"]
    assert result.metrics["acc"]["space"] == ("til" if setting == "task" else "cil")


def test_an_online_scenario_passes_over_each_task_once(small_run, tmp_path):
    result = small_run(
        "strategy=finetune", "scenario.online=true", "trainer.max_epochs=3", f"run_dir={tmp_path / 'run'}"
    )
    assert result.cost["images_trained"] == 5 * 24


@pytest.mark.parametrize("mode", ["once", "scratch", "continue"])
def test_joint_modes_fill_their_rows(mode, small_run, tmp_path):
    result = small_run("strategy=joint", f"strategy.joint.mode={mode}", f"run_dir={tmp_path / 'run'}", "logger=[]")
    rows = (tmp_path / "run" / "accuracy_matrix.csv").read_text().splitlines()[1:]
    filled = [sum(cell != "NaN" for cell in row.split(",")[1:]) for row in rows]
    assert filled == ([0, 0, 0, 0, 5] if mode == "once" else [1, 2, 3, 4, 5])
    assert (result.metrics["forgetting"]["value"] is None) == (mode == "once")
    if mode == "once":
        assert result.metrics["forgetting"]["reason"] == "joint_trains_once"


@pytest.mark.parametrize("preset", groups()["experiment"])
def test_a_preset_composes_into_a_valid_configuration(preset):
    config = parse(compose([f"experiment={preset}"]))
    assert config.backbone.input_norm == "unit"
    assert config.trainer.batch_size == 128
    assert config.trainer.drop_last


@pytest.mark.parametrize("scenario", groups()["scenario"])
def test_every_scenario_is_a_valid_configuration(scenario):
    assert parse(compose([f"scenario={scenario}"])).scenario.kind in registry.scenarios


@pytest.mark.parametrize("backbone", groups()["backbone"])
def test_every_backbone_is_a_valid_configuration(backbone):
    assert parse(compose([f"backbone={backbone}"])).backbone.kind in registry.backbones


@pytest.mark.parametrize("name", registry.strategies.names())
def test_a_run_cut_off_after_a_task_ends_with_the_same_bytes(name, small_run, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    overrides = (f"strategy={name}", "scenario.train_per_class=6", "logger=[]")
    small_run(*overrides, f"run_dir={whole}")
    shutil.copytree(whole, cut)
    (cut / "metrics.json").unlink()
    checkpoints = sorted((cut / "checkpoints").iterdir())
    for later in checkpoints[2:] if len(checkpoints) > 2 else checkpoints:
        shutil.rmtree(later)
    small_run(*overrides, f"run_dir={cut}", "resume=auto")
    for file in ("metrics.json", "accuracy_matrix.csv", "checkpoints/task_4/model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file
