"""Rollback: the bytes of a run that never saw the task, whatever the strategy."""

import json
import shutil

import pytest
from shelf import Shelf, forget, learn, newest
from tiny import SHAPED

from cl_platform.errors import UserError
from cl_platform.requests import paused
from cl_platform.run_folder import checkpoint_positions
from cl_platform.unlearning.canonical import compare_files
from cl_platform.unlearning.engine import Wish
from cl_platform.unlearning.forgotten import read

pytestmark = pytest.mark.usefixtures("tiny_backbone")

PLAIN = "strategy=linear_probe"
CODA = ("strategy.coda_prompt.num_components=10", f"strategy.coda_prompt.layers={SHAPED['layers']}")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("shelf"))


def same(run, reference):
    found = compare_files(newest(run), newest(reference))
    assert found.equal, found.differences
    assert (run / "accuracy_matrix.csv").read_text() == (reference / "accuracy_matrix.csv").read_text()
    return True


@pytest.mark.parametrize(
    "words", [("strategy=finetune",), ("strategy=er",), ("strategy=coda_prompt", *CODA)], ids=lambda words: words[0]
)
def test_relearning_gives_the_bytes_of_a_run_that_never_saw_the_task(shelf, tmp_path, words):
    run = shelf.copy(tmp_path / "run", *words, "scenario.skip_tasks=[3,4]")
    reference = shelf.reference(*words, "scenario.skip_tasks=[1,3,4]")
    assert not compare_files(newest(run), newest(reference)).equal
    assert forget(run, 1, "rollback")["level"] == "E-bit"
    assert same(run, reference)
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (run, reference))
    assert ours["acc"] == theirs["acc"] and ours["forgetting"] == theirs["forgetting"]


def test_a_stream_goes_on_after_relearning_as_if_the_task_had_never_come(shelf, tmp_path):
    run = tmp_path / "run"
    requests = "{after_task: 2, forget: 1, method: rollback}, {after_task: 2, forget: 2, method: rollback}"
    learn(run, PLAIN, "scenario.skip_tasks=[4]", f"unlearning.requests=[{requests}]")
    assert same(run, shelf.reference(PLAIN, "scenario.skip_tasks=[1,2,4]"))
    assert [entry.task_id for entry in read(run).entries] == [1, 2]


def test_forgetting_the_newest_task_relearns_nothing(shelf, tmp_path, monkeypatch):
    from cl_platform.run import Course

    run = shelf.copy(tmp_path / "run", PLAIN, "scenario.skip_tasks=[3,4]")
    reference = shelf.reference(PLAIN, "scenario.skip_tasks=[2,3,4]")
    monkeypatch.setattr(Course, "_fit", lambda *_: pytest.fail("something was trained"))
    with paused(run) as folder:
        assert folder.plan(Wish(2, "rollback")).option.price.tasks == ()
        folder.carry_out(Wish(2, "rollback"))
    assert same(run, reference)


def test_a_later_request_leaves_out_both_tasks(shelf, tmp_path):
    run = shelf.copy(tmp_path / "run", PLAIN, "scenario.skip_tasks=[3,4]")
    forget(run, 2, "rollback")
    forget(run, 0, "rollback")
    assert same(run, shelf.reference(PLAIN, "scenario.skip_tasks=[0,2,3,4]"))
    with paused(run) as folder, pytest.raises(UserError, match="forgotten already"):
        folder.plan(Wish(2))
    with paused(run) as folder, pytest.raises(UserError, match="delete the run folder"):
        folder.plan(Wish(1, "rollback"))


def test_no_file_of_the_old_history_is_left(shelf, tmp_path):
    run = shelf.copy(tmp_path / "run", PLAIN, "scenario.skip_tasks=[3,4]")
    (run / "report.html").write_text("drawn before")
    (run / "notes.txt").write_text("by hand")
    forget(run, 1, "rollback")
    assert checkpoint_positions(run) == [0, 1]
    assert (run / "notes.txt").exists() and not (run / "report.html").exists()
    states = [json.loads((run / "checkpoints" / f"task_{p}" / "state.json").read_text()) for p in (0, 1)]
    assert [state["learnt"] for state in states] == [[0], [0, 2]]
    assert "task_1" not in (run / "accuracy_matrix.csv").read_text()
    assert not (run / "unlearning" / "open").exists()


def test_the_price_is_said_before_anything_is_done(shelf):
    with paused(shelf.reference(PLAIN, "scenario.skip_tasks=[3,4]")) as folder:
        price = folder.plan(Wish(0, "rollback")).option.price
    assert price.tasks == (1, 2)
    assert (price.images, price.steps) == (24, 4)  # 2 tasks of 12 images in batches of 6
    assert price.seconds is not None and price.seconds > 0


def test_without_the_earlier_checkpoint_it_starts_from_the_initial_weights(shelf, tmp_path):
    run = shelf.copy(tmp_path / "run", PLAIN, "scenario.skip_tasks=[3,4]")
    shutil.rmtree(run / "checkpoints" / "task_0")
    with paused(run) as folder:
        assert folder.plan(Wish(1, "rollback")).option.price.tasks == (0, 2)
        folder.carry_out(Wish(1, "rollback"))
    assert same(run, shelf.reference(PLAIN, "scenario.skip_tasks=[1,3,4]"))


def test_a_crash_while_relearning_is_finished_by_the_next_start(shelf, tmp_path, monkeypatch):
    from cl_platform.run import Course

    run = shelf.copy(tmp_path / "run", PLAIN, "scenario.skip_tasks=[3,4]")
    real, fits = Course._fit, []

    def crash_in_the_second(self, phase):
        fits.append(phase.task.task_id)
        if len(fits) == 2:
            raise KeyboardInterrupt
        real(self, phase)

    monkeypatch.setattr(Course, "_fit", crash_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        forget(run, 0, "rollback")
    with paused(run) as folder:
        assert folder.unfinished == 0
        certificate = folder.carry_out()
    assert fits == [1, 2, 2]  # what was relearnt before the crash is not relearnt again
    assert same(run, shelf.reference(PLAIN, "scenario.skip_tasks=[0,3,4]"))
    assert certificate["state"] == "done"
    events = [json.loads(line)["event"] for line in (run / "unlearning" / "audit.jsonl").read_text().splitlines()]
    assert "resumed_after_crash" in events and events[-1] == "request_closed"


def test_missing_data_of_later_tasks_are_named(shelf, monkeypatch):
    import cl_platform.site as site

    def gone(*_):
        raise UserError("data.root", "nowhere", "holds no images", "Provide them")

    with paused(shelf.reference(PLAIN, "scenario.skip_tasks=[3,4]")) as folder:
        monkeypatch.setattr(site, "stream_of", gone)
        with pytest.raises(UserError, match=r"the data of tasks 2 cannot be had"):
            folder.plan(Wish(1, "rollback"))


@pytest.mark.parametrize("foresees, base", [("nothing", 1), ("end", 0), ("length", -1)])
def test_what_looks_ahead_goes_back_further(tmp_path, foresees, base):
    """A strategy that works at the stream's end has to come to the new end; one that divides its length, to begin."""
    from cl_platform.unlearning.rollback import way_back

    for position in range(3):
        (tmp_path / "checkpoints" / f"task_{position}").mkdir(parents=True)
    assert way_back(tmp_path, [0, 1, 2], 3, [2], foresees).base == base
