"""Runs side by side: who belongs together, what is refused, what is written, and how the table fits a terminal."""

import json
import re
import statistics
from html.parser import HTMLParser

import pytest
from comparison_folders import edit, give, numbers_of, run, seeds, three_seeds_each
from rich.cells import cell_len
from run_folders import offsets

from cl_platform.cli.app import run as command
from cl_platform.cli.compare import run_folders
from cl_platform.errors import UserError
from cl_platform.report.compare import compare
from cl_platform.report.comparison_charts import accuracy_after_tasks, key_numbers
from cl_platform.report.comparison_curves import curves_of
from cl_platform.report.comparison_figures import in_lines, looks, lost_after_switches, while_learning
from cl_platform.report.comparison_groups import group_runs
from cl_platform.report.comparison_page import render
from cl_platform.report.comparison_runs import choose
from cl_platform.report.comparison_tables import advice, cell, legend, ranking, wrapped
from cl_platform.report.drawing import style, svg
from cl_platform.report.palette import OKABE_ITO

VOID = {"meta", "wbr", "br", "path", "use", "rect", "line", "circle", "polygon", "polyline"}


class Page(HTMLParser):
    """Checks that elements close in order; keeps ids, links, tags and visible text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.tags, self.parts = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src")]
        assert not any(name.startswith("on") for name, _ in attrs)
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
            self.parts.append(data if data.strip() else " ")


FIGURES = ["key_numbers", "while_learning", "lost_after_switches", "accuracy_after_tasks", "forgetting_by_task"]


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take most of the time."""
    for name in FIGURES:
        monkeypatch.setattr(f"cl_platform.report.compare.{name}", lambda *content: None)


