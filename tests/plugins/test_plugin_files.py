"""A file or module of one's own brings strategies and more, and says what is wrong with it in one line."""

import json
import textwrap
from pathlib import Path

import pytest

from cl_platform import plugins, registry
from cl_platform.cli.app import run as command
from cl_platform.cli.compose import compose
from cl_platform.cli.train import train
from cl_platform.errors import UserError
from cl_platform.run_config import parse

EXAMPLE = Path(__file__).parent / "example_package" / "cl_example" / "everything.py"

STRATEGY = """
    from cl_platform.registry import strategies
    from cl_platform.strategies.finetune import Finetune

    {api}
    @strategies.register("{name}")
    class Mine(Finetune):
        '''A finetune of one's own.'''
        name = "{name}"
"""


def written(folder, text, file="mine.py", **words):
    path = folder / file
    path.write_text(
        textwrap.dedent(text).format(**{"api": "", "name": "mine", **words}) if words or "{" in text else text
    )
    return path


def test_one_command_trains_a_strategy_scenario_and_backbone_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLE.parent)
    code = train(["plugins=[./everything.py]", "strategy=patient", "scenario=striped_digits", "backbone=pixels",
                  "strategy.patient.lambda=0.5", "trainer.max_epochs=1", "trainer.progress=false", "logger=[]",
                  "evaluation=off", "report.html=false", f"run_dir={tmp_path / 'run'}"])  # fmt: skip
    assert code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["first_task_left"]["value"] == found["acc"]["per_task"][0]
    assert found["first_task_left"]["text"] == "What is left of the first task at the end."
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert f"- {EXAMPLE}" in config  # found again from any folder
    monkeypatch.chdir(tmp_path)
    import yaml

    raw = yaml.safe_load(config)
    assert raw["strategy"] == {"patient": {"smoothing": 0.25, "lambda": 0.5, "optimizer": {"name": "sgd", "lr": 0.02}}}
    made = parse(raw)
    assert made.optimizer.lr == 0.02
    assert made.scenario.stripe == 2
    assert made.scenario.train_per_class == 8
    assert made.backbone.width == 16


def test_an_unlearning_method_and_a_buffer_policy_are_chosen_like_those_that_are_built_in():
    raw = compose([f"plugins=['{EXAMPLE}']", "strategy=er", "strategy.er.buffer.policy=newest", "unlearning=fade",
                   "unlearning.fade.share=0.25"])  # fmt: skip
    made = parse(raw)
    assert made.unlearning.method == "approximate:fade"
    assert made.unlearning.methods == {"fade": {"share": 0.25}}
    from cl_platform.memory.build import build_buffer
    from cl_platform.memory.policies import Offers
    from cl_platform.strategies.composition import build_strategies

    er = build_strategies(made.strategy).strategies[0]
    policy = build_buffer(er.config.buffer, 0, (3, 8, 8)).policy
    decided = policy.decide(Offers.of([1, 2, 3], [0, 0, 0], [5, 6, 7]), None)
    assert type(policy).__name__ == "Newest"
    assert decided.slots.tolist() == [0, 1, 2]


@pytest.mark.parametrize("word, said", [
    ("strategy.patient.smothing=0.1", ["strategy.patient.smothing", "Did you mean strategy.patient.smoothing"]),
    ("strategy.patient.smoothing=much", ["strategy.patient.smoothing=much", "must be a number"]),
    ("strategy.patient.smoothing=2", ["strategy.patient.smoothing=2", "at most 1"]),
    ("scenario.stripe=0", ["scenario.stripe=0", "at least 1"]),
    ("backbone.widht=3", ["backbone.widht", "Did you mean backbone.width"]),
    ("strategy=patent", ["strategy=patent", "patient"]),
])  # fmt: skip
def test_overrides_of_a_plugins_keys_are_checked(word, said, capsys, tmp_path):
    words = ["strategy=patient", "scenario=striped_digits", "backbone=pixels"]
    words = [w for w in words if w.partition("=")[0] != word.partition("=")[0]]
    assert train([f"plugins=['{EXAMPLE}']", *words, word, f"output_root={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in said:
        assert part in err
    assert not list(tmp_path.iterdir())


BROKEN = {
    "no such file": (None, ["there is no such file"]),
    "a missing package": ("import numpyy\n", ["No module named 'numpyy'", "line 1 of mine.py"]),
    "a syntax error": ("def mine(:\n", ["SyntaxError", "line 1 of mine.py"]),
    "an exit": ("raise SystemExit(3)\n", ["SystemExit: 3"]),
    "nothing in it": ("x = 1\n", ["registers nothing"]),
    "another version": (STRATEGY.replace("{api}", "CL_PLATFORM_API = 99"), ["CL_PLATFORM_API=99", "here it is 1"]),
    "a taken name": (STRATEGY.replace("{name}", "er"), ["strategy=er", "registered twice", "er.ER", "mine.py"]),
    "a metric that is built in": (
        "from cl_platform.registry import metrics\n\n@metrics.register('acc')\ndef acc(m):\n    return 1.0\n",
        ["metric=acc", "is built in"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_used_is_one_line_with_the_cause(case, tmp_path, capsys):
    text, said = BROKEN[case]
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(textwrap.dedent(text).replace("{api}", "").replace("{name}", "mine"))
    before = registry.strategies.names()
    assert train([f"plugins=['{path}']", "strategy=finetune", f"output_root={tmp_path / 'out'}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    for part in said:
        assert part in err
    assert registry.strategies.names() == before
    assert not (tmp_path / "out").exists()


def test_what_a_failing_file_had_registered_is_taken_back(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(STRATEGY).format(api="", name="mine") + "\n1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        plugins.load([str(path)])
    assert "mine" not in registry.strategies


def test_list_and_describe_know_a_plugin(tmp_path, capsys):
    assert command(["list", "strategies", "--plugin", str(EXAMPLE), "--json"]) == 0
    listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert listed["patient"]["summary"] == "Smoothed labels on the whole network (Nobody et al., 2026)."
    assert listed["patient"]["origin"] == str(EXAMPLE)
    assert listed["coda_prompt"]["origin"] == "built in"
    assert "CVPR 2023" in listed["coda_prompt"]["summary"]
    assert command(["describe", "patient", "--plugin", str(EXAMPLE), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    keys = {key["key"]: key for key in facts["parameters"]}
    assert keys["strategy.patient.smoothing"]["default"] == 0.25
    assert keys["strategy.patient.lambda"]["doc"] == "weight of the loss"
    assert set(facts["forgetting"]["leaks"]) == {"L-01", "L-05", "L-07"}


def test_several_values_of_a_plugins_key_are_a_sweep(tmp_path, capsys):
    from cl_platform.cli.compose import load_plugins, sweep_runs

    load_plugins([f"plugins=['{EXAMPLE}']"])
    runs = sweep_runs(["strategy=patient,finetune", "seed=0,1"])
    assert ["strategy=patient", "seed=1"] in runs
