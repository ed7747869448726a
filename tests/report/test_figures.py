"""Figures of a run: what is drawn for which run, and that the same run gives the same bytes."""

import re

import pytest
from matplotlib import rcParams
from run_folders import Made, write_run

from cl_platform.report import drawing
from cl_platform.report.curve_figures import gradients, read_gradients, stability_curves, task_strips
from cl_platform.report.figures import FIGURES, draw_all
from cl_platform.report.gap_figures import gap_grid, gap_zoom
from cl_platform.report.matrix_figures import accuracy_matrix, confusion_grid, confusion_last
from cl_platform.report.palette import task_style
from cl_platform.report.run_view import read_run


def texts(figure) -> str:
    """All that is written in a figure."""
    with drawing.style():
        return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", drawing.svg(figure, "f")))


@pytest.fixture
def three(tmp_path):
    return read_run(write_run(tmp_path / "run"))


@pytest.fixture
def twenty(tmp_path):
    made = Made(tasks=20, updates=12, classes_per_task=5, strategy="derpp", dip=0.3, left=0.02)
    return read_run(write_run(tmp_path / "twenty", made))


def test_a_full_run_has_every_figure_but_the_strips(three):
    assert [drawn.name for drawn in draw_all(three)] == [name for name in FIGURES if name != "task_strips"]


def test_titles_say_strategy_scenario_and_seed(three):
    for drawn in draw_all(three):
        assert drawn.figure.get_suptitle().replace("\n", " ").endswith("finetune on split_digits, seed 0"), drawn.name


def test_an_old_run_has_the_matrix_and_the_cost(tmp_path):
    view = read_run(write_run(tmp_path / "run", Made(log=False, diagnostics=False)))
    assert [drawn.name for drawn in draw_all(view)] == ["accuracy_matrix", "cost_bars"]


def test_one_task_has_a_curve_but_no_gap(tmp_path):
    names = [drawn.name for drawn in draw_all(read_run(write_run(tmp_path / "run", Made(tasks=1))))]
    assert "stability_curves" in names
    assert not {"gap_zoom", "gap_grid", "worst_cases"} & set(names)


def test_a_run_without_switches_has_no_curves_over_tasks(three):
    entry = {**three.metrics["gap_depth"], "value": None, "reason": "joint_trains_once"}
    three.metrics["gap_depth"] = entry
    assert not {"stability_curves", "gap_zoom"} & {drawn.name for drawn in draw_all(three)}


def test_every_task_has_a_curve_a_band_and_its_name(three):
    figure = stability_curves(three)
    axes = figure.axes[0]
    assert len(axes.collections) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["task 0", "task 1", "task 2"]
    switches = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert switches == [60, 120]


def test_the_zoom_names_depth_transient_and_residual_of_the_deepest_gap(three):
    pair = max(three.pairs(), key=lambda pair: pair.depth)
    written = texts(gap_zoom(three))
    assert f"of task {pair.j}" in written
    for value in (pair.depth, pair.transient, pair.residual):
        assert f"{100 * value:.1f}" in written


def test_the_zoom_of_a_switch_starts_with_the_accuracy_before_it(three):
    figure = gap_zoom(three, 2)
    pairs = [pair for pair in three.pairs() if pair.k == 2]
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert all(line.get_xdata()[0] == -1 for line in curves)
    starts = {float(line.get_ydata()[0]) for line in curves}
    assert starts == {100 * pair.pre for pair in pairs}


def test_a_window_ends_the_zoom(three):
    three.config["evaluation"]["gap_window"] = 8
    lines = [line for line in gap_zoom(three, 1).axes[0].lines if len(line.get_xdata()) > 2]
    assert max(max(line.get_xdata()) for line in lines) == 8


def test_the_zoom_is_absent_without_an_evaluated_window(tmp_path):
    path = write_run(tmp_path / "run", Made(tasks=2))
    text = (path / "continual_eval.csv").read_text().splitlines(keepends=True)
    kept = [line for line in text if ",1,1,0,step," not in line and ",1,1,0,end," not in line]
    (path / "continual_eval.csv").write_text("".join(kept))
    view = read_run(path)
    assert gap_zoom(view) is None
    assert gap_grid(view) is None


