"""What all tests share: sleeping threads, no network, a cache of their own, small runs."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
os.environ["HF_HUB_OFFLINE"] = "1"

# two threads in all, also in what the tests start: a process of several has one
os.environ["OMP_NUM_THREADS"] = "2" if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1" else "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    """Decoded images go to a temporary cache; the working folder is a temporary one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True, scope="session")
def _threads():
    """Two in all, the size of machine that the suite is measured on."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


SMALL = (
    "scenario.train_per_class=12", "scenario.test_per_class=6", "trainer.max_epochs=1", "trainer.progress=false",
    "report.html=false", "report.tensorboard_figures=false",
)  # fmt: skip


@pytest.fixture
def small_run():
    """Call with overrides: a run of the digits with few images, as a ``RunResult``."""
    from cl_platform.cli.compose import compose
    from cl_platform.run import run
    from cl_platform.run_config import parse

    def start(*overrides: str):
        return run(parse(compose([*SMALL, *overrides])))

    return start
