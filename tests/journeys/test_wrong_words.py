"""Slips on the command line: each is one line that says what is wrong, and leaves nothing behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cl_platform.cli.compose import sweep_runs
from cl_platform.cli.train import train

TRAIN = Path(__file__).parents[2] / "train.py"
QUICK = ["strategy=nmc", "scenario.train_per_class=4", "scenario.test_per_class=2", "trainer.progress=false"]

REFUSED = [
    (["strategy="], ["strategy=:", "coda_prompt"]),
    (["evaluation="], ["evaluation=:", "adaptive"]),
    (["experiment="], ["experiment=:", "coda_prompt_cifar100"]),
    (["strategy=[nmc,finetune,nmc]"], ["strategy=[nmc,finetune,nmc]", "nmc more than once"]),
    (["=3"], ["=3", "KEY=VALUE"]),
    (["seed=0=1"], ["seed=0=1", "cannot be read", "'seed=\"0=1\"'"]),
    (["trainer.max_epochs=["], ["trainer.max_epochs=[", "cannot be read", "trainer.max_epochs=VALUE"]),
    (["run_dir=${nope}"], ["run_dir=${nope}", "nope"]),
    (["seed=null"], ["seed=null"]),
    (["evaluation.k=5"], ["evaluation.k=5", "Add evaluation=every"]),
    (["evaluation=every", "evaluation.k=0"], ["evaluation.k=0", "at least 1"]),
    (["evaluation.images_per_task=0"], ["evaluation.images_per_task=0", "auto"]),
    (["backbone.name=vit"], ["backbone.name=vit", "timm"]),
    (["diagnostics.gradients=true"], ["diagnostics.gradients=true", "off, switch"]),
    (["optimizer.lr=-1"], ["optimizer.lr=-1:", "above 0"]),
    (["scenario.train_per_class=many"], ["scenario.train_per_class=many", "a whole number or null"]),
    (["report=false"], ["report=false", "report.KEY=VALUE"]),
    (["resume=true"], ["resume=true", "resume=auto"]),
    (["data.root="], ["data.root=:", "data.root=FOLDER"]),
    (["scenario.class_order=[nine,8]"], ["scenario.class_order=[nine,8]", "nine is no class"]),
    (["trainer.accelerator=cpu", "trainer.devices=7"], ["trainer.devices=7", "trainer.devices=1"]),
    (["debug=maybe"], ["debug=maybe", "debug=true"]),
    (["strategy=er", "strategy.er.buffer.size=0"], ["strategy.er.buffer.size=0", "at least 1"]),
    (["strategy=er", "strategy.er.buffer.size=5"], ["strategy.er.buffer.size=5", "10 classes"]),
    (["strategy=[er,derpp]"], ["strategy=[er,derpp]", "er and derpp both own the buffer"]),
    (["strategy=lora", "backbone=resnet18_slim"], ["strategy=lora", "vision transformer", "vit_nano"]),
    (["-m", "strategy=nmc,nope"], ["strategy=nope", "finetune"]),
    (["-m", "trainer.max_epochs=1,0"], ["trainer.max_epochs=0", "at least 1"]),
    (["-m", "seed=0,1,-1"], ["seed=-1"]),
    (["-m", "strategy=nmc,l2p", "strategy.l2p.length=4"], ["strategy.l2p.length=4", "not chosen in this run"]),
    (["-m", "strategy=coda_prompt", "strategy.coda_prompt.length=4,a"], ["strategy.coda_prompt.length=a"]),
    (["-m", "seed=0,1", "run_dir=here"], ["run_dir=here", "'run_dir=runs/${seed}'"]),
    (["-m", "seed=0,["], ["seed=0,[", "cannot be read"]),
]


@pytest.mark.parametrize(("words", "expected"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_a_slip_is_one_line_before_anything_runs(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = {word.partition("=")[0] for word in words}
    assert train([*words, *(word for word in QUICK if word.partition("=")[0] not in typed)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in expected:
        assert word in lines[0]
    assert not os.listdir(tmp_path)


def test_a_sweep_is_every_combination_in_hydras_order():
    runs = sweep_runs(["strategy=[nmc],[nmc,finetune]", "seed=range(0,2)", "hydra/launcher=joblib", "run_dir=a"])
    assert runs == [
        ["strategy=[nmc]", "seed=0", "run_dir=a"],
        ["strategy=[nmc]", "seed=1", "run_dir=a"],
        ["strategy=[nmc,finetune]", "seed=0", "run_dir=a"],
        ["strategy=[nmc,finetune]", "seed=1", "run_dir=a"],
    ]
    assert [words[0] for words in sweep_runs(["evaluation=glob(every*)"])] == [
        "evaluation=every",
        "evaluation=every_step",
    ]
    assert sweep_runs([]) == [[]]


def test_a_sweep_may_put_keys_and_its_run_number_into_folders(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = [*QUICK, "logger=[]", "report.html=false", "evaluation=off"]
    assert train(["-m", "seed=3,4", "run_dir=a/${seed}", *quick]) == 0
    assert train(["-m", "seed=3,4", "run_dir=b/${hydra:job.num}", *quick]) == 0
    assert [sorted(os.listdir(name)) for name in "ab"] == [["3", "4"], ["0", "1"]]
    log = capsys.readouterr().err
    for folder in ("a/3", "a/4", "b/0", "b/1"):  # every run of a sweep has its lines
        assert f"run folder {folder}" in log
        assert "about" in Path(folder, "run.log").read_text()


def test_help_into_a_closed_pipe_is_no_fault_of_ours():
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
