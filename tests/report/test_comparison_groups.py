"""Which runs of a comparison belong together, and what their numbers over seeds are."""

import csv
import io
import json
import math
import statistics

import pytest
from comparison_folders import give, numbers_of, run, seeds, three_seeds_each

from cl_platform.metrics import Undefined
from cl_platform.report.comparison_groups import group_runs
from cl_platform.report.comparison_numbers import comparison_csv, outcome, runs_csv
from cl_platform.report.comparison_runs import choose
from cl_platform.report.comparison_tables import absences, cell, ranking, short_count


@pytest.fixture
def two(tmp_path):
    return three_seeds_each(tmp_path)


def labels_of(paths):
    return [group.label for group in group_runs(choose(paths).runs)[0]]


# Who belongs together


def test_runs_that_differ_in_their_seed_alone_are_one_group(two):
    groups, repeated = group_runs(choose(two).runs)
    assert [(group.label, group.seeds) for group in groups] == [("finetune", (0, 1, 2)), ("replay", (0, 1, 2))]
    assert repeated == []


@pytest.mark.parametrize(
    "keys",
    [
        {"run_dir": "elsewhere", "output_root": "/data/runs"},
        {"resume": "outputs/a", "debug": True},
        {"logger": {"csv": {}}},
        {"data.root": "/data"},
        {"report": {"html": False}},
        {"trainer.progress": False},
        {"evaluation.max_overhead": None},
    ],
)
def test_bookkeeping_makes_no_group(tmp_path, keys):
    assert labels_of([run(tmp_path), run(tmp_path, seed=1, keys=keys)]) == ["finetune"]


def test_a_key_of_the_training_makes_a_group_and_names_it(tmp_path):
    batches = [run(tmp_path, seed=s, keys={"trainer.batch_size": b}) for b in (16, 32) for s in (0, 1)]
    assert labels_of(batches) == ["finetune trainer.batch_size=16", "finetune trainer.batch_size=32"]


def test_a_key_of_the_strategy_is_named_without_it(tmp_path):
    sizes = [run(tmp_path, "replay", keys={"strategy.replay.buffer": size}) for size in (200, 500)]
    assert labels_of(sizes) == ["replay buffer=200", "replay buffer=500"]


def test_a_whole_number_written_as_a_float_is_the_same_value(tmp_path):
    paths = [run(tmp_path, seed=s, keys={"trainer.max_epochs": value}) for s, value in ((0, 1), (1, 1.0))]
    assert labels_of(paths) == ["finetune"]


def test_an_optimizer_said_twice_is_the_one_in_use(tmp_path):
    advised = run(tmp_path, keys={"strategy.finetune.optimizer": {"name": "adam", "lr": 0.01}})
    said = run(
        tmp_path, seed=1, keys={"strategy.finetune.optimizer": {"name": "adam", "lr": 0.1}, "optimizer.lr": 0.01}
    )
    assert labels_of([advised, said]) == ["finetune"]


def test_keys_that_the_grid_does_not_read_make_no_group(tmp_path):
    keys = {"evaluation.grid": "every_step"}
    paths = [run(tmp_path, seed=s, keys={**keys, "evaluation.max_rate": rate}) for s, rate in ((0, 0.1), (1, 0.2))]
    assert labels_of(paths) == ["finetune"]


