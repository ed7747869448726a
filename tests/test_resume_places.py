"""Where a run goes and what is said about it."""

import pytest

from cl_platform.cli.compose import compose
from cl_platform.errors import UserError
from cl_platform.resume import locate
from cl_platform.run_config import parse


@pytest.fixture
def config(tmp_path):
    def make(*overrides: str):
        return parse(compose(["strategy=nmc", f"output_root={tmp_path / 'out'}", *overrides]))

    return make


@pytest.fixture(autouse=True)
def _heard(monkeypatch, caplog):
    import logging

    monkeypatch.setattr(logging.getLogger("cl_platform"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("cl_platform"), "disabled", False)  # as Hydra leaves it in the same process
    caplog.set_level("INFO", logger="cl_platform")


def test_a_resume_with_nothing_to_go_on_with_says_that_a_new_run_starts(config, tmp_path, caplog):
    path, checkpoint = locate(config("resume=auto"))
    assert checkpoint is None and path.parent == tmp_path / "out" / "split_digits" / "nmc"
    assert caplog.messages == [f"resume=auto: there is no run in {path.parent} to go on with, a new one starts"]


def test_a_resume_in_an_empty_run_folder_says_so(config, tmp_path, caplog):
    path, checkpoint = locate(config("resume=auto", f"run_dir={tmp_path / 'run'}"))
    assert (path, checkpoint) == (tmp_path / "run", None)
    assert caplog.messages == [f"resume=auto: there is no run in {path} to go on with, a new one starts"]


@pytest.mark.parametrize("how", ["auto", "the folder"])
def test_a_run_stopped_within_its_first_task_says_that_it_starts_anew(config, tmp_path, caplog, how):
    import yaml

    run = tmp_path / "run"
    run.mkdir()
    words = [f"run_dir={run}", f"resume={'auto' if how == 'auto' else run}"]
    (run / "config.yaml").write_text(yaml.safe_dump(config(*words).raw))
    assert locate(config(*words)) == (run, None)
    assert len(caplog.messages) == 1 and f"no task of the run in {run} was finished" in caplog.text


def test_a_new_run_says_nothing(config, caplog):
    assert locate(config())[1] is None
    assert not caplog.messages


@pytest.mark.parametrize("word", ["true", "false", "''"])
def test_other_words_than_auto_or_a_folder_are_refused(config, word):
    with pytest.raises(UserError, match="^resume.*must be auto, null or a run folder"):
        locate(config(f"resume={word}"))


def test_a_folder_may_be_named_by_a_number(config):
    assert str(locate(config("run_dir=2024"))[0]) == "2024"


def test_a_folder_that_another_run_took_in_the_same_second_is_left_to_it(tmp_path):
    from cl_platform.run_folder import RunFolder

    RunFolder(tmp_path / "new" / "run", fresh=True).close()
    with pytest.raises(FileExistsError):
        RunFolder(tmp_path / "new" / "run", fresh=True)


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(config, monkeypatch):
    from cl_platform import run

    taken = []

    def locate_slowly(wanted):  # the other run is quicker
        path, checkpoint = locate(wanted)
        if not taken:
            taken.append(path)
        return path, checkpoint

    real = run.Course

    def course(settings, path, *rest):
        if len(taken) == 1:
            taken.append(path)
            path.mkdir(parents=True)
        return real(settings, path, *rest)

    monkeypatch.setattr(run, "locate", locate_slowly)
    monkeypatch.setattr(run, "Course", course)
    small = ("scenario.train_per_class=4", "scenario.test_per_class=2", "report.html=false", "logger=[]")
    result = run.run(config(*small, "trainer.progress=false"))
    assert result.path != taken[0] and not list(taken[0].iterdir())


def started(config, run, *words, change=lambda raw: None):
    """A run folder as a run of other words or of an older version left it."""
    import yaml

    run.mkdir()
    raw = config(*words).raw
    change(raw)
    (run / "config.yaml").write_text(yaml.safe_dump(raw))


def test_a_key_that_an_older_version_did_not_know_counts_at_its_default(config, tmp_path):
    def older(raw):
        del raw["evaluation"]["loss"], raw["optimizer"]["gamma"], raw["strategy"]["nmc"]["mean"]

    started(config, tmp_path / "run", change=older)
    assert locate(config(f"run_dir={tmp_path / 'run'}", "resume=auto"))[0] == tmp_path / "run"
    with pytest.raises(UserError, match=r"another evaluation\.loss"):
        locate(config(f"run_dir={tmp_path / 'run'}", "resume=auto", "evaluation.loss=true"))
    with pytest.raises(UserError, match=r"another strategy\.nmc\.mean"):
        locate(config(f"run_dir={tmp_path / 'run'}", "resume=auto", "strategy.nmc.mean=raw"))


def test_a_key_that_is_no_more_is_named(config, tmp_path):
    started(config, tmp_path / "run", change=lambda raw: raw["evaluation"].update(speed=3))
    with pytest.raises(UserError, match=r"started with evaluation\.speed=3, which this version does not take"):
        locate(config(f"run_dir={tmp_path / 'run'}", "resume=auto"))
