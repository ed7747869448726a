"""The platform from a script or a notebook: build a stream, fit, predict, forget."""

import dataclasses
import itertools
import logging
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Subset, TensorDataset

import cl_platform
from cl_platform import (
    Run,
    UserError,
    api,
    build_stream,
    fit,
    parse,
    plugins,
    registry,
    stream_from_datasets,
    stream_from_folder,
)
from cl_platform.memory import BufferConfig
from cl_platform.strategies.er import ER
from cl_platform.strategies.finetune import Finetune

QUICK = ("report.html=false", "report.tensorboard_figures=false", "logger=[]", "evaluation=off")


def _digits(per_class=6, classes=6):
    values, labels = load_digits(return_X_y=True)
    images = torch.tensor(values / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    data = TensorDataset(images, torch.tensor(labels))
    rows = [np.flatnonzero(labels == c) for c in range(classes)]
    train = Subset(data, [int(i) for of_class in rows for i in of_class[:per_class]])
    test = Subset(data, [int(i) for of_class in rows for i in of_class[-per_class:]])
    return train, test, images[rows[0][-2:].tolist()]


@pytest.fixture(scope="module")
def given():
    train, test, _ = _digits()
    return stream_from_datasets(train, test, 3, name="my_digits")


@pytest.fixture(scope="module")
def learnt(given, tmp_path_factory):
    """A run of the given stream; a test that changes it copies its folder."""
    return fit(given, "nmc", *QUICK, run_dir=tmp_path_factory.mktemp("learnt") / "run")


class Stop(Exception):
    """Carries the configuration that a run would have had."""


@pytest.fixture
def configured(monkeypatch):
    """Call as ``fit``: the configuration of the run that it would start."""

    def stop(config):
        raise Stop(config)

    monkeypatch.setattr(api, "run", stop)

    def call(*arguments, **keys):
        with pytest.raises(Stop) as stopped:
            fit(*arguments, **keys)
        return stopped.value.args[0]

    return call


def test_a_given_stream_is_learnt_asked_and_forgotten_in_one_session(given, learnt, tmp_path):
    run = Run.open(shutil.copytree(learnt.path, tmp_path / "run"), stream=given)
    assert 0.3 < run.metrics["acc"]["value"] <= 1
    assert run.evaluate().same_as_recorded
    zeros = _digits()[2]
    answers = run.predict(zeros, top_k=6)
    assert [len(answer.classes) for answer in answers] == [6, 6]

    certificate = run.forget(1)
    assert (certificate["level"], certificate["method"]["used"]) == ("E-bit", "drop")
    assert {name for name, _ in run.predict(zeros, top_k=6)[0].classes} == set("0145")
    assert run.forget(0, "rollback")["level"] == "E-bit"
    assert run.class_names == ["4", "5"]
    assert run.verify().passed

    again = Run.open(run.path, stream=given)
    assert again.evaluate().spaces == run.evaluate().spaces


def test_a_run_folder_says_what_only_the_program_that_made_it_has(given, learnt, tmp_path):
    run = Run.open(learnt.path)
    assert run.predict(_digits()[2])[0].classes  # answering needs no data
    for needing_images in (run.evaluate, lambda: run.forget(1, "rollback")):
        with pytest.raises(UserError, match=r"given from Python, no file holds them.*Run\.open\(RUN, stream=STREAM\)"):
            needing_images()
    copy = shutil.copytree(learnt.path, tmp_path / "copy")
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("  nmc:", "  own_class:"))
    with pytest.raises(UserError, match="its strategy own_class is not known here"):
        Run.open(copy)
    train, test, _ = _digits(per_class=5)
    other = stream_from_datasets(train, test, 3, name="my_digits")
    with pytest.raises(UserError, match="other images, labels or tasks"):
        Run.open(run.path, stream=other).evaluate()
    with pytest.raises(UserError, match=r"another scenario\.kind"):
        fit(other, "nmc", *QUICK, "resume=auto", run_dir=run.path)


def test_fit_leaves_what_the_command_leaves(small_run, tmp_path):
    made = small_run("strategy=nmc", "scenario.num_tasks=2", f"run_dir={tmp_path / 'command'}")
    images = {"num_tasks": 2, "train_per_class": 12, "test_per_class": 6}
    keys = {"scenario": images, "trainer.max_epochs": 1, "report.html": False}
    run = fit("split_digits", "nmc", keys, "report.tensorboard_figures=false", run_dir=tmp_path / "python")
    files = [{str(f.relative_to(r)) for f in r.rglob("*") if "events" not in f.name} for r in (made.path, run.path)]
    assert files[0] == files[1]
    model = "checkpoints/task_1/model.safetensors"
    assert (made.path / model).read_bytes() == (run.path / model).read_bytes()
    assert "2 tasks" in (run.path / "run.log").read_text()


