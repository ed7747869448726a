"""Drop on a run folder and in a stream: what is left, what is said of it, and that the run goes on."""

import json
import shutil

import pytest
from shelf import Shelf, forget, learn, newest

from cl_platform.errors import UserError
from cl_platform.requests import paused
from cl_platform.run_folder import checkpoint_positions
from cl_platform.unlearning.canonical import compare_files
from cl_platform.unlearning.engine import Wish
from cl_platform.unlearning.forgotten import read

pytestmark = pytest.mark.usefixtures("tiny_backbone")

THREE, FOUR = "scenario.skip_tasks=[3,4]", "scenario.skip_tasks=[4]"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return Shelf(tmp_path_factory.mktemp("shelf"))


def refuse_data(*_):
    raise UserError("data.root", "nowhere", "holds no images", "Provide them")


@pytest.mark.parametrize("strategy", ["nmc", "s_lora"])
def test_a_stream_goes_on_without_a_dropped_task_as_if_it_had_never_come(shelf, tmp_path, strategy):
    request = "unlearning.requests=[{after_task: 2, forget: 1}]"
    run = tmp_path / "run"
    learn(run, f"strategy={strategy}", request, "unlearning.method=drop", FOUR)
    found = compare_files(newest(run), newest(shelf.reference(f"strategy={strategy}", "scenario.skip_tasks=[1,4]")))
    assert found.equal, found.differences
    certificate = json.loads((run / "unlearning" / "certificate.json").read_text())
    assert certificate["level"] == "E-bit" and certificate["target"]["trigger"] == "in_stream"
    rows = (run / "accuracy_matrix.csv").read_text().splitlines()
    assert rows[0] == "after_task,task_0,task_1,task_2,task_3"
    assert rows[-1].split(",")[0] == "3" and rows[-1].split(",")[2] == "NaN"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tasks"] == [0, 2, 3]
    assert metrics["forgotten"] == [{"task_id": 1, "after_task": 2, "reason": "forgotten"}]


@pytest.mark.parametrize("strategy, level", [("nmc", "E-bit"), ("linear_probe", "approximate")])
def test_the_level_is_exact_only_where_nothing_else_saw_the_task(shelf, tmp_path, strategy, level):
    run = shelf.copy(tmp_path / "run", f"strategy={strategy}", THREE)
    certificate = forget(run, 1, "drop")
    assert certificate["level"] == level
    assert bool(certificate["level_basis"]["leaks"]) == (level == "approximate")
    assert read(run).ids == (1,)


def test_auto_takes_the_cheapest_exact_way_and_says_why(shelf):
    with paused(shelf.reference("strategy=nmc", THREE)) as folder:
        choice = folder.plan(Wish(1))
    assert choice.option.method == "drop" and "no kept component has seen the task" in choice.reason
    with paused(shelf.reference("strategy=linear_probe", THREE)) as folder:
        choice = folder.plan(Wish(1))
    assert choice.option.method == "rollback" and "drop would be approximate" in choice.reason
    assert choice.option.price.tasks == (2,)


def test_auto_refuses_rather_than_approximates(shelf, tmp_path, monkeypatch):
    import cl_platform.site as site

    run = shelf.copy(tmp_path / "run", "strategy=linear_probe", THREE)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with paused(run) as folder:
        monkeypatch.setattr(site, "stream_of", refuse_data)
        with pytest.raises(UserError, match=r"no exact way.*data of tasks 2") as refused:
            folder.plan(Wish(1))
    assert "approximate" in refused.value.what_to_do
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_a_task_that_cannot_be_forgotten_is_refused(shelf, tmp_path):
    run = shelf.copy(tmp_path / "run", "strategy=nmc", THREE)
    forget(run, 1, "drop")
    for task_id, said in ((7, "unknown"), (3, "unknown"), (1, "forgotten already")):
        with paused(run) as folder, pytest.raises(UserError, match=said):
            folder.plan(Wish(task_id, "drop"))


def test_a_forgotten_task_stays_forgotten_when_the_run_goes_on(shelf, tmp_path):
    """Also from a checkpoint that is older than the task: it is left out of the stream then."""
    run = shelf.copy(tmp_path / "run", "strategy=nmc", FOUR)
    forget(run, 1, "drop")
    assert checkpoint_positions(run) == [0, 3]
    shutil.rmtree(run / "checkpoints" / "task_3")
    learn(run, "strategy=nmc", FOUR, "resume=auto")
    state = json.loads((run / "checkpoints" / "task_2" / "state.json").read_text())
    assert state["learnt"] == [0, 2, 3]
    assert [entry["task_id"] for entry in state["forgotten"]] == [1]


def test_a_crash_between_plan_and_purge_is_finished_by_the_next_start_of_the_run(shelf, tmp_path, monkeypatch):
    import cl_platform.unlearning.engine as engine

    def crash(*_):
        raise KeyboardInterrupt

    run = shelf.copy(tmp_path / "run", "strategy=nmc", FOUR)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "finish", crash)
        with pytest.raises(KeyboardInterrupt):
            forget(run, 1, "drop")
    result = learn(run, "strategy=nmc", FOUR, "resume=auto")
    assert read(run).ids == (1,) and result.metrics["tasks"] == [0, 2, 3]
    assert checkpoint_positions(run) == [0, 3]
    assert not (run / "unlearning" / "open").exists()
    assert json.loads((run / "unlearning" / "certificate.json").read_text())["state"] == "done"


def test_an_approximate_method_is_applied_and_never_called_exact(shelf, tmp_path):
    run = shelf.copy(tmp_path / "run", "strategy=linear_probe", THREE)
    certificate = forget(run, 1, "approximate:grad_ascent")
    assert certificate["level"] == "approximate" and certificate["method"]["used"] == "approximate:grad_ascent"
    state = json.loads((run / "checkpoints" / "task_2" / "state.json").read_text())
    assert state["learnt"] == [0, 2]


def test_requests_of_a_stream_with_hidden_bounds_are_refused(tmp_path):
    words = ("strategy=er", "scenario.boundaries=hidden", "unlearning.requests=[{after_task: 1, forget: 0}]")
    with pytest.raises(UserError, match="hidden bounds tell of no tasks"):
        learn(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "request_, said",
    [
        ("{after_task: 1, forget: 3}", "is learnt later"),
        ("{after_task: 1, forget: 9}", "no such task"),
        ("{after_task: 1, forget: 0}, {after_task: 2, forget: 0}", "by an earlier request"),
        ("{after_task: 1}", "a value is needed"),
        ("{after_task: 1, forget: 0, method: magic}", "unknown"),
    ],
)
def test_a_request_that_could_never_be_carried_out_is_refused_before_the_run(tmp_path, request_, said):
    with pytest.raises(UserError, match=said):
        learn(tmp_path / "run", "strategy=nmc", f"unlearning.requests=[{request_}]")
    assert not (tmp_path / "run").exists()
