"""The never-learnt reference: its configuration, its price, its cache, and what may not be kept."""

from __future__ import annotations

import json

import pytest
import yaml

from cl_platform.errors import UserError
from cl_platform.unlearning import reference as ref
from cl_platform.unlearning.reference import Maker, Price, config_sha256, price_of, reference_config, remove_stale

CONFIG = {
    "strategy": {"s_lora": {"rank": 4, "scale": 0.5}},
    "scenario": {"kind": "split_digits", "num_tasks": 5, "skip_tasks": [4]},
    "evaluation": {"grid": "adaptive", "cache_bytes": 100},
    "trainer": {"max_epochs": 2, "progress": True},
    "report": {"html": True},
    "logger": {"tensorboard": {}},
    "seed": 3,
    "run_dir": "somewhere",
}


def changed(**groups):
    return {**CONFIG, **{key: {**CONFIG.get(key, {}), **value} for key, value in groups.items()}}


def test_the_reference_leaves_out_all_forgotten_tasks_and_only_watches_less():
    made = reference_config(CONFIG, [1, 2])
    assert made["scenario"]["skip_tasks"] == [1, 2, 4]
    assert made["seed"] == 3
    assert made["strategy"] == CONFIG["strategy"]
    assert made["evaluation"] == {"grid": "off", "cache_bytes": 100}
    assert made["logger"] == {}
    assert CONFIG["scenario"]["skip_tasks"] == [4]  # the run's own configuration stays as it was
    assert reference_config(CONFIG, [1], seed=9)["seed"] == 9


def test_a_sequence_of_instructions_stays_without_a_word_about_the_forgotten():
    given = {**CONFIG, "unlearning": {"sequence": "R0 T1 T2 R1 F2", "method": "auto"}}
    assert reference_config(given, [2])["unlearning"] == {"sequence": "R0 T1 R1"}
    assert "unlearning" not in reference_config({**CONFIG, "unlearning": {"requests": [{"forget": 1}]}}, [1])


def test_requests_are_no_part_of_what_a_reference_learns():
    given = {**CONFIG, "unlearning": {"requests": [{"after_task": 2, "forget": 1}], "sequence": None}}
    assert "unlearning" not in reference_config(given, [1])


@pytest.mark.parametrize(
    "group, value, same",
    [
        ("trainer", {"progress": False}, True),
        ("report", {"html": False}, True),
        ("evaluation", {"grid": "off"}, True),
        ("data", {"root": "elsewhere"}, True),
        ("evaluation", {"cache_bytes": 7}, False),
        ("trainer", {"max_epochs": 3}, False),
        ("strategy", {"s_lora": {"rank": 8}}, False),
        ("scenario", {"skip_tasks": [1, 4]}, False),
    ],
)
def test_the_digest_of_a_configuration_counts_what_changes_the_learning(group, value, same):
    assert (config_sha256(changed(**{group: value})) == config_sha256(CONFIG)) is same


def test_seed_and_sequence_count_too():
    assert config_sha256({**CONFIG, "seed": 4}) != config_sha256(CONFIG)
    assert config_sha256({**CONFIG, "unlearning": {"sequence": "R0"}}) != config_sha256(CONFIG)
    assert config_sha256({**CONFIG, "run_dir": "x", "output_root": "y", "resume": "auto"}) == config_sha256(CONFIG)


def run_of(path, **cost):
    path.mkdir(parents=True)
    tasks = [{"task_id": t, "train": n} for t, n in enumerate((100, 300, 100))]
    (path / "environment.json").write_text(json.dumps({"dataset": {"tasks": tasks, "digest": "d"}}))
    if cost:
        (path / "cost.json").write_text(json.dumps(cost))
    return path


def test_the_price_is_the_kept_tasks_share_of_what_the_run_has_cost(tmp_path):
    run = run_of(tmp_path / "a", updates=1000, images_trained=5000, seconds_total=50.0)
    assert price_of(run, [1]) == Price(400, 2000, 20)
    assert str(price_of(run, [1]).times(3)) == "about 1,200 steps, 6,000 images, 60 s"
    assert "unknown" in str(price_of(run_of(tmp_path / "b"), [1]))


