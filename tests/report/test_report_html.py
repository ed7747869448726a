"""The page: one valid file that needs nothing else, shows every number and says why one is missing."""

import json
import os
import re
from html.parser import HTMLParser

import pytest
from run_folders import Made, write_run

from cl_platform.cli.app import run as command
from cl_platform.errors import UserError
from cl_platform.metrics import REASONS
from cl_platform.metrics.built_in import definition
from cl_platform.report import words
from cl_platform.report.html import render, write_report
from cl_platform.report.run_view import SPACE_OF_SETTING, read_run

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "rect", "line", "circle", "polygon", "polyline"}


class Page(HTMLParser):
    """Checks that elements close in order; keeps ids, references, tags and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.parts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)
            assert not name.startswith("on"), f"{name} of {tag} runs a script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def page_of(path) -> Page:
    """The page without its figures, which take most of the time."""
    return Page(render(read_run(path), {}))


def written(path) -> Page:
    """The page as it stands in the folder."""
    return Page(write_report(path).read_text(encoding="utf-8"))


def edit(path, name, change) -> None:
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def _no_pixels(monkeypatch):
    """Half of the time goes into PNGs, whose bytes the tests of the figures compare."""
    monkeypatch.setattr("cl_platform.report.html.png", lambda figure: b"pixels")


@pytest.fixture
def finished(tmp_path):
    return write_run(tmp_path / "run", Made(tasks=3, updates=30))


def test_the_page_needs_nothing_else(finished):
    page = written(finished)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    content = (finished / "report.html").read_text()
    assert "http://" not in content
    assert "https://" not in content
    assert "@import" not in content
    assert len(content) < 1_000_000


def test_every_link_inside_the_page_leads_somewhere(finished):
    page = written(finished)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_sections_come_in_their_order(finished):
    page = page_of(finished)
    sections = ["numbers", "curves", "gaps", "matrix", "metrics", "tasks", "switches", "diagnostics", "cost", "config"]
    assert [name for name in page.ids if name in sections] == sections


def test_figures_stand_in_the_folder_as_png_and_svg(finished):
    page = written(finished)
    names = {name.removeprefix("figure-") for name in page.ids if name.startswith("figure-")}
    assert names == {file.stem for file in (finished / "figures").glob("*.png")}
    assert names == {file.stem for file in (finished / "figures").glob("*.svg")}
    assert page.tags.count("svg") == len(names)


def test_key_numbers_have_value_id_and_definition(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    text = page_of(finished).text
    for key in words.LABELS:
        entry = metrics[key]
        assert words.with_unit(entry["value"], key, entry["unit"]) in text
        assert f"{key} {entry['id']}: {definition(key).text}" in text


def test_every_metric_is_in_the_table(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    text = page_of(finished).text
    for key, entry in metrics.items():
        if isinstance(entry, dict) and "id" in entry and not key.endswith("_cil"):
            assert f" {entry['id']} {key} " in text, key


def test_a_metric_that_nobody_defined_is_shown_too(finished):
    entry = {"id": "9.9", "value": 0.25, "space": "cil", "unit": "fraction", "per_task": None, "reason": None}
    edit(finished, "metrics.json", lambda metrics: metrics.update(novelty_cil=entry))
    assert "novelty 25.0 % no published definition" in page_of(finished).text


@pytest.mark.parametrize("reason", sorted(REASONS))
def test_every_null_shows_its_reason(reason):
    assert words.reason({"value": None, "reason": reason}) == words.REASONS[reason]
    assert len(words.REASONS[reason].split()) > 2


def test_a_null_stands_as_a_dash_with_its_reason(tmp_path):
    text = page_of(write_run(tmp_path / "run", Made(tasks=1))).text
    assert "forgetting - needs at least two tasks" in text
    assert "1.5 forgetting - needs at least two tasks lower" in text
    assert "No gaps: a gap needs at least two tasks." in text
    assert not re.search(r"\b(nan|None|inf)\b", text)


def test_gaps_that_did_not_recover_are_counted(tmp_path):
    text = page_of(write_run(tmp_path / "run", Made(tasks=3, left=0.3))).text
    assert "recovery time not recovered 3 of 3 gaps" in text


def test_each_switch_shows_its_depth_beside_the_noise_floor(finished):
    deep = max((p for p in read_run(finished).pairs() if p.k == 2), key=lambda p: p.depth)
    text = page_of(finished).text
    assert f"{100 * deep.depth:.1f} {100 * deep.noise_floor:.1f} more than chance" in text


def test_a_small_fall_could_be_chance(tmp_path):
    text = page_of(write_run(tmp_path / "run", Made(tasks=2, dip=0.02, left=0.0, images=30))).text
    assert "could be chance" in text
    assert "0 of 1 falls are deeper than chance alone would make them." in text


def test_names_are_escaped(tmp_path):
    names = ("<script>alert(1)</script>", 'a"b', "$x$", "&amp;")
    path = write_run(tmp_path / "run", Made(tasks=2, class_names=names, scenario="<b>mine</b>", strategy="<i>s</i>"))
    page = written(path)
    content = (path / "report.html").read_text()
    assert not {"script", "b", "i"} & set(page.tags)
    assert "<script>alert" not in content
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in content
    assert "<script>alert(1)</script>" in page.text
    assert "&amp;amp;" in content


def test_a_torn_line_of_the_log_is_named(finished):
    lines = (finished / "continual_eval.csv").read_text().count("\n")
    with open(finished / "continual_eval.csv", "a") as file:
        file.write("180,2,2,0,step,0,cil,<b>")
    text = page_of(finished).text
    assert "1 line of continual_eval.csv could not be used" in text
    assert f"continual_eval.csv, line {lines + 1}: truncated: does not end in a line feed" in text


def test_without_a_log_the_page_says_so(tmp_path):
    page = written(write_run(tmp_path / "run", Made(log=False)))
    assert "No stability curves: the run folder holds no evaluations in continual_eval.csv." in page.text
    assert "lowest accuracy (min\u2011ACC) - continual evaluation was off" in page.text
    assert "figure-stability_curves" not in page.ids
    assert "figure-accuracy_matrix" in page.ids


def test_an_old_run_has_a_page(tmp_path):
    path = write_run(tmp_path / "run", Made(log=False, diagnostics=False))

    def age(metrics):
        for key in [key for key in metrics if key.startswith(("gap", "min", "wc", "w", "lca", "aaa", "continual"))]:
            del metrics[key]

    edit(path, "metrics.json", age)
    text = page_of(path).text
    assert "gap depth - not in this run's metrics.json" in text
    assert "This run's metrics.json holds no diagnostics." in text
    assert "No confusion matrix" in text


@pytest.mark.parametrize("reason", ["joint_trains_once", "starts_afresh"])
def test_a_run_without_switches_says_why(finished, reason):
    edit(finished, "metrics.json", lambda metrics: metrics["gap_depth"].update(value=None, reason=reason))
    text = page_of(finished).text
    assert f"No curves over tasks: {words.REASONS[reason]}." in text
    assert "Evaluated after" not in text


def test_a_running_run_shows_what_is_there(tmp_path):
    page = written(write_run(tmp_path / "run", Made(tasks=3, finished=False)))
    assert "This run has not finished: 2 of 3 tasks have ended." in page.text
    assert "final average accuracy - known when the run has finished" in page.text
    assert "figure-gap_zoom" in page.ids
    assert "gap depth -" not in page.text


def test_only_a_config_still_gives_a_page(tmp_path):
    path = write_run(tmp_path / "run")
    for file in path.iterdir():
        if file.name != "config.yaml":
            file.unlink()
    text = page_of(path).text
    assert "No task has ended yet." in text
    assert "strategy: finetune: loss: seen" in text


def test_twenty_tasks_fit_on_the_page(tmp_path):
    made = Made(tasks=20, updates=12, classes_per_task=5, strategy="derpp", dip=0.3, left=0.02)
    page = written(write_run(tmp_path / "run", made))
    assert (tmp_path / "run" / "report.html").stat().st_size < 3_000_000
    assert "Every old task at every switch (190)" in page.text
    assert "figure-task_strips" in page.ids


def test_a_second_prediction_space_stands_beside_the_first(finished):
    def more(metrics):
        metrics["acc_til"] = {**metrics["acc_cil"], "space": "til", "value": 0.987}

    edit(finished, "metrics.json", more)
    text = page_of(finished).text
    assert "id metric cil (this scenario) til better definition" in text
    assert "98.7 % higher Accuracy after the last task, mean over tasks." in text


def test_what_a_strategy_says_about_itself_is_shown(finished):
    facts = {"l2p": {"usage": {"0": [3, 0, 1], "1": [0, 2, 2]}, "note": "<b>", "share": 0.123456}}
    edit(finished, "metrics.json", lambda metrics: metrics.update(strategy=facts))
    page = page_of(finished)
    assert "usage 0 3 0 1 1 0 2 2" in page.text
    assert "share 0.1235" in page.text
    assert "b" not in page.tags


def test_costs_are_written_for_people(finished):
    text = page_of(finished).text
    assert "6.1 params_total 2,712,010" in text
    assert "6.5 peak_rss_bytes 996.7 MiB" in text


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    path = write_run(tmp_path / "run", Made(tasks=2, updates=10))

    def content():
        write_report(path)
        files = [path / "report.html", *sorted((path / "figures").iterdir())]
        return {file.name: file.read_bytes() for file in files}

    assert content() == content()


def test_figures_of_files_that_are_gone_go_too(finished):
    (finished / "figures").mkdir()
    (finished / "figures" / "gap_zoom.png").write_bytes(b"left by an earlier report")
    (finished / "figures" / "mine.png").write_bytes(b"")
    (finished / "confusion.json").unlink()
    (finished / "continual_eval.csv").unlink()
    write_report(finished)
    assert {file.name for file in (finished / "figures").glob("*.png")} == {
        "accuracy_matrix.png", "cost_bars.png", "gradients.png", "mine.png",
    }  # fmt: skip


def test_a_folder_that_cannot_be_written_to_is_refused(finished):
    (finished / "figures").write_text("a file in the way")
    with pytest.raises(UserError, match="cannot be written to"):
        write_report(finished)


def test_every_space_has_its_words():
    assert set(SPACE_OF_SETTING.values()) <= set(words.SPACES)
    assert set(words.REASONS) == REASONS


@pytest.mark.parametrize(
    "value, key, unit, text",
    [
        (0.1234, "acc", "fraction", "12.3 %"),
        (-0.1234, "bwt", "fraction", "-12.3 points"),
        (-0.0001, "bwt", "fraction", "0.0 points"),
        (31.0, "gap_recovery_time", "updates", "31 updates"),
        (None, "acc", "fraction", "-"),
    ],
)
def test_numbers_are_written_with_their_unit(value, key, unit, text):
    assert words.with_unit(value, key, unit) == text


def test_the_command_writes_the_page_and_prints_its_path(finished, capsys):
    for name in ("continual_eval.csv", "confusion.json", "gradients.csv"):
        (finished / name).unlink()
    assert command(["report", str(finished)]) == 0
    assert capsys.readouterr().out == f"{finished}{os.sep}report.html\n"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["report", "nowhere"], "error: run=nowhere: is not a folder."),
        (["report"], "error: Missing argument"),
        (["reprot", "x"], "error: No such command"),
        (["report", "nowhere", "--wrong"], "error: No such option"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, said, capsys):
    assert command(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert out == ""


def test_debug_shows_where_a_refusal_comes_from(capsys):
    assert command(["report", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_ends_with_its_own_code(finished, monkeypatch, capsys):
    import cl_platform.report.html

    monkeypatch.setattr(cl_platform.report.html, "write_report", lambda path: 1 / 0)
    assert command(["report", str(finished)]) == 70
    assert "this is a fault of cl_platform (ZeroDivisionError)" in capsys.readouterr().err


def test_commands_without_words_show_the_help(capsys):
    assert command([]) == 0
    assert "report" in capsys.readouterr().out
