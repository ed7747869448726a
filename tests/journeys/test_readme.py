"""The README is kept true: its first screen holds the two commands, its Python runs."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_first_screen_holds_exactly_two_commands():
    first_screen = README.read_text().split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", first_screen, re.S)
    assert [block.strip() for block in blocks] == [
        "pip install -e . && python train.py",
        "pip install -e '.[test]' && pytest",
    ]


def test_the_python_of_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    value, path = capsys.readouterr().out.split()
    assert 0.3 < float(value) <= 1
    assert (Path(path) / "metrics.json").exists()
