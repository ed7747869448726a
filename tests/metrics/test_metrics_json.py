"""The content of metrics.json."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
from metric_matrices import four_tasks, matrix_of, three_tasks
from pytest import approx

import cl_platform.metrics
from cl_platform.metrics import BY_KEY, DEFINITIONS, AccuracyMatrix, entry, summarise
from cl_platform.metrics import matrix as m


def test_an_entry_holds_number_value_space_unit_terms_and_reason():
    assert summarise({"cil": four_tasks()}, "cil")["acc_cil"] == {
        "id": "1.1",
        "value": 0.6875,
        "space": "cil",
        "unit": "fraction",
        "per_task": [0.5, 0.95, 0.4, 0.9],
        "reason": None,
    }


def test_the_primary_space_stands_under_the_bare_key_too():
    both = {"cil": four_tasks(), "til": matrix_of([[9], [9, 19]], [10, 20], "til")}
    summary = summarise(both, "cil")
    assert summary["acc"] == summary["acc_cil"]
    assert summary["acc_til"]["value"] == approx(0.925)
    assert summarise(both, "til")["acc"]["space"] == "til"
    expected = {f"{key}{suffix}" for key in BY_KEY for suffix in ("", "_cil", "_til")} | {"tasks"}
    assert set(summary) == expected


def test_terms_per_task_run_along_the_list_of_averaged_tasks():
    matrix = four_tasks(task_ids=[7, 3, 9, 1])
    matrix.forget(3)
    summary = summarise({"cil": matrix}, "cil")
    assert summary["tasks"] == [7, 9, 1]
    assert summary["forgetting"]["per_task"] == [approx(0.4), approx(0.4), None]


def test_an_undefined_metric_is_null_with_one_reason():
    summary = summarise({"cil": matrix_of([[4]], [5])}, "cil")
    assert summary["acc"]["value"] == 0.8
    for key in ("forgetting", "bwt", "fwt_init", "fwt_chance"):
        assert (summary[key]["value"], summary[key]["reason"]) == (None, "needs_two_tasks")
    assert summarise({"cil": AccuracyMatrix("cil")}, "cil")["acc"]["reason"] == "empty"


def test_a_run_that_trains_once_says_so_where_rows_are_needed():
    once = AccuracyMatrix("cil", [0, 1, 2])
    once.append_row(2, {0: (8, 10), 1: (9, 10), 2: (7, 10)}, {0: (8, 10), 1: (17, 20), 2: (24, 30)}, {0: (1, 2)})
    summary = summarise({"cil": once}, "cil", row_reason="joint_trains_once")
    assert summary["acc"]["value"] == approx(0.8)
    assert summary["acc_per_class"]["per_class"] == {"0": 0.5}
    for key in ("aia", "aia_samples", "forgetting", "forgetting_after", "bwt", "la", "bwt_all", "forgetting_step"):
        assert summary[key]["reason"] == "joint_trains_once"
    assert summary["cumulative_acc"]["reason"] == "joint_trains_once"
    assert summarise({"cil": once}, "cil")["aia"]["reason"] == "not_evaluated"


def test_a_missing_cell_keeps_its_own_reason_in_a_run_that_trains_once():
    once = AccuracyMatrix("cil", [0, 1])
    once.append_row(1, {1: (9, 10)})
    assert summarise({"cil": once}, "cil", row_reason="joint_trains_once")["acc"]["reason"] == "not_evaluated"


def test_baselines_and_references_are_given_per_space():
    summary = summarise(
        {"til": three_tasks("til"), "cil": three_tasks("cil")},
        "til",
        candidates={"til": 4},
        joint_references={"til": [0.80, 0.95, 0.90]},
    )
    assert summary["fwt_chance"]["value"] == approx(0.1)
    assert summary["fwt_init"]["per_task"] == [None, approx(0.18), approx(0.32)]
    assert summary["intransigence"]["value"] == approx(1 / 30)
    assert summary["intransigence_cil"]["reason"] == "no_reference_run"
    assert summary["fwt_init_cil"]["reason"] == "space_excludes_future_classes"


def test_entries_of_other_metrics_join_under_both_keys():
    extra = {
        "wf_10_cil": entry("2.2.4", 0.25, "cil"),
        "wf_10_til": entry("2.2.4", None, "til", reason="evaluation_off"),
    }
    summary = summarise({"cil": four_tasks()}, "cil", extra=extra)
    assert summary["wf_10"]["value"] == 0.25
    assert summary["wf_10_til"]["reason"] == "evaluation_off"
    with pytest.raises(ValueError, match="twice"):
        summarise({"cil": four_tasks()}, "cil", extra={"acc_cil": entry("1.1", 1.0, "cil")})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), [0.5, float("-inf")]])
def test_values_that_json_cannot_hold_are_refused(bad):
    with pytest.raises(ValueError, match="null with a reason"):
        entry("2.2.4", bad, "cil")
    with pytest.raises(ValueError, match="null with a reason"):
        summarise({"cil": four_tasks()}, "cil", extra={"wf_10_cil": {"value": bad}})


def test_an_entry_has_either_a_value_or_a_known_reason():
    for arguments in ({"value": None}, {"value": 0.5, "reason": "empty"}, {"value": None, "reason": "because"}):
        with pytest.raises(ValueError):
            entry("1.1", space="cil", **arguments)


def test_the_same_counts_give_the_same_strict_json():
    texts = {json.dumps(summarise({"cil": four_tasks()}, "cil"), allow_nan=False) for _ in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize("matrices, primary", [({}, "cil"), ({"all": AccuracyMatrix("all")}, "all")])
def test_the_primary_space_must_be_a_scenarios_own_and_present(matrices, primary):
    with pytest.raises(ValueError, match="primary"):
        summarise(matrices, primary)


def test_a_matrix_under_another_spaces_name_is_refused():
    with pytest.raises(ValueError, match="til"):
        summarise({"cil": AccuracyMatrix("til")}, "cil")


def test_every_definition_has_a_function_and_a_unique_key():
    assert len(BY_KEY) == len(DEFINITIONS)
    assert sorted({d.id for d in DEFINITIONS}, key=lambda i: int(i[2:])) == [f"1.{i}" for i in range(1, 18)]
    for definition in DEFINITIONS:
        assert getattr(m, definition.key).__doc__.startswith(definition.id + ",")
        assert definition.text.endswith(".")


WITH_TENSORS = {
    "attacks",
    "calibration",
    "confusion",
    "divergence",
    "flips",
    "forgetting",
    "gradients",
    "representation",
}
FITTED = {"attacks": {"scipy", "sklearn"}, "forgetting": {"sklearn"}, "seeds": {"scipy"}}


def test_metrics_from_counts_import_the_standard_library_only():
    folder = Path(cl_platform.metrics.__file__).parent
    for path in folder.glob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
        foreign = {
            n for n in names if n.split(".")[0] not in sys.stdlib_module_names and n[:19] != "cl_platform.metrics"
        }
        allowed = {"torch", "torchmetrics"} if path.stem.startswith("torchmetrics") else FITTED.get(path.stem, set())
        assert {n.split(".")[0] for n in foreign} <= (allowed | ({"torch"} if path.stem in WITH_TENSORS else set())), (
            path
        )
