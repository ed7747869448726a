"""What a person types, and what is there afterwards."""

import csv
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cl_platform.cli.train import train
from cl_platform.metrics.continual_log import parse as parse_log

ROOT = Path(__file__).parents[2]
SMALL = ["scenario.train_per_class=12", "scenario.test_per_class=6", "trainer.max_epochs=2", "trainer.batch_size=8"]


def command(*words: str, **kwargs):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def files_of(run: Path, position: int) -> dict[str, bytes]:
    names = [
        "metrics.json",
        "accuracy_matrix.csv",
        "continual_eval.csv",
        "confusion.json",
        f"checkpoints/task_{position}/model.safetensors",
    ]
    return {name: (run / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """An uninterrupted run of the command, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    process = command(*SMALL, f"run_dir={folder / 'run'}", cwd=folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder / "run", out, err


def test_a_run_leaves_everything_a_researcher_looks_at(whole_run):
    run, out, err = whole_run
    assert "about" in err  # the estimate
    for words in ("final average accuracy", "average incremental accuracy", "forgetting", "BWT", "samples/s", str(run)):
        assert words in out
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["acc"] == metrics["acc_cil"]
    assert metrics["acc"]["id"] == "1.1"
    assert 0 <= metrics["acc_til"]["value"] <= 1
    assert metrics["fwt_init"]["value"] is None
    assert metrics["fwt_init"]["reason"] == "space_excludes_future_classes"
    rows = list(csv.reader((run / "accuracy_matrix.csv").read_text().splitlines()))
    assert len(rows) == 6
    assert math.isnan(float(rows[1][2]))
    final = [float(cell) for cell in rows[5][1:]]
    assert metrics["acc"]["value"] == pytest.approx(sum(final) / 5)
    environment = json.loads((run / "environment.json").read_text())
    assert len(environment["backbone"]["weights_sha256"]) == 64
    assert environment["backbone"]["input_mean"] == [0.5, 0.5, 0.5]
    cost = json.loads((run / "cost.json").read_text())
    assert cost["images_trained"] == 5 * 24 * 2
    assert cost["updates"] == 5 * 3 * 2
    assert all(task["flops_train_step"] > task["flops_eval_image"] > 0 for task in cost["tasks"])
    assert any((run / "tensorboard").iterdir())
    assert len((run / "csv" / "metrics.csv").read_text().splitlines()) > 5
    assert not list(run.rglob("*.pkl")) + list(run.rglob("*.ckpt")) + list(run.rglob("*.pt"))
    assert (run / "run.log").read_text().strip()
    assert "<svg" in (run / "report.html").read_text()
    assert (run / "figures" / "stability_curves.png").stat().st_size > 10_000
    log = parse_log((run / "continual_eval.csv").read_text())
    assert not log.bad_rows
    assert max(row.global_step for row in log.rows) == 30


def test_the_step_axis_runs_on_over_all_tasks(whole_run):
    run, _, _ = whole_run
    steps = [int(row["step"]) for row in csv.DictReader((run / "csv" / "metrics.csv").open())]
    assert steps == sorted(steps)
    assert steps[-1] == 30


def signalled(process, number, checkpoint):
    """What a process prints on standard error that gets a signal as soon as it has written a checkpoint."""
    deadline = time.monotonic() + 200
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal came")
    return err


def test_a_run_that_was_stopped_and_then_killed_goes_on_to_the_same_bytes(whole_run, tmp_path, capsys):
    whole, _, _ = whole_run
    run = tmp_path / "run"
    words = [*SMALL, "logger=[]", "report.html=false"]
    stopped = command(*words, f"run_dir={run}", cwd=tmp_path)
    err = signalled(stopped, signal.SIGINT, run / "checkpoints" / "task_0")
    assert stopped.returncode == 130
    assert f"resume={run}" in err
    assert "Traceback" not in err
    killed = command(*words, f"resume={run}", cwd=tmp_path)
    err = signalled(killed, signal.SIGKILL, run / "checkpoints" / "task_2")
    assert killed.returncode == -signal.SIGKILL
    assert "resumed after task" in err
    assert train([*words, f"run_dir={run}", "resume=auto"]) == 0
    assert "resumed after task" in capsys.readouterr().err
    assert files_of(run, 4) == files_of(whole, 4)


TWO = ("scenario.num_tasks=2", "scenario.train_per_class=4", "scenario.test_per_class=4", "logger=[]")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(small_run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        small_run(f"run_dir={tmp_path / name}", f"seed={seed}", *TWO)
    first, again, other = (files_of(tmp_path / name, 1) for name in "abc")
    assert first == again
    assert first["checkpoints/task_1/model.safetensors"] != other["checkpoints/task_1/model.safetensors"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(small_run, tmp_path, caplog):
    run = tmp_path / "run"
    small_run(f"run_dir={run}", *TWO)
    before = files_of(run, 1)
    (run / "metrics.json").unlink()
    broken = run / "checkpoints" / "task_1" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    with caplog.at_level("WARNING", logger="cl_platform"):
        import logging

        logging.getLogger("cl_platform").propagate = True
        small_run(f"run_dir={run}", *TWO, "resume=auto")
    assert "task_1" in caplog.text
    assert files_of(run, 1) == before


REFUSED = [
    (["strategy=coda_promt"], ["strategy=coda_promt", "coda_prompt"]),
    (["scenario=split_digit"], ["scenario=split_digit", "split_digits"]),
    (["backbone=vit_nan"], ["backbone=vit_nan", "vit_nano"]),
    (["trainer.max_epoch=3"], ["trainer.max_epoch=3", "trainer.max_epochs"]),
    (["strategy.coda_prompt.lenght=3"], ["strategy.coda_prompt.lenght=3", "strategy.coda_prompt.length"]),
    (["scenario.num_tasks=3"], ["scenario.num_tasks=3", "10"]),
    (["strategy.coda_prompt.num_components=99"], ["strategy.coda_prompt.num_components=99", "95 or 100"]),
    (["strategy.coda_prompt.num_components=200"], ["strategy.coda_prompt.num_components=200", "192"]),
    (["strategy.coda_prompt.layers=[0,6]"], ["strategy.coda_prompt.layers", "0 to 5"]),
    (["strategy.coda_prompt.length=3"], ["strategy.coda_prompt.length=3", "even"]),
    (["backbone=resnet18_slim"], ["strategy=coda_prompt", "vision transformer"]),
    (["trainer.batch_size=1000", "trainer.drop_last=true"], ["trainer.batch_size=1000", "no step"]),
    (["trainer.batch_size=0"], ["trainer.batch_size=0", "at least 1"]),
    (["trainer.max_epochs=many"], ["trainer.max_epochs=many", "whole number"]),
    (["run_dir=/dev/null/run"], ["run_dir=/dev/null/run", "cannot be written"]),
    (
        ["scenario=split_cifar100", "data.root=/nowhere", "data.download=false"],
        ["/nowhere/cifar100", "scenario=split_digits"],
    ),
    (["scenario=image_folder"], ["scenario.path"]),
    (["backbone=timm", "backbone.name=vit_base_patch16_224"], ["backbone.name", "augreg2_in21k_ft_in1k"]),
    (["seed=-1"], ["seed=-1"]),
    (["optimizer.lr=0"], ["optimizer.lr=0", "above 0"]),
    (["trainer.accelerator=tpux"], ["trainer"]),
    (["resume=/nowhere"], ["resume=/nowhere"]),
    (["evaluation.future_tasks=true"], ["evaluation.future_tasks"]),
    (["logger=[mlflow]"], ["logger=mlflow", "cl-platform[mlflow]"]),
    (["logger=null"], ["logger=null", "logger=[]"]),
    (["trainer.precision=bf16-true"], ["trainer.precision=bf16-true", "bf16-mixed"]),
    (["plugins=[nope]"], ["plugins=nope", "there is no such module"]),
    (["scenario.class_order=[9,8"], ["scenario.class_order=[9,8"]),
    (["trainer.precision=foo"], ["trainer.precision=foo", "bf16-mixed"]),
    (["+trainer.lightning.foo=1"], ["trainer.lightning", "foo"]),
    (["trainer.lightning.foo=1"], ["+trainer.lightning.foo=1"]),
    (["strategy=l2p", "strategy.coda_prompt.length=4"], ["strategy.coda_prompt.length=4", "is not chosen"]),
    (["--foo"], ["--foo", "no option"]),
    (["nonsense"], ["nonsense", "KEY=VALUE"]),
    (["seed=0,1"], ["seed=0,1", "-m"]),
    (["strategy=[finetune,joint]"], ["finetune and joint both own"]),
]


@pytest.mark.parametrize(("words", "expected"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_bad_input_is_one_clear_line_and_leaves_nothing(words, expected, capsys, tmp_path, monkeypatch):
    if "mlflow" in words[0] and importlib.util.find_spec("mlflow"):
        pytest.skip("mlflow is installed here")
    monkeypatch.chdir(tmp_path)
    code = train([*words, *(w for w in SMALL if w.partition("=")[0] not in {v.partition("=")[0] for v in words})])
    err = capsys.readouterr().err
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    for word in expected:
        assert word in lines[0]
    assert not os.listdir(tmp_path)


@pytest.fixture(scope="module")
def finished(small_run, tmp_path_factory):
    """A finished run, and its words."""
    words = (f"run_dir={tmp_path_factory.mktemp('finished') / 'run'}", "strategy=nmc", "logger=[]")
    small_run(*words)
    return words


def test_a_display_setting_does_not_stop_a_resume(small_run, finished):
    small_run(*finished, "trainer.progress=true", "resume=auto")


def test_debug_shows_the_traceback(capsys):
    assert train(["strategy=nothing", "debug=true"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_run_folder_is_not_overwritten(finished, capsys):
    assert train([*finished[:2], *SMALL]) == 2
    assert "resume=auto" in capsys.readouterr().err


def test_resuming_with_another_configuration_names_the_key(finished, capsys):
    assert train([*finished[:2], "resume=auto", "scenario.num_tasks=2", *SMALL[:2]]) == 2
    assert re.search(r"scenario\.num_tasks|trainer", capsys.readouterr().err)


def test_help_lists_the_choices():
    out, _ = command("--help").communicate(timeout=60)
    for word in ("coda_prompt", "split_cifar100", "vit_nano", "coda_prompt_cifar100", "trainer:", "max_epochs"):
        assert word in out
