"""The layout: imports point downwards, no method's name in the learner or the run, nothing heavy at import."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cl_platform import registry
from cl_platform.cli.compose import groups

PACKAGE = Path(__file__).parents[1] / "cl_platform"

MAY_IMPORT = {  # room -> rooms below it
    "errors": set(),
    "files": set(),
    "random_streams": set(),
    "batch": set(),
    "registry": {"errors"},
    "config": {"errors"},
    "slots": set(),
    "finetuning": {"errors", "random_streams"},
    "cost": {"energy", "metrics"},
    "metrics": set(),
    "heads": {"batch", "errors", "random_streams", "slots"},
    "optimizers": {"config", "errors", "strategies"},
    "backbones": {"errors", "config", "registry", "random_streams", "batch"},
    "scenarios": {"errors", "files", "config", "registry", "random_streams", "batch"},
    "memory": {"errors", "config", "registry", "random_streams", "batch", "slots"},
    "strategies": {
        "memory",
        "finetuning",
        "backbones",
        "scenarios",
        "heads",
        "slots",
        "batch",
        "config",
        "errors",
        "registry",
        "random_streams",
    },
    "answering": {"strategies", "backbones", "scenarios", "batch"},
    "owners": {"random_streams", "slots"},
    "ownership": {"answering", "owners", "heads", "random_streams", "strategies", "scenarios", "batch", "errors"},
    "learner": {
        "answering",
        "owners",
        "ownership",
        "strategies",
        "finetuning",
        "backbones",
        "scenarios",
        "heads",
        "optimizers",
        "batch",
        "errors",
        "random_streams",
    },
    "evaluation": {"learner", "scenarios", "heads", "metrics"},
    "representation": {"learner", "scenarios", "metrics", "files"},
    "diagnostics": {"evaluation", "scenarios", "metrics"},
    "estimate": {"learner", "scenarios", "strategies"},
    "subset_evaluation": {"learner", "evaluation", "heads", "scenarios", "metrics", "backbones"},
    "copies": {"learner", "scenarios"},
    "efficiency": {"learner", "copies", "batch", "metrics", "scenarios", "random_streams"},
    "energy": {"metrics"},
    "callbacks": {
        "learner",
        "metrics",
        "cost",
        "evaluation",
        "subset_evaluation",
        "files",
        "scenarios",
        "strategies",
        "report",
        "errors",
        "unlearning",
    },
    "unlearning": {
        "cost",
        "copies",
        "learner",
        "strategies",
        "heads",
        "slots",
        "scenarios",
        "backbones",
        "evaluation",
        "metrics",
        "errors",
        "files",
        "config",
        "registry",
        "random_streams",
        "run_folder",
        "batch",
        "finetuning",
        "optimizers",
        "memory",
    },
    "checkup": {"backbones", "plugins"},
    "report": {"metrics", "errors", "files", "config"},
    "image_paths": {"scenarios"},
    "tracing": {"learner", "batch", "errors"},
    "testing": {
        "cli",
        "plugins",
        "run_config",
        "trainer",
        "learner",
        "evaluation",
        "unlearning",
        "strategies",
        "backbones",
        "scenarios",
        "memory",
        "optimizers",
        "slots",
        "batch",
        "config",
        "errors",
        "registry",
        "random_streams",
    },
}


def _imports(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "cl_platform" else [f"cl_platform.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        rooms |= {n.split(".")[1] for n in names if n.startswith("cl_platform.")}
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_downwards(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for file in files:
        upwards = _imports(file) - MAY_IMPORT[room] - {room}
        assert not upwards, f"{file.name} imports {upwards}"


@pytest.mark.parametrize("file", ["learner.py", "run.py", "evaluation.py", "results.py"])
def test_no_methods_name_in_the_spine(file):
    import cl_platform.strategies  # noqa: F401

    text = (PACKAGE / file).read_text()
    for name in registry.strategies.names():
        assert not re.search(rf"\b{name}\b", text), name


def test_every_strategy_has_its_yaml_and_every_yaml_its_strategy():
    import cl_platform.strategies  # noqa: F401

    lists = [f.stem for f in (PACKAGE.parent / "conf" / "strategy").glob("*.yaml") if "defaults:" in f.read_text()]
    assert lists == ["clpu_derpp"]  # another name for strategy=[clpu,derpp]
    assert groups()["strategy"] == sorted([*registry.strategies.names(), *lists])


def test_every_key_of_every_yaml_has_a_comment():
    for file in sorted((PACKAGE.parent / "conf").rglob("*.yaml")):
        if file.parent.name == "experiment":
            continue
        for line in file.read_text().splitlines():
            plain_key = re.match(r"^[a-z_]+:\s*\S", line)
            assert not plain_key or "#" in line, f"{file.name}: {line}"


def _printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_command_line_starts_without_torch():
    code = "import sys, cl_platform.cli.train; print('torch' in sys.modules, 'avalanche' in sys.modules)"
    assert _printed(code) == "False False"


def test_running_imports_nothing_heavy_unless_asked_for(tmp_path):
    code = (
        "import sys, cl_platform.backbones; print('timm' in sys.modules);"
        "from cl_platform.cli.train import train;"
        f"train(['strategy=nmc', 'logger=[]', 'report.html=false', 'trainer.progress=false', 'run_dir={tmp_path}/r',"
        "'scenario.num_tasks=2', 'scenario.train_per_class=4', 'scenario.test_per_class=4']);"
        "print('cl_platform.report' in sys.modules, 'avalanche' in sys.modules)"
    )
    first, *_, last = _printed(code).splitlines()
    assert (first, last) == ("False", "False False")