@pytest.fixture
def two(tmp_path):
    """Two strategies of three seeds each."""
    return three_seeds_each(tmp_path)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A whole comparison with its figures."""
    root = tmp_path_factory.mktemp("compared")
    return compare(three_seeds_each(root), root / "out")


def refusal(paths, output=None):
    with pytest.raises(UserError) as caught:
        compare(paths, output)
    return str(caught.value)


# What is refused or left out


def test_the_same_folder_twice_counts_once(two):
    around = two[0].parent / ".." / "finetune" / two[0].name
    chosen = choose([two[0], two[1], around])
    assert len(chosen.runs) == 2
    assert chosen.left_out == (f"{around} is named twice and counted once",)


def test_an_unfinished_run_is_named_and_left_out(two, tmp_path, undrawn):
    unfinished = run(tmp_path, seed=9, finished=False)
    made = compare([*two, unfinished], tmp_path / "out")
    assert made.left_out == (f"{unfinished} has no metrics.json: the run has not finished",)
    assert [len(group.runs) for group in made.groups] == [3, 3]
    assert str(unfinished) in Page(made.page.read_text()).text


def test_no_finished_run_is_refused(tmp_path):
    unfinished = run(tmp_path, finished=False)
    assert "none of the runs has finished" in refusal([unfinished], tmp_path / "out")
    assert "no run is given" in refusal([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_different_scenarios_are_refused_with_both_names_and_the_key(tmp_path):
    one, other = run(tmp_path), run(tmp_path, "replay", scenario="rotated_digits")
    edit(other, "environment.json", lambda content: content["dataset"].update(digest="aa" * 32))
    said = refusal([one, other], tmp_path / "out")
    assert "split_digits and rotated_digits" in said
    assert "scenario.kind is split_digits and rotated_digits" in said


def test_one_key_of_the_scenario_is_enough(tmp_path):
    one, other = run(tmp_path), run(tmp_path, "replay", tasks=2)
    edit(other, "environment.json", lambda content: content["dataset"].update(digest="aa" * 32))
    assert "scenario.num_tasks is 3 and 2" in refusal([one, other], tmp_path / "out")


def test_other_images_under_the_same_keys_are_refused(tmp_path):
    one, other = run(tmp_path), run(tmp_path, "replay")
    edit(other, "environment.json", lambda content: content["dataset"].update(digest="aa" * 32))
    assert "their images or splits differ, SHA-256 d9d9d9d9d9d9 and aaaaaaaaaaaa" in refusal([one, other])


def test_seeds_that_draw_their_own_images_are_compared_and_it_is_said(tmp_path):
    paths = [run(tmp_path, name, seed) for name in ("finetune", "replay") for seed in (0, 1)]
    for path in paths[1::2]:
        edit(path, "environment.json", lambda content: content["dataset"].update(digest="aa" * 32))
    assert "Each seed draws images" in choose(paths).notes[0]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no config.yaml" in refusal([tmp_path / "empty"])
    assert "is not a folder" in refusal([tmp_path / "nowhere"])


def test_a_full_folder_is_not_overwritten_unless_forced(two, tmp_path, undrawn):
    out = tmp_path / "out"
    compare(two[:1], out)
    before = (out / "comparison.csv").read_text()
    assert "Add --force" in refusal(two, out)
    assert (out / "comparison.csv").read_text() == before
    compare(two, out, force=True)
    assert (out / "comparison.csv").read_text() != before


def test_a_run_folder_is_never_written_to(two):
    before = sorted(two[1].iterdir())
    with pytest.raises(UserError, match="is a run folder"):
        compare(two, two[1], force=True)
    assert sorted(two[1].iterdir()) == before


def test_a_forced_comparison_removes_figures_it_no_longer_has(two, tmp_path, undrawn):
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    for name in ("while_learning.png", "while_learning.svg", "mine.png"):
        (out / "figures" / name).write_bytes(b"old")
    compare(two[:1], out, force=True)
    assert [file.name for file in (out / "figures").iterdir()] == ["mine.png"]


# Curves and figures


def test_a_curve_is_the_mean_of_its_runs(two):
    groups, _ = group_runs(choose(two[:3]).runs)
    (curves,), lines = curves_of(groups)
    assert lines == []
    step, found = curves.seen.bands[1][4]
    assert step == 24 + offsets(24)[4]
    single = [run[1][4] for run in curves.seen.runs]
    assert (found.n, found.mean) == (3, pytest.approx(statistics.mean(single)))
    assert curves.edges == (0, 24, 48, 72)


def test_a_curve_begins_anew_at_every_switch(two):
    groups, _ = group_runs(choose(two[:1]).runs)
    (curves,), _ = curves_of(groups)
    assert [band[0][0] for band in curves.seen.bands] == [0, 24, 48]
    assert [band[-1][0] for band in curves.seen.bands] == [24, 48, 72]


def test_a_group_without_a_log_is_named(tmp_path):
    groups, _ = group_runs(choose([run(tmp_path, log=False)]).runs)
    assert curves_of(groups) == ([], ["finetune has no curves: nothing was evaluated while it learnt"])


def test_groups_with_tasks_of_other_lengths_share_an_axis_of_tasks(tmp_path):
    groups, _ = group_runs(choose([run(tmp_path), run(tmp_path, "replay", updates=48)]).runs)
    curves, _ = curves_of(groups)
    figure = while_learning(curves, looks([group.label for group in groups]), "split_digits")
    assert figure.axes[-1].get_xlabel() == "share of each task's updates"
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["task 0", "task 1", "task 2"]


def bars(axes):
    """Widths of the error bars of a figure."""
    return [
        abs(end - start)
        for container in axes.containers
        for lines in container.lines[2]
        for (start, _), (end, _) in lines.get_segments()
    ]


def test_error_bars_are_as_wide_as_the_band(two):
    numbers = numbers_of(two)
    look = looks([group.label for group in numbers.groups])
    panel = next(axes for axes in key_numbers(numbers, look, "s").axes if "final average" in axes.get_title(loc="left"))
    assert bars(panel) == pytest.approx([200 * numbers.values[label, "acc"].half for label in ("finetune", "replay")])


def test_one_seed_has_points_without_bars(two):
    numbers = numbers_of(two[:1])
    figure = accuracy_after_tasks(numbers, looks(["finetune"]), "s")
    assert bars(figure.axes[0]) == pytest.approx([0, 0, 0])
    with style():
        assert "split" not in svg(figure, "f")


def test_lost_accuracy_is_drawn_with_a_bar_for_every_switch(two):
    groups, _ = group_runs(choose(two).runs)
    figure = lost_after_switches(curves_of(groups)[0], looks([group.label for group in groups]), "s")
    assert [len(container.lines[2][0].get_segments()) for container in figure.axes[1].containers] == [2, 2]


def test_groups_differ_in_more_than_colour():
    found = list(looks([f"g{i}" for i in range(8)]).values())
    assert {look.color for look in found} <= set(OKABE_ITO)
    assert len({(look.marker, str(look.line)) for look in found}) == 8
    many = looks([f"g{i}" for i in range(60)]).values()
    assert len({(look.color, look.marker, str(look.line)) for look in many}) == 60


# The page


def test_the_folder_holds_page_tables_and_figures(compared):
    names = {str(file.relative_to(compared.folder)) for file in compared.folder.rglob("*") if file.is_file()}
    figures = {f"figures/{name}.{ending}" for name in FIGURES for ending in ("png", "svg")}
    assert names == {"comparison.csv", "comparison.html", "runs.csv", *figures}


def test_the_page_needs_nothing_else(compared):
    text = compared.page.read_text()
    page = Page(text)
    assert [name for name in page.ids if name.startswith("figure-")] == [f"figure-{name}" for name in FIGURES]
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "NaN" not in page.text


def test_what_a_user_named_is_escaped(tmp_path):
    bad = "<script>alert(1)</script>"
    paths = [run(tmp_path, keys={"trainer.note": note}) for note in (bad, "b")]
    numbers = numbers_of(paths)
    text = render(bad, numbers, [f"{bad} is left out"], [bad], [])
    assert "<script>" not in text
    assert bad in Page(text).text


def test_every_cell_and_definition_stands_on_the_page(two):
    numbers = numbers_of(two)
    text = Page(render("split_digits", numbers, [], advice(numbers), [])).text
    for key in numbers.columns:
        for label in ("finetune", "replay"):
            assert cell(numbers, label, key).mean in text
    assert legend(numbers) in text
    assert ranking(numbers)[0].replace("\u00a0", " ") in text
    assert "1.1 acc" in text.replace("1.1acc", "1.1 acc")


def test_two_seeds_are_said_to_be_few(two):
    assert any("Two seeds give very wide bands (finetune)" in line for line in advice(numbers_of([*two[:2], *two[3:]])))


def test_a_lead_is_said_with_whether_the_bands_overlap(two):
    for path, value in zip(two, (0.3, 0.31, 0.32, 0.9, 0.91, 0.92), strict=True):
        give(path, "acc", value)
    assert "replay has the highest final average accuracy" in ranking(numbers_of(two))[0]
    assert "do not overlap" in ranking(numbers_of(two))[0]
    give(two[0], "acc", 0.95)
    assert "more seeds may turn the order" in ranking(numbers_of(two))[0]


# The command


def test_the_command_prints_a_table_and_writes_the_folder(two, tmp_path, undrawn, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    assert command(["compare", *map(str, two)]) == 0
    out = capsys.readouterr().out
    (folder,) = tmp_path.glob("comparison_*")
    assert re.fullmatch(r"comparison_\d{4}-\d\d-\d\d_\d{6}", folder.name)
    assert f"{folder.name}/comparison.html" in out
    assert "forgetting" in out
    assert "1.5 ↓" in out


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_fits_the_terminal_and_cuts_nothing(tmp_path, undrawn, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    paths = seeds(tmp_path, "finetune", 3)
    paths += [run(tmp_path, s, 0, keys={"trainer.batch_size": b}) for s in ("replay", "der_plus") for b in (16, 128)]
    assert command(["compare", *map(str, paths), "--output", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.split("Accuracies in %")[0]
    assert max(map(cell_len, table.splitlines())) <= width
    assert "…" not in table
    numbers = numbers_of(paths)
    for key in numbers.columns:
        assert cell(numbers, "finetune", key).text in table, key


def test_json_is_one_object_with_fractions(two, tmp_path, undrawn, capsys):
    assert command(["compare", *map(str, two), "--json", "-o", str(tmp_path / "out")]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [(group["group"], group["seeds"]) for group in record["groups"]] == [
        ("finetune", [0, 1, 2]),
        ("replay", [0, 1, 2]),
    ]
    acc = record["groups"][0]["metrics"]["acc"]
    assert acc["mean"] == numbers_of(two).values["finetune", "acc"].mean
    assert (acc["id"], acc["n"], acc["missing"]) == ("1.1", 3, {})
    assert record["report"] == str(tmp_path / "out" / "comparison.html")


def test_a_refusal_is_one_line_and_exit_code_2(two, tmp_path, capsys):
    other = run(tmp_path, "l2p", scenario="rotated_digits")
    edit(other, "environment.json", lambda content: content["dataset"].update(digest="aa" * 32))
    for words in ([str(two[0]), str(other)], [str(tmp_path / "no")], [str(tmp_path / "no*")], []):
        assert command(["compare", *words, "-o", str(tmp_path / "out")]) == 2, words
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1
        assert said.err.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_wildcard_finds_runs_and_names_what_is_none(two, tmp_path):
    (tmp_path / "finetune" / "notes").mkdir()
    (tmp_path / "finetune" / "notes" / "ideas.txt").write_text("more seeds")
    (tmp_path / "finetune" / "nothing").mkdir()
    paths, passed_over = run_folders([str(tmp_path / "*" / "*")])
    assert paths == two
    assert passed_over == [f"{tmp_path / 'finetune' / 'notes'} holds no config.yaml, so it is no run folder"]


def test_a_folder_with_a_bracket_in_its_name_is_no_wildcard(tmp_path):
    path = run(tmp_path / "[a]")
    assert run_folders([str(path)]) == ([path], [])


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("finetune lr=0.1", 40, ["finetune lr=0.1"]),
        ("finetune evaluation.grid=every_step", 26, ["finetune", "evaluation.grid=every_step"]),
        ("evaluation.grid=every_step", 20, ["evaluation.grid=", "every_step"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        ("", 4, [""]),
    ],
)
def test_long_names_break_behind_a_sign(text, width, lines):
    assert wrapped(text, width) == lines


def test_a_label_of_a_figure_has_three_lines_at_most():
    assert in_lines("word " * 40, 12).count("\n") == 2
    assert in_lines("word " * 40, 12).endswith("…")