def test_the_stream_of_a_folder_stands_in_the_runs_configuration(tmp_path, configured):
    tree = tmp_path / "images"
    for split, name in itertools.product(("train", "test"), ("ant", "bee", "cat", "dog")):
        (tree / split / name).mkdir(parents=True)
        for number in range(3):
            noise = np.random.RandomState(len(name) + number).randint(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tree / split / name / f"{number}.png")
    stream = stream_from_folder(tree, 2, class_order=["dog", "cat", "bee", "ant"], test_per_class=2)
    config = configured(stream, "nmc", "scenario.augment=none", seed=3)
    assert config.given is None
    assert (config.scenario.kind, config.scenario.path) == ("image_folder", str(tree))
    assert config.scenario.class_order == ("dog", "cat", "bee", "ant")
    assert (config.scenario.test_per_class, config.scenario.augment, config.seed) == (2, "none", 3)
    assert configured(stream, "nmc").scenario.augment == "crop_flip"  # as scenario=image_folder has it
    written = parse(yaml.safe_load(yaml.safe_dump(config.raw)))
    assert build_stream(written.scenario, written.data, written.seed).digest == stream.digest
    changed = dataclasses.replace(stream, tasks=stream.tasks[:1])
    assert configured(changed, "nmc").given is changed  # no configuration says how it was made


@pytest.fixture
def own_names():
    """What a test registers is gone after it."""
    before = registry.strategies.state()
    yield
    registry.strategies.put_back(before)
    plugins._choices.get("strategy", {}).pop("own_way", None)


def test_strategies_are_named_listed_or_classes_of_ones_own(given, configured, own_names):
    class OwnWay(Finetune):
        """A class that nobody registered."""

    assert list(configured(given, OwnWay).strategy) == ["own_way"]
    assert list(configured(given, [ER, "own_way"]).strategy) == ["er", "own_way"]
    mine = ER(ER.Config(buffer=BufferConfig(size=50, policy="ring")))
    config = configured(given, [mine, "bfp"], "strategy.er.buffer.policy=reservoir")
    assert config.strategy["er"]["buffer"]["size"] == 50
    assert config.strategy["er"]["buffer"]["policy"] == "reservoir"
    assert list(configured(given).strategy) == ["coda_prompt"]
    assert list(configured(given, None, "experiment=derpp_cifar100").strategy) == ["derpp"]


def test_keys_come_as_texts_or_mappings(given, configured):
    config = configured(
        given, "er", "trainer.max_epochs=1", {"strategy.er.buffer.size": 50, "optimizer": {"lr": np.float64(1e-3)}},
        {"output_root": "a folder, with 'signs'", "scenario.augment": "crop", "trainer.gradient_clip_val": None},
    )  # fmt: skip
    assert config.trainer.max_epochs == 1
    assert config.strategy["er"]["buffer"]["size"] == 50
    assert config.optimizer.lr == 1e-3
    assert config.output_root == "a folder, with 'signs'"
    assert config.scenario.augment == "crop"
    assert config.trainer.progress is False
    assert configured(given, "er", {"trainer.progress": True}).trainer.progress is True


def test_tasks_of_a_given_stream_can_be_left_out(given, configured):
    from cl_platform.building import stream_of
    from cl_platform.unlearning.forgotten import Record

    config = configured(given, "nmc", "scenario.skip_tasks=[1]")
    stream = stream_of(config, Record())
    assert [(task.task_id, task.position) for task in stream.tasks] == [(0, 0), (2, 1)]
    assert (stream.left_out, stream.planned) == ((1,), given.planned)
    assert stream.digest != given.digest
    with pytest.raises(UserError, match=r"skip_tasks=\[7\].*tasks 0, 1, 2"):
        stream_of(configured(given, "nmc", "scenario.skip_tasks=[7]"), Record())


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3, "nmc"), "must be a stream or a scenario's name"),
        (("split_digit", "nmc"), "Did you mean split_digits"),
        (("split_digits", "nmmc"), "Did you mean nmc"),
        (("split_digits", int), "is no strategy"),
        (("split_digits", "nmc", 7), "must be texts or mappings"),
        (("split_digits", "nmc", "strategy=er"), "is the second argument of fit"),
        (("split_digits", "nmc", "trainer.max_epoch=2"), "Did you mean trainer.max_epochs"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        fit(*arguments)


def test_keys_that_would_make_a_given_stream_anew_are_refused(given):
    with pytest.raises(UserError, match=r"scenario\.num_tasks=2: the stream was given and stays as it is"):
        fit(given, "nmc", "scenario.num_tasks=2")


def test_a_program_hears_no_more_than_it_asked_for_while_the_log_file_gets_all():
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    root, log = logging.getLogger(), logging.getLogger("cl_platform")
    before = log.propagate, log.level, list(log.handlers)
    log.propagate, log.handlers = True, []
    log.setLevel(logging.NOTSET)
    root.addHandler(handler)
    try:
        with api._whole_log():
            assert log.isEnabledFor(logging.DEBUG)
            log.debug("for the file")
            log.warning("for all")
        assert log.propagate
    finally:
        root.removeHandler(handler)
        log.propagate, log.handlers = before[0], before[2]
        log.setLevel(before[1])
    assert [record.getMessage() for record in heard] == ["for all"]


def test_about_ten_public_names():
    assert len(cl_platform.__all__) <= 12
    for name in cl_platform.__all__:
        assert getattr(cl_platform, name) is not None
