"""The README is kept true: its first screen holds the two commands, its commands can be typed, its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
PLACEHOLDERS = {
    "strategy=S": "strategy=coda_prompt",
    "plugins=[./mine.py]": "plugins=[]",
    "strategy=mine": "strategy=er",
}
"""What stands for something of the reader's own, and what is tried in its place."""


def _commands(text: str) -> list[str]:
    """Commands of a shell text: lines joined where a backslash ends them, without comments, split at ``&&``."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.sub(r"(^|\s)#.*$", "", line).split("&&")]
    return [" ".join(part.split()) for part in parts if part.strip()]


# commands stand in blocks and, in between, in the running text
SPANS = [
    " ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", TEXT, flags=re.S))
]
COMMANDS = [command for block in BLOCKS for command in _commands(block)] + SPANS
TRAININGS = [
    c for c in COMMANDS if re.match(r"(python train\.py|cl-platform train|python -m cl_platform train) \S*[=-]", c)
]
OTHERS = [c for c in COMMANDS if re.match(r"(cl-platform|python -m cl_platform) (?!train\b)\S+ ?", c)]


def test_the_first_screen_holds_exactly_two_commands():
    first_screen = TEXT.split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", first_screen, re.S)
    assert [block.strip() for block in blocks] == [
        "pip install -e . && python train.py",
        "pip install -e '.[test]' && pytest",
    ]


def test_every_command_of_a_block_is_looked_at():
    known = (*TRAININGS, *OTHERS, "python train.py")
    for command in (command for block in BLOCKS for command in _commands(block)):
        assert command in known or command.split()[0] in ("pip", "pytest"), command
    assert len(TRAININGS) > 5
    assert len(OTHERS) > 5


def test_every_training_can_be_composed():
    from cl_platform.cli.compose import compose, sweep_runs
    from cl_platform.cli.sweep import with_experiment
    from cl_platform.run_config import parse
    from cl_platform.strategies import build_strategies

    for command in dict.fromkeys(TRAININGS):
        words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command.partition("train")[2])[0:]]
        words = [word for word in words if word not in (".py", "--help", "...") and not word.startswith("hydra/")]
        words = with_experiment(words)
        overrides = [word for word in words if not word.startswith("-")]
        runs = sweep_runs(overrides) if {"-m", "--multirun"} & {*words} else [overrides]
        config = parse(compose(runs[-1]))
        build_strategies(config.strategy)


def test_every_other_command_is_one_with_such_options():
    import typer
    from typer.main import get_command

    from cl_platform.cli.app import app

    group = get_command(app)
    parent = typer.Context(group, info_name="cl-platform")
    for command in dict.fromkeys(OTHERS):
        name, *words = shlex.split(command.removeprefix("python -m cl_platform ").removeprefix("cl-platform "))
        if name.startswith("--"):
            group.make_context("cl-platform", [name], resilient_parsing=True)
            continue
        found = group.get_command(parent, name)
        assert found is not None, command
        found.make_context(name, [word for word in words if word != "..."], parent=parent)


def test_the_table_of_commands_is_complete():
    from typer.main import get_command

    from cl_platform.cli.app import app

    table = re.search(r"\| command \| what it does \|\n(.*?)\n\n", TEXT, re.S)
    assert table
    first_column = " ".join(line.split("|")[1] for line in table.group(1).splitlines())
    named = {span.split()[0] for span in re.findall(r"`([^`]+)`", first_column)}
    assert named == set(get_command(app).commands)


def test_every_extra_that_is_named_exists():
    import tomllib

    extras = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    listed = re.search(r"- Extras: (.*?)\n-", TEXT, re.S)
    assert listed
    names = [name for name in re.findall(r"`([a-z]+)`", listed.group(1)) if name != "datasets"]
    assert sorted(names) == sorted(set(extras) - {"test"})


@pytest.mark.parametrize("number", range(len(re.findall(r"```python\n", TEXT))))
def test_the_python_of_the_readme_runs(number, capsys):
    block = re.findall(r"```python\n(.*?)```", TEXT, re.S)[number]
    exec(compile(block, "README.md", "exec"), {})
    if "fit(" not in block:
        return
    accuracy, answers, level = capsys.readouterr().out.strip().splitlines()
    value, path = accuracy.split()
    assert 0.3 < float(value) <= 1
    assert (Path(path) / "metrics.json").exists()
    assert answers.count("(") >= 3
    assert level == "E-bit"
