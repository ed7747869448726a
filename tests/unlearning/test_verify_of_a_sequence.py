"""Verification of a run that followed instructions, and references that are found again after a rollback."""

import json

import pytest
from shelf import forget, learn

from cl_platform.cli.app import run as command

SEQUENCE = "R0 T1 T2 R3 R1 F2 T4 F4"
CLPU = ("strategy=clpu_derpp", "strategy.clpu.per_task=4", "strategy.clpu.memory_batch=4", "evaluation=boundaries")


pytestmark = pytest.mark.usefixtures("tiny_backbone")


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    root = tmp_path_factory.mktemp("sequence")
    learn(root / "run", *CLPU, f"unlearning.sequence='{SEQUENCE}'", f"output_root={root / 'outputs'}")
    return root / "run"


def verified(path, capsys):
    """Exit code, the result, and what was said beside it."""
    capsys.readouterr()
    code = command(["verify", str(path), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def test_a_run_that_learnt_for_good_and_temporarily_is_equal_to_one_that_never_saw_what_it_forgot(followed, capsys):
    code, found, said = verified(followed, capsys)
    assert code == 0, said
    assert (found["task_id"], found["level"]) == (4, "E-bit")
    assert found["reference"]["equal"] is True
    assert found["metrics"]["js_retain"]["u"]["value"] == 0
    assert "a run without tasks 2, 4 is trained" in said


def test_the_reference_is_found_again(followed, capsys):
    verified(followed, capsys)
    _, found, said = verified(followed, capsys)
    assert found["reference"]["cached"] is True
    assert "from the cache" in said


def test_each_way_to_forget_a_task_is_held_against_the_same_reference(tmp_path, capsys):
    words = (
        "strategy=nmc",
        "scenario.skip_tasks=[3,4]",
        "evaluation=boundaries",
        f"output_root={tmp_path / 'outputs'}",
    )
    cached = []
    for method in ("drop", "rollback"):
        learn(tmp_path / method, *words)
        forget(tmp_path / method, 1, method)
        code, found, _ = verified(tmp_path / method, capsys)
        assert code == 0
        cached.append(found["reference"]["cached"])
    assert cached == [False, True]
