"""What all tests share: sleeping threads, no network, a cache of their own, small runs."""

import copy
import functools
import gc
import importlib.metadata
import itertools
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded
os.environ["HF_HUB_OFFLINE"] = "1"

# two threads in all, also in what the tests start: a process of several has one
os.environ["OMP_NUM_THREADS"] = "2" if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1" else "1"

import pytest
import torch

_entry_points = importlib.metadata.entry_points


@functools.cache
def _entry_points_at(places, wanted):
    return _entry_points(**dict(wanted))


def _entry_points_once(**wanted):
    """What installed packages offer, read again only where a folder of packages changed.

    Each trainer of Lightning and each composed configuration looks through all packages: as long as a short training.
    """
    places = tuple((place, os.stat(place).st_mtime_ns) for place in sys.path if os.path.isdir(place))
    return _entry_points_at(places, tuple(sorted(wanted.items())))


importlib.metadata.entry_points = _entry_points_once  # before Lightning takes a reference to it


def pytest_collection_finish():
    """What was imported and collected stays: looking through it for garbage took a twelfth of the time."""
    gc.collect()
    gc.freeze()


_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    """Decoded images go to a temporary cache; the working folder is a temporary one."""
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("XDG_CACHE_HOME", str(base / "cache"))
    work = base / "work" / str(next(_numbers))  # tmp_path_factory.mktemp looks through all that are there
    work.mkdir(parents=True)
    monkeypatch.chdir(work)


@pytest.fixture(autouse=True, scope="module")
def _flops_where_looked_at(request):
    """FLOPs of a run's tasks are counted in modules that say ``COUNTS_FLOPS``: it takes as long as the few updates."""
    from cl_platform import efficiency

    nothing = {"flops_eval_image": None, "flops_train_step": None, "reason": "not_countable"}
    with pytest.MonkeyPatch.context() as patched:
        if not getattr(request.module, "COUNTS_FLOPS", False):
            patched.setattr(efficiency, "task_flops", lambda learner: {"task_id": learner.task.task_id, **nothing})
        yield


@pytest.fixture(autouse=True, scope="session")
def _threads():
    """Two in all, the size of machine that the suite is measured on."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


SMALL = (
    "scenario.train_per_class=12", "scenario.test_per_class=6", "trainer.max_epochs=1", "trainer.progress=false",
    "report.html=false", "report.tensorboard_figures=false",
)  # fmt: skip


@pytest.fixture(scope="session")
def small_run():
    """Call with overrides: a run of the digits with few images, as a ``RunResult``."""
    from cl_platform.cli.compose import compose
    from cl_platform.run import run
    from cl_platform.run_config import parse

    composed = functools.cache(lambda *words: compose(words))  # composing takes as long as learning a task

    def start(*overrides: str):
        later = dict(word.split("=", 1) for word in overrides if word.startswith(("run_dir=", "resume=")))
        words = (word for word in overrides if not word.startswith(("run_dir=", "resume=")))
        return run(parse({**copy.deepcopy(composed(*SMALL, *words)), **later}))

    return start


@pytest.fixture(scope="module")
def tiny_backbone():
    """Runs of a module stand on the trunk of ``tiny.py`` in place of the one that is configured."""
    from tiny import tiny_vit

    from cl_platform import building

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(building, "build_backbone", lambda config, seed: tiny_vit())
        yield