def test_twenty_tasks_look_different_from_each_other(twenty):
    looks = {(s.color, s.marker, str(s.line)) for s in map(task_style, range(300))}
    assert len(looks) == 300
    assert len(stability_curves(twenty).legends[0].get_texts()) == 20
    assert len(gap_grid(twenty).axes) == 20  # 19 switches, one empty place
    assert len(task_strips(twenty).axes) == 20
    numbers = list(accuracy_matrix(twenty).axes[0].texts)
    assert len(numbers) == 20 * 21 // 2


def test_many_classes_are_shown_by_task(three, twenty):
    assert [label.get_text() for label in confusion_last(three).axes[0].get_xticklabels()][0] == "digit 0"
    labels = [label.get_text() for label in confusion_last(twenty).axes[0].get_xticklabels()]
    assert labels == [f"task {t}" for t in range(20)]
    assert len(confusion_grid(twenty).axes) == 20


def test_many_shared_classes_stay_classes(tmp_path):
    view = read_run(write_run(tmp_path / "run", Made(space="dil", classes_per_task=25)))
    assert len(confusion_last(view).axes[0].get_yticklabels()) == 25


def test_a_confusion_that_does_not_fit_together_is_left_out(three):
    three.confusion["after"][2]["counts"][0].pop()
    three.confusion["after"][1] = "nonsense"
    assert "after task 0" in confusion_last(three).get_suptitle()


def test_what_a_user_named_is_no_formula_and_no_markup(tmp_path):
    names = ("$\\frac{1$", "<script>alert(1)</script>", "a\nb\x00c", "狗" * 40)
    view = read_run(write_run(tmp_path / "run", Made(tasks=2, class_names=names)))
    with drawing.style():
        written = drawing.svg(confusion_last(view), "f")
    assert "<script" not in written
    assert "$\\frac{1$" in written
    assert "狗狗狗" in written


def test_gradients_stand_side_by_side(three):
    assert len(read_gradients(three)) == 60
    assert gradients(three).axes[1].get_xlim() == (-0.5, 59.5)


def test_a_torn_line_of_the_gradients_is_left_out(three):
    with open(three.path / "gradients.csv", "a") as file:
        file.write("130,2,2,0.1")
    assert len(read_gradients(three)) == 60
    (three.path / "gradients.csv").write_text("something else\n1\n")
    assert gradients(three) is None


def test_the_same_run_gives_the_same_bytes(tmp_path):
    view = read_run(write_run(tmp_path / "run", Made(tasks=2, updates=10)))

    def drawn():
        with drawing.style():
            return [(drawing.png(one.figure), drawing.svg(one.figure, one.name)) for one in draw_all(view)]

    first = drawn()
    assert first == drawn()
    assert all(b"Software" not in picture and "dc:date" not in text for picture, text in first)


def test_drawing_leaves_the_settings_of_matplotlib_alone(three):
    before = dict(rcParams)
    for one in draw_all(three):
        with drawing.style():
            drawing.svg(one.figure, one.name)
    assert dict(rcParams) == before


def test_embedded_ids_are_used_and_never_shared(three):
    seen: set[str] = set()
    for one in draw_all(three):
        with drawing.style():
            text = drawing.embedded(drawing.svg(one.figure, one.name), one.name, 'a "label" & more')
        ids = re.findall(r' id="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert all(name.startswith(one.name) for name in ids)
        assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) == set(ids)
        assert not seen & set(ids)
        assert 'aria-label="a &quot;label&quot; &amp; more"' in text
        assert "http" not in text
        seen |= set(ids)


def test_a_long_curve_is_thinned_and_keeps_its_extremes():
    steps = list(range(100_000))
    values = [0.5] * len(steps)
    values[54_321], values[77_777] = 0.0, 1.0
    kept = drawing.thinned(steps, values)
    assert len(kept) <= 1600
    assert {0, 54_321, 77_777, 99_999} <= set(kept)
    assert kept == sorted(kept)


def test_items_are_spread_evenly_with_the_last_one():
    assert drawing.spread(range(100), 4) == [24, 49, 74, 99]
    assert drawing.spread([1, 2], 4) == [1, 2]


def test_costs_without_seconds_have_no_bars(three):
    for seconds in ({}, {"train": 0.0}, "none"):
        three.cost["seconds"] = seconds
        assert "cost_bars" not in {drawn.name for drawn in draw_all(three)}


def test_phases_of_every_name_are_drawn(three):
    three.cost["seconds"]["relearning"] = 4.2
    figure = FIGURES["cost_bars"][0](three)
    assert "relearning" in texts(figure)
