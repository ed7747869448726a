"""Several runs from one command, and their table."""

import io
import os

import pytest
from rich.console import Console

from cl_platform.cli.compose import compose
from cl_platform.cli.sweep import DESK, Outcome, closing_table, outcomes_on, with_experiment
from cl_platform.cli.train import train
from cl_platform.errors import UserError

QUICK = ["strategy=nmc", "scenario.train_per_class=4", "scenario.test_per_class=2", "trainer.progress=false"]
BARE = ["logger=[]", "report.html=false", "evaluation=off"]


def shown(outcomes, width=80):
    console = Console(width=width, record=True, color_system=None, file=io.StringIO())
    console.print(closing_table(outcomes))
    return console.export_text()


def outcome(words, accuracy=0.5, forgetting=0.25, seconds=2.0):
    return Outcome(tuple(words.split()), {"acc": accuracy, "forgetting": forgetting}, seconds)


def test_an_experiment_that_sweeps_becomes_a_sweep():
    words = with_experiment(["experiment=smoke_grid", "seed=1"])
    assert words[0] == "-m" and words[1:3] == ["experiment=smoke_grid", "seed=1"]
    assert any(word.startswith("strategy=finetune,") for word in words)
    assert "scenario=split_digits,rotated_digits" in words


def test_a_key_that_the_user_gave_is_not_swept_over():
    words = with_experiment(["experiment=smoke_grid", "strategy=er", "scenario=split_digits"])
    assert words == ["experiment=smoke_grid", "strategy=er", "scenario=split_digits"]
    assert with_experiment(["-m", "experiment=smoke_grid", "strategy=er,der"]).count("-m") == 1


def test_other_words_stay_as_they_are():
    for words in (["strategy=er"], ["experiment=nope"], ["experiment=coda_prompt_cifar100"], ["experiment=null"]):
        assert with_experiment(words) == words
    assert with_experiment(["experiment=smoke_grid", "--cfg", "job"]) == ["experiment=smoke_grid", "--cfg", "job"]


def test_a_row_per_setting_a_column_per_scenario_and_the_spread_over_seeds():
    outcomes = [
        outcome(f"strategy={strategy} scenario={scenario} seed={seed}", accuracy)
        for strategy, accuracies in (("er", (0.5, 0.6)), ("[er,bfp]", (0.7, 0.7)))
        for scenario in ("split_digits", "rotated_digits")
        for seed, accuracy in enumerate(accuracies)
    ]
    lines = shown(outcomes).splitlines()
    assert "split_digits" in lines[1] and "rotated_digits" in lines[1]
    (er,) = [line for line in lines if line.startswith("er ")]
    assert er.split("8")[0].count("55.0 ± 7.1 / 25.0 ± 0.0") == 2
    assert any(line.startswith("[er,bfp]") for line in lines)
    assert all(len(line) <= 80 for line in lines)


def test_a_failed_run_is_a_failed_cell_and_an_undefined_number_a_dash():
    failed = Outcome(("strategy=lora", "seed=0"), failure="strategy.lora: needs a ViT. Choose one.")
    text = shown([failed, outcome("strategy=joint seed=0", 0.9, None)])
    assert "failed" in text and "90.0 / -" in text
    assert failed.line == "strategy=lora seed=0: strategy.lora: needs a ViT. Choose one."
    assert outcome("experiment=smoke_grid strategy=er").line == "strategy=er: accuracy 50.0, forgetting 25.0, 2.0 s"


def test_an_experiment_that_sweeps_is_not_one_of_several():
    with pytest.raises(UserError, match="smoke_grid is a sweep of its own"):
        with_experiment(["-m", "experiment=er_cifar10,smoke_grid"])


def test_outcomes_come_back_in_the_order_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.setenv(DESK, str(tmp_path))
    left = [outcome(f"seed={seed}", seed / 10) for seed in range(12)]
    for number in (11, *range(11)):
        left[number].leave(number)
    assert outcomes_on(tmp_path) == left


def test_a_refused_run_does_not_stop_the_others_and_decides_the_exit_code(capsys):
    words = ["-m", *QUICK, *BARE, "backbone=resnet18_slim", "strategy=lora,nmc"]
    assert train([word for word in words if word != "strategy=nmc"]) == 2
    shown = capsys.readouterr()
    assert "error: strategy=lora" in shown.err
    assert "failed" in shown.out and "Sweep" in shown.out and "strategy=nmc: accuracy" in shown.out
    assert DESK not in os.environ


def test_runs_in_processes_of_their_own_come_into_the_same_table(capfd):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = ["-m", *QUICK, *BARE, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"]
    assert train(words) == 0
    assert "±" in capfd.readouterr().out


def test_settings_of_single_strategies_reach_those_that_are_chosen():
    grid = ["experiment=smoke_grid"]
    assert compose([*grid, "strategy=[gdumb]"])["strategy"]["gdumb"]["passes"] == 4
    assert compose([*grid, "strategy=[gdumb]", "strategy.gdumb.passes=4"])["strategy"]["gdumb"]["passes"] == 4
    assert "for_strategy" not in compose(grid) and set(compose([*grid, "strategy=er"])["strategy"]) == {"er"}
    words = ["strategy=[derpp]", "+for_strategy.derpp.buffer.size=500", "+for_strategy.er.weight=2"]
    buffer = compose(words)["strategy"]["derpp"]["buffer"]
    assert buffer["size"] == 500 and buffer["policy"] == "reservoir"


def test_settings_of_a_strategy_that_is_not_there_are_refused():
    with pytest.raises(UserError, match="for_strategy=derp.*Did you mean derpp"):
        compose(["+for_strategy.derp.alpha=1"])
    with pytest.raises(UserError, match="for_strategy=3: must be a group of keys"):
        compose(["for_strategy=3"])
