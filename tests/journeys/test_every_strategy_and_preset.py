"""Every registered strategy trains on every kind of scenario; every preset composes."""

import dataclasses
import json
import re
import shutil

import pytest
from tiny import SHAPED, answers, first_step, images_of, tiny_vit, trainer_for

import cl_platform.strategies  # noqa: F401
from cl_platform import building, registry
from cl_platform.cli.compose import compose, groups
from cl_platform.cli.sweep import with_experiment
from cl_platform.run_config import parse
from cl_platform.scenarios import build_stream
from cl_platform.strategies import build_strategies


def beside(name):
    """The strategy as one types it, after a replay strategy where it needs one."""
    return f"[er,{name}]" if registry.strategies.get(name).needs.buffer else name


def quick(name):
    """Few updates where a strategy trains outside the stream's batches."""
    fields = {field.name for field in dataclasses.fields(registry.strategies.get(name).Config)}
    return [
        f"strategy.{name}.{key}={value}"
        for key, value in (("steps", 3), ("passes", 2), ("fisher_samples", 8))
        if key in fields
    ]


def shaped(name):
    """Keys that fit the strategy to the tiny trunk."""
    fields = {field.name for field in dataclasses.fields(registry.strategies.get(name).Config)}
    keys = ("num_components", "projections", "layers", "g_layers", "e_layers")
    return [f"strategy.{name}.{key}={SHAPED[key]}" for key in keys if key in fields]


BRIEF = (
    "scenario.num_tasks=2", "scenario.train_per_class=4", "scenario.test_per_class=2", "evaluation=boundaries",
    "logger=[]",
)  # fmt: skip


THREE = "scenario.skip_tasks=[3,4]"


@pytest.mark.parametrize("name", registry.strategies.names())
def test_what_is_recommended_for_a_strategy_fits_the_default_backbone(name):
    config = parse(compose([f"strategy={beside(name)}", *quick(name), *BRIEF, "trainer.accelerator=cpu"]))
    stream = build_stream(config.scenario, config.data, config.seed)
    learner, task = building.build_learner(config, stream), stream.tasks[0]
    learner.trainer = trainer_for(config)
    learner.begin_task(task, 1)
    if learner.composition.needs_gradient:
        _, terms = first_step(learner, task, 4)
        assert terms and all(bool(value.isfinite()) for value in terms.values())
    learner.end_task(task)
    assert bool(answers(learner, images_of(stream)[:4]).isfinite().all())


@pytest.mark.parametrize("name", registry.strategies.names())
def test_a_strategy_learns_tasks_with_the_same_classes(name, small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "build_backbone", lambda config, seed: tiny_vit())
    words = (f"strategy={beside(name)}", *quick(name), *shaped(name), *BRIEF)
    result = small_run(*words, "scenario=rotated_digits", f"run_dir={tmp_path / 'run'}")
    assert result.metrics["acc_dil"]["value"] is not None
    assert result.learner.seen_classes() == list(range(10))


@pytest.mark.parametrize("name", registry.strategies.names())
def test_a_strategy_learns_new_classes_and_a_run_cut_off_after_a_task_ends_with_the_same_bytes(
    name, small_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(building, "build_backbone", lambda config, seed: tiny_vit())
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    overrides = (f"strategy={beside(name)}", *quick(name), *shaped(name), *BRIEF)
    result = small_run(*overrides, f"run_dir={whole}")
    assert result.metrics["acc_cil"]["value"] is not None
    assert result.learner.seen_classes() == list(range(10))
    assert json.loads((whole / "metrics.json").read_text()) == result.metrics
    shutil.copytree(whole, cut)
    (cut / "metrics.json").unlink()
    checkpoints = sorted((cut / "checkpoints").iterdir())
    for later in checkpoints[1:] if len(checkpoints) > 1 else checkpoints:
        shutil.rmtree(later)
    small_run(*overrides, f"run_dir={cut}", "resume=auto")
    for file in ("metrics.json", "accuracy_matrix.csv", "checkpoints/task_1/model.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("setting", ["class", "task"])
def test_task_incremental_answers_are_given_within_the_task(setting, small_run, tmp_path):
    words = ("strategy=nmc", "scenario.num_tasks=2", "logger=[]")
    result = small_run(*words, f"scenario.setting={setting}", f"run_dir={tmp_path / 'run'}")
    assert result.metrics["acc_til"]["value"] >= result.metrics["acc_cil"]["value"]
    assert result.metrics["acc"]["space"] == ("til" if setting == "task" else "cil")


def test_an_online_scenario_passes_over_each_task_once(small_run, tmp_path):
    words = ("strategy=finetune", "scenario.online=true", "trainer.max_epochs=3", THREE)
    result = small_run(*words, f"run_dir={tmp_path / 'run'}")
    assert result.cost["images_trained"] == 3 * 24


@pytest.mark.parametrize("mode", ["once", "scratch", "continue"])
def test_joint_modes_fill_their_rows(mode, small_run, tmp_path):
    words = ("strategy=joint", f"strategy.joint.mode={mode}", THREE, "logger=[]")
    result = small_run(*words, f"run_dir={tmp_path / 'run'}")
    rows = (tmp_path / "run" / "accuracy_matrix.csv").read_text().splitlines()[1:]
    filled = [sum(cell != "NaN" for cell in row.split(",")[1:]) for row in rows]
    assert filled == ([0, 0, 3] if mode == "once" else [1, 2, 3])
    assert (result.metrics["forgetting"]["value"] is None) == (mode == "once")
    if mode == "once":
        assert result.metrics["forgetting"]["reason"] == "joint_trains_once"


@pytest.mark.parametrize("preset", groups()["experiment"])
def test_a_preset_composes_into_a_valid_configuration(preset):
    config = parse(compose([f"experiment={preset}"]))
    build_strategies(config.strategy)
    if config.backbone.kind == "resnet18_cifar":
        assert config.optimizer.name == "sgd"
        assert config.trainer.batch_size == 32
    elif preset not in ("smoke_grid", "mir_cifar10"):
        assert config.backbone.input_norm == "unit"
        assert config.trainer.batch_size == 128
        assert config.trainer.drop_last


def test_the_smoke_grid_runs_every_strategy():
    (words,) = [w for w in with_experiment(["experiment=smoke_grid"]) if w.startswith("strategy=")]
    named = set(re.findall(r"[a-z0-9_]+", words.partition("=")[2]))
    assert named == set(registry.strategies.names())


@pytest.mark.parametrize("scenario", groups()["scenario"])
def test_every_scenario_is_a_valid_configuration(scenario):
    assert parse(compose([f"scenario={scenario}"])).scenario.kind in registry.scenarios


@pytest.mark.parametrize("backbone", groups()["backbone"])
def test_every_backbone_is_a_valid_configuration(backbone):
    assert parse(compose([f"backbone={backbone}"])).backbone.kind in registry.backbones
