"""What the bar and the lines beside it say."""

import io

import pytest
from rich.console import Console

from cl_platform.callbacks.progress import StreamProgress


def _progress(terminal: bool, num_tasks: int = 5) -> tuple[StreamProgress, io.StringIO]:
    file = io.StringIO()
    return StreamProgress(10, num_tasks, console=Console(file=file, force_terminal=terminal, width=40)), file


def test_a_result_is_one_line_in_a_file_however_long():
    progress, file = _progress(terminal=False)
    line = "after task 19: " + " ".join(["100.0"] * 40)
    progress.end_task(line)
    assert file.getvalue() == line + "\n"


@pytest.mark.parametrize(
    ("begin", "label"),
    [
        ((0, "(0, 1)"), "task 0 (1 of 5) (0, 1)"),
        ((4, "(8, 9)"), "task 4 (5 of 5) (8, 9)"),
        ((1, "(4, 5)", 2), "task 2 (2 of 5) (4, 5)"),
    ],
)
def test_tasks_are_counted_from_0_as_everywhere_with_their_place_beside(begin, label):
    progress, _ = _progress(terminal=True)
    progress.begin_task(*begin)
    assert progress._bar.tasks[0].description == label


def test_a_training_on_all_tasks_at_once_is_the_first_of_one():
    progress, _ = _progress(terminal=True, num_tasks=1)
    progress.begin_task(4, "(0, 1, 2, ...)")
    assert progress._bar.tasks[0].description == "task 4 (1 of 1) (0, 1, 2, ...)"
