"""A run of three tiny tasks that forgot nothing yet, runs that never learnt one of them, and a copy to change."""

from __future__ import annotations

import pytest
import yaml
from forgetful_runs import TARGET, copied, raw_config, train, trained


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A run of three tasks that has forgotten nothing yet."""
    return trained(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def references(learnt):
    """Runs that never learnt the task, of the same seed and of another."""
    found = {}
    for seed in (0, 1):
        found[seed] = learnt.parent / f"reference_{seed}"
        train(raw_config(learnt.parent, seed=seed, skip=(TARGET,)), found[seed])
    return found


@pytest.fixture
def run(learnt, tmp_path):
    """A copy of it to change."""
    folder = copied(learnt, tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "output_root": str(tmp_path / "outputs")}))
    return folder
