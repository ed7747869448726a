"""Installed packages bring plug-ins by an entry point; one that is broken stops nothing else."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from cl_platform import plugins, registry
from cl_platform.cli.app import run as command
from cl_platform.cli.compose import compose

PACKAGE = Path(__file__).parent / "example_package"
ROOT = Path(__file__).parents[2]

GOOD = """
from cl_platform.registry import strategies
from cl_platform.strategies.finetune import Finetune
{api}

@strategies.register("{name}")
class Mine(Finetune):
    name = "{name}"
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with an entry point where this process finds it."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def put(package, source):
        (site / f"{package}.py").write_text(source)
        info = site / f"{package}-0.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.3\n")
        (info / "entry_points.txt").write_text(f"[cl_platform.plugins]\n{package} = {package}\n")

    yield put
    for name in [name for name in sys.modules if name.startswith("odd_")]:
        del sys.modules[name]


def test_an_installed_strategy_is_a_choice_like_any_other(install):
    install("odd_good", GOOD.format(api="CL_PLATFORM_API = 1", name="odd"))
    assert [plugin.brings for plugin in plugins.load_installed() if plugin.name == "odd_good"] == [
        (("strategy", "odd"),)
    ]
    assert compose(["strategy=odd"])["strategy"] == {"odd": {"loss": "seen", "trainable": None}}


@pytest.mark.parametrize(
    "source, said",
    [
        ("import no_such_thing_at_all\n", "No module named 'no_such_thing_at_all'"),
        (GOOD.format(api="CL_PLATFORM_API = 7", name="odd"), "CL_PLATFORM_API=7"),
        (GOOD.format(api="", name="coda_prompt"), "registered twice, by cl_platform.strategies.coda_prompt.CODAPrompt"),
        ("raise SystemExit('no')\n", "SystemExit: no"),
    ],
)
def test_a_broken_one_is_named_with_its_cause_and_all_else_works(install, capsys, source, said):
    install("odd_bad", source)
    install("odd_good", GOOD.format(api="", name="odd"))
    assert command(["list", "strategies", "--json"]) == 0
    printed = capsys.readouterr()
    assert "plug-in odd_bad (odd_bad 0.3) is left out" in printed.err
    assert said in printed.err
    assert printed.err.count("\n") == 1
    listed = {entry["name"]: entry["origin"] for entry in json.loads(printed.out)}
    assert listed["odd"] == "odd_good 0.3"
    assert registry.strategies.get("coda_prompt").__module__ == "cl_platform.strategies.coda_prompt"


def test_a_package_is_pip_installed_into_a_fresh_environment_and_used_by_name(tmp_path):
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this environment has no pip")
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False)
    python = fresh / "bin" / "python"
    library = next(fresh.glob("lib/python*/site-packages"))
    (library / "platform.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")  # torch and this package
    source = shutil.copytree(PACKAGE, tmp_path / "package")  # pip builds beside the sources
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CL_"))}

    def called(*words):
        done = subprocess.run(
            [python, *words], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done

    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *offline, str(source)]
    done = subprocess.run(pip, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = called("-m", "cl_platform", "describe", "patient", "--json")
    assert json.loads(shown.stdout)["origin"] == "cl-example 1.2.0"
    called("-m", "cl_platform", "train", "strategy=patient", "scenario=striped_digits", "backbone=pixels",
           "trainer.max_epochs=1", "trainer.progress=false", "logger=[]", "evaluation=off", "report.html=false",
           "run_dir=run")  # fmt: skip
    assert "first_task_left" in json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_a_new_package_holds_a_strategy_that_works(tmp_path, monkeypatch, capsys):
    assert command(["new", "strategy", "kind_hearted", "--into", str(tmp_path)]) == 0
    made = tmp_path / "cl_kind_hearted"
    assert "pip install -e" in capsys.readouterr().out
    names = sorted(str(file.relative_to(made)) for file in made.rglob("*") if file.is_file())
    assert names == ["README.md", "cl_kind_hearted/__init__.py", "cl_kind_hearted/strategy.py", "pyproject.toml",
                     "tests/test_kind_hearted.py"]  # fmt: skip
    (brought,) = plugins.load([str(made / "cl_kind_hearted" / "strategy.py")])
    assert brought.brings == (("strategy", "kind_hearted"),)
    assert compose(["strategy=kind_hearted"])["strategy"]["kind_hearted"]["smoothing"] == 0.1
    assert command(["new", "strategy", "kind_hearted", "--into", str(tmp_path)]) == 2


@pytest.mark.parametrize("words", [["strategy", "er"], ["strategy", "No-Way"], ["scenario", "mine"]])
def test_new_refuses_what_it_cannot_make(words, tmp_path, capsys):
    assert command(["new", *words, "--into", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())
