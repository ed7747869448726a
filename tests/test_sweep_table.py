"""Several runs from one command, and their table."""

import io

from rich.console import Console

from cl_platform.cli.sweep import Outcome, closing_table, with_experiment


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
