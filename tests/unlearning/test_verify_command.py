"""``python -m cl_platform verify RUN``: a table, one word per check, exit codes, JSON."""

from __future__ import annotations

import json

import pytest
from forgetful_runs import WORKSHOP, forget

from cl_platform.cli.app import run as command


@pytest.fixture
def typed(monkeypatch, capsys):
    """What a user types; gives exit code, output and errors."""
    import cl_platform.verifying

    monkeypatch.setattr(cl_platform.verifying, "workshop", lambda: WORKSHOP)

    def start(*words: object) -> tuple[int, str, str]:
        code = command(["verify", *map(str, words)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return start


def test_the_command_prints_a_table_of_80_columns_and_says_passed(run, references, typed):
    forget(run)
    code, out, _ = typed(run, "--reference", references[0])
    assert code == 0
    assert "checks passed" in out
    assert "FAILED" not in out
    assert "PARTIAL" not in out
    assert "verdict: exact, proven on this machine" in out
    lines = [line for line in out.splitlines() if str(run) not in line and str(references[0]) not in line]
    assert max(map(len, lines)) <= 80
    assert "forget_acc_test_cil" in out


def test_the_command_ends_with_3_when_a_check_fails_and_with_2_on_bad_input(run, references, typed):
    code, _, err = typed(run)
    assert (code, len(err.splitlines())) == (2, 1)
    forget(run)
    code, out, _ = typed(run, "--reference", references[1])
    assert code == 3
    assert "FAILED bytes" in out
    code, _, err = typed(run, "--shadows", "1")
    assert (code, len(err.splitlines())) == (2, 1)
    code, _, err = typed(run / "nowhere")
    assert (code, len(err.splitlines())) == (2, 1)


def test_the_command_gives_json_and_nothing_else(run, references, typed):
    forget(run)
    code, out, err = typed(run, "--json", "--reference", references[0])
    found = json.loads(out)
    assert code == 0
    assert found["passed"] is True
    assert found["metrics"]["js_retain"]["u"]["value"] == 0
    assert found["reference"]["equal"] is True
    assert "reference" in err
