"""The keys beside the way to forget: what of the data cache goes, what is kept in the head, what is noted outside."""

import json

import pytest
from image_runs import images, words_for
from shelf import learn

from cl_platform.cli.app import run as command
from cl_platform.cli.compose import compose
from cl_platform.errors import UserError
from cl_platform.run import run as start
from cl_platform.run_config import parse
from cl_platform.unlearning.choice import Option, Price, choose

REQUEST = "unlearning.requests=[{after_task: 1, forget: 0}]"


pytestmark = pytest.mark.usefixtures("tiny_backbone")


def test_of_the_data_cache_the_runs_data_set_goes_when_it_is_asked_for_and_no_other(tmp_path, capsys):
    cache = tmp_path / "cache"
    trees = [images(tmp_path / name, train=count) for name, count in (("mine", 6), ("other", 5))]
    for tree in trees:
        words = words_for(tree, cache, "strategy=nmc", "scenario.skip_tasks=[2]", f"run_dir={tmp_path / tree.name}_run")
        start(parse(compose(list(words))))
    held = {path.name for path in (cache / "entries").iterdir()}
    run = tmp_path / "mine_run"
    assert command(["unlearn", str(run), "--task", "0"]) == 0
    assert {path.name for path in (cache / "entries").iterdir()} == held
    assert uncovered(run) >= {"decoded data cache"}
    assert command(["unlearn", str(tmp_path / "other_run"), "--task", "1", "--purge-data-cache"]) == 0
    left = {path.name for path in (cache / "entries").iterdir()}
    assert len(held) == 2 and len(left) == 1 and left < held
    assert len(list((cache / "index").iterdir())) == 1
    assert "decoded data cache" not in uncovered(tmp_path / "other_run")
    capsys.readouterr()
    assert command(["verify", str(tmp_path / "other_run")]) == 0  # decoded anew


def uncovered(run):
    made = json.loads((run / "unlearning" / "certificate.json").read_text())
    return {entry["what"] for entry in made["not_covered"]}


def test_rows_that_are_kept_may_still_be_answered_and_are_counted(tmp_path):
    run = tmp_path / "run"
    method = "unlearning.method=approximate:l1_sparse"  # leaves the rows of the task as strong as they were
    keys = ("unlearning.keep_rows=true", "unlearning.l1_sparse.epochs=1", "unlearning.l1_sparse.lr=0.000001")
    learn(
        run, "strategy=finetune", "optimizer.lr=0.000001", "scenario.skip_tasks=[3,4]", "unlearning=l1_sparse", method,
        *keys, REQUEST,
    )  # fmt: skip
    last = json.loads((run / "confusion.json").read_text())["after"][-1]
    assert sum(map(sum, last["counts"])) == 16
    assert set(last["classes"]) > {2, 3, 4, 5}
    assert all(name == f"class {c}" for c, name in zip(last["classes"], last["class_names"], strict=True) if c < 2)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tasks"] == [1, 2]
    assert 0 <= metrics["task_inference_acc_cil"]["value"] < 1


def test_the_head_of_the_log_is_noted_outside_and_held_against_the_log(tmp_path, capsys):
    run, noted = tmp_path / "run", tmp_path / "noted.txt"
    learn(run, "strategy=nmc", "scenario.skip_tasks=[3,4]", f"unlearning.anchor={noted}", REQUEST)
    assert len(noted.read_text().splitlines()) == 1
    assert command(["verify", str(run)]) == 0
    assert len(noted.read_text().splitlines()) == 2
    log = run / "unlearning" / "audit.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    assert command(["verify", str(run)]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


def option(method, level, steps):
    return Option(method, level, Price((2,) if steps else (), steps=steps), "why")


def test_auto_takes_a_cheaper_way_of_equal_distribution_where_that_is_accepted():
    ways = [option("drop", "E-law", 0), option("rollback", "E-bit", 100)]
    assert choose(1, "auto", ways).option.method == "rollback"
    assert choose(1, "auto", ways, "E-law").option.method == "drop"
    assert choose(1, "auto", [option("drop", "approximate", 0), ways[1]], "E-law").option.method == "rollback"


def test_a_wrong_way_is_named_as_it_was_typed(tmp_path):
    with pytest.raises(UserError, match=r"^unlearning.requests\[0\].method=magic: unknown"):
        parse(compose(["unlearning.requests=[{after_task: 1, forget: 0, method: magic}]"]))
    impossible = Option("drop", None, Price(), "it cannot")
    with pytest.raises(UserError, match=r"^--method=drop: .*Use --method rollback\.$"):
        choose(1, "drop", [impossible, option("rollback", "E-bit", 1)])
    with pytest.raises(UserError, match=r"^unlearning.method=drop: .*Use unlearning.method=rollback\.$"):
        choose(1, "drop", [impossible, option("rollback", "E-bit", 1)], key="unlearning.method")
