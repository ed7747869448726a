"""Loggers of the extras, where their packages are there."""

import sqlite3

import pytest


def test_mlflow_keeps_its_curves_in_the_run_folder(small_run, tmp_path):
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="the extra mlflow is not installed")
    small_run("strategy=nmc", "logger=[mlflow]", f"run_dir={tmp_path / 'run'}")
    with sqlite3.connect(tmp_path / "run" / "mlflow.db") as store:
        names = {name for (name,) in store.execute("select distinct key from metrics")}
    assert {"accuracy/seen_mean", "test_accuracy/task_04"} <= names