class Trainer:
    """Trains nothing, and leaves what a run leaves."""

    def __init__(self):
        self.calls = []

    def __call__(self, config, folder):
        import hashlib

        import torch
        from safetensors.torch import save

        self.calls.append(config)
        place = folder / "checkpoints" / "task_0"
        place.mkdir(parents=True, exist_ok=True)
        blob = save({"a": torch.zeros(1)})
        (place / "model.safetensors").write_bytes(blob)
        state = {"position": 0, "learnt": [0], "model_sha256": hashlib.sha256(blob).hexdigest()}
        (place / "state.json").write_text(json.dumps(state))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.json").write_text("{}")


def maker(tmp_path, trainer, gone=(1,), numerics=None, owner="run a", data="d", **config):
    run = tmp_path / "run"
    if not run.exists():
        run_of(run, updates=10, images_trained=10, seconds_total=1.0)
    given = {**CONFIG, "output_root": str(tmp_path / "out"), **config}
    sources = {"data": data, "code": "c"}
    return Maker(
        run, given, gone, numerics or {"torch": "2"}, trainer, lambda made: sources, lambda line: None, owner
    )  # fmt: skip


def test_a_reference_is_trained_once_for_each_configuration_seed_and_fingerprint(tmp_path):
    trainer = Trainer()
    first = maker(tmp_path, trainer).obtain()
    assert not first.cached
    assert maker(tmp_path, trainer).obtain().cached
    assert len(trainer.calls) == 1
    assert first.folder.parent == tmp_path / "out" / "references"
    for other in (
        maker(tmp_path, trainer, numerics={"torch": "3"}),
        maker(tmp_path, trainer, gone=(1, 2)),
        maker(tmp_path, trainer, seed=4),
        maker(tmp_path, trainer, data="other images"),
    ):
        assert not other.obtain().cached
    assert not maker(tmp_path, trainer).obtain(seed=5).cached
    assert len({call["run_dir"] for call in trainer.calls}) == 6


def test_what_a_run_writes_after_it_relearnt_without_the_task_names_no_other_reference(tmp_path):
    trainer = Trainer()
    first = maker(tmp_path, trainer).obtain()
    run_of(tmp_path / "after", updates=7)
    left = json.loads((tmp_path / "after" / "environment.json").read_text())
    left["dataset"]["digest"] = "of two tasks"
    (tmp_path / "run" / "environment.json").write_text(json.dumps(left))
    again = maker(tmp_path, trainer).obtain()
    assert again.cached
    assert again.folder == first.folder


def test_a_reference_that_broke_off_is_gone_on_with(tmp_path):
    trainer = Trainer()
    folder = maker(tmp_path, trainer).obtain().folder
    (folder / "metrics.json").unlink()
    again = maker(tmp_path, trainer).obtain()
    assert not again.cached
    assert again.folder == folder
    assert trainer.calls[-1]["resume"] == "auto"


def test_references_that_learnt_a_task_forgotten_since_are_deleted_with_their_shadows(tmp_path):
    trainer = Trainer()
    first, shadow = maker(tmp_path, trainer).obtain(), maker(tmp_path, trainer).obtain(seed=8)
    config = maker(tmp_path, trainer).config
    assert remove_stale(config, [1], "run a") == []
    assert remove_stale(config, [1, 2], "another run") == []
    assert sorted(remove_stale(config, [1, 2], "run a")) == sorted([first.folder.name, shadow.folder.name])
    assert not first.folder.exists()


def test_a_reference_that_another_run_uses_stays_for_it(tmp_path):
    trainer = Trainer()
    first = maker(tmp_path, trainer).obtain()
    assert maker(tmp_path, trainer, owner="run b").obtain().cached
    assert remove_stale(maker(tmp_path, trainer).config, [1, 2], "run a") == []
    assert ref.read_json(first.folder / ref.NOTE)["owners"] == ["run b"]
    assert remove_stale(maker(tmp_path, trainer).config, [1, 2], "run b") == [first.folder.name]


def test_what_is_no_run_folder_has_no_configuration(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        ref.read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("- a list")
    with pytest.raises(UserError, match="cannot be understood"):
        ref.read_config(tmp_path)