def test_the_same_seed_again_is_no_second_sample(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    groups, repeated = group_runs(choose([first, again]).runs)
    assert [member.path for member in groups[0].runs] == [again]
    assert str(first) in repeated[0]


# Numbers


def test_mean_deviation_and_band_are_those_of_the_runs(two):
    numbers = numbers_of(two)
    accs = [json.loads((path / "metrics.json").read_text())["acc"]["value"] for path in two[:3]]
    found = numbers.values["finetune", "acc"]
    assert found.mean == pytest.approx(statistics.mean(accs))
    assert found.sd == pytest.approx(statistics.stdev(accs))
    assert found.half == pytest.approx(4.302653 * statistics.stdev(accs) / math.sqrt(3), rel=1e-6)


def test_a_missing_value_keeps_its_reason_and_leaves_the_mean(two):
    give(two[0], "gap_recovery_time", None, "censored")
    numbers = numbers_of(two)
    found = numbers.values["finetune", "gap_recovery_time"]
    assert (found.n, dict(found.missing)) == (2, {"censored": 1})
    assert cell(numbers, "finetune", "gap_recovery_time").share == "2 of 3"
    assert any(line.startswith("finetune: no gap_recovery_time in 1 of 3 runs") for line in absences(numbers))
    assert "finetune" not in numbers.best["gap_recovery_time"]


def test_a_reason_nobody_knows_is_one_of_the_closed_set(two):
    give(two[0], "acc", None, "the moon")
    assert outcome(choose(two[:1]).runs[0], "acc") == Undefined("not_evaluated")


def test_the_best_mean_follows_the_direction_of_its_metric(two):
    numbers = numbers_of(two)
    for key, better in (("acc", max), ("forgetting", min), ("min_acc", max), ("gap_depth", min)):
        means = {label: numbers.values[label, key].mean for label in ("finetune", "replay")}
        assert numbers.best[key] == {better(means, key=means.get)}, key


def test_nothing_won_back_is_no_victory(two):
    assert numbers_of(two).best["gap_transient"] == frozenset()


def test_one_group_has_no_best(two):
    assert not any(numbers_of(two[:3]).best.values())


def test_comparison_csv_has_a_line_for_each_group_and_metric(two):
    give(two[3], "acc", None, "not_evaluated")
    numbers = numbers_of(two)
    rows = list(csv.DictReader(io.StringIO(comparison_csv(numbers))))
    assert list(rows[0]) == ["group", "metric", "id", "n", "mean", "sd", "low", "high", "reason"]
    assert len(rows) == 2 * len(numbers.keys) == len({(row["group"], row["metric"]) for row in rows})
    acc = {row["group"]: row for row in rows if row["metric"] == "acc"}
    assert (acc["finetune"]["id"], acc["finetune"]["n"], acc["finetune"]["reason"]) == ("1.1", "3", "")
    assert (acc["replay"]["n"], acc["replay"]["reason"]) == ("2", "not_evaluated (1)")
    assert float(acc["finetune"]["mean"]) == numbers.values["finetune", "acc"].mean
    assert float(acc["finetune"]["low"]) < float(acc["finetune"]["mean"]) < float(acc["finetune"]["high"])


def test_one_seed_leaves_deviation_and_band_empty(two):
    rows = csv.DictReader(io.StringIO(comparison_csv(numbers_of(two[:1]))))
    assert all(row["sd"] == row["low"] == row["high"] == "" for row in rows)


def test_runs_csv_has_a_line_for_each_run(two):
    numbers = numbers_of(two)
    rows = list(csv.DictReader(io.StringIO(runs_csv(numbers))))
    assert [(row["group"], row["seed"]) for row in rows[2:4]] == [("finetune", "2"), ("replay", "0")]
    assert [row["run"] for row in rows] == [str(path) for path in two]
    assert float(rows[0]["acc"]) == numbers.outcomes["finetune", "acc"][0]
    assert not any(cell in ("nan", "inf", "None") for row in rows for cell in row.values())


def test_intransigence_is_measured_against_joint_training(tmp_path):
    joint = seeds(tmp_path, "joint", 2, keys={"strategy.joint.mode": "scratch"}, left=0.0)
    numbers = numbers_of([run(tmp_path, left=0.4), *joint])
    own = choose([tmp_path / "finetune" / "00"]).runs[0].matrix
    matrices = [view.matrix for view in choose(joint).runs]
    wanted = statistics.mean(statistics.mean(m[k][k] for m in matrices) - own[k][k] for k in range(3))
    assert numbers.values["finetune", "intransigence"].mean == pytest.approx(wanted)
    assert "intransigence" in numbers.columns
    assert numbers.values["joint", "intransigence"].mean is None


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (192386, "192k"), (2712010, "2.71M"), (8.6e10, "86G")]
)
def test_counts_are_short(count, text):
    assert short_count(count) == text


def test_equal_means_share_the_lead(two):
    for path in two:
        give(path, "acc", 0.5)
    give(run(two[0].parents[1], "l2p"), "acc", 0.2)
    said = ranking(numbers_of([*two, two[0].parents[1] / "l2p" / "00"]))
    assert said[0] == "finetune and replay share the highest final average accuracy."
