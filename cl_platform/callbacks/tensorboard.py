"""What TensorBoard shows beside plain scalars: the layout, gaps at each switch, figures, texts, comparable runs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_platform.metrics import continual
from cl_platform.metrics.gap import by_switch, gap_pairs
from cl_platform.metrics.matrix import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cl_platform.report.run_view import RunView

LAYOUT = {
    "Stability": {
        "Accuracy of every task": ["Multiline", [r"^accuracy/task_\d+$"]],
        "Worst case": ["Multiline", [r"^continual/(min|wc)_acc$"]],
    },
    "Gap": {"Zoom": ["Multiline", ["^gap_zoom/"]]},
}
"""Charts of the custom-scalar page; tags are regular expressions."""

HPARAMS = ("acc", "aia", "forgetting", "bwt", "min_acc", "wc_acc", "aaa", "gap_depth", "gap_transient")
"""Metrics by which runs can be compared in the HParams tab."""


class StabilityBoard:
    """Writes to the run's TensorBoard what is read from its folder.

    Args:
        logger: Lightning's TensorBoard logger.
        folder: the run's.
        figures: draw matrix, confusion and gap after each task.
        gaps: whether switches mean something in this run; they do not where tasks are trained on together.
    """

    def __init__(self, logger: Any, folder: Path, figures: bool = True, gaps: bool = True) -> None:
        self._logger, self._folder, self._figures, self._gap = logger, folder, figures, gaps

    @property
    def _writer(self) -> Any:
        return self._logger.experiment

    def open(self, config: Mapping[str, Any]) -> None:
        """The layout, once per writer, and a card with the configuration."""
        self._writer.add_custom_scalars(LAYOUT)
        text = json.dumps(config, indent=1, ensure_ascii=False)
        self._writer.add_text("text/config", "\n".join(f"    {line}" for line in text.splitlines()), 0)

    def end_task(self, step: int) -> None:
        """Running values, the gaps of the switch that the finished task began, and figures."""
        from cl_platform.report.run_view import read_run

        view = read_run(self._folder)
        curves = view.curves()
        if curves is not None and self._gap:
            self._running(curves, step)
            self._gaps(view, step)
        if self._figures:
            self._draw(view, len(view.matrix) - 1, step)
        self._writer.flush()

    def finish(self, config: Mapping[str, Any], metrics: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
        """Metrics with their definitions as a card, and the final ones beside the configuration."""
        from cl_platform.metrics.built_in import definition

        known = [(key, definition(key), value) for key, value in metrics.items() if isinstance(value, Mapping)]
        lines = [
            f"| {made.id} | {key} | {_shown(value)} | {made.text} |"
            for key, made, value in known
            if made is not None and "id" in value
        ]
        head = ["| id | metric | value | definition |", "|---|---|---|---|"]
        self._writer.add_text("text/definitions", "\n".join([*head, *lines]), 0)
        final = {f"hparam/{key}": metrics[key]["value"] for key in HPARAMS if key in metrics}
        final |= {"hparam/seconds": cost["seconds_total"], "hparam/params_trainable": cost["params_trainable"]}
        self._logger.log_hyperparams(
            _chosen(config), metrics={key: value for key, value in final.items() if isinstance(value, int | float)}
        )

    def _running(self, curves: Any, step: int) -> None:
        for key, outcome in {"aaa": continual.aaa(curves), "wf_10": continual.wf(curves, 10)}.items():
            if isinstance(outcome, Result):
                self._writer.add_scalar(f"continual/{key}", outcome.value, step)

    def _gaps(self, view: RunView, step: int) -> None:
        curves = view.curves()
        assert curves is not None
        k = curves.begun - 1
        if k < 1:
            return
        depth = by_switch(pair for pair in gap_pairs(curves, view.gap_window, view.gap_tolerance) if pair.k == k)
        name = f"switch_{_tag(view, k)}"
        if depth.get(k, {}).get("gap_depth") is not None:
            self._writer.add_scalar(f"gap/depth_{name}", depth[k]["gap_depth"], step)
        before = curves.boundary(k - 1, "end")
        for j in (j for j in curves.kept if j < k):
            tag = f"gap_zoom/{name}/task_{_tag(view, j)}"
            if before is not None and j in before.cells:
                self._writer.add_scalar(tag, before.cells[j][0] / before.cells[j][1], -1)
            for at, (right, total) in curves.segment(k, j).items():
                self._writer.add_scalar(tag, right / total, at - curves.begins[k])

    def _draw(self, view: RunView, position: int, step: int) -> None:
        from cl_platform.report.gap_figures import gap_zoom
        from cl_platform.report.matrix_figures import accuracy_matrix, confusion_last

        self._image("matrix/accuracy", accuracy_matrix(view), step)
        self._image(f"confusion/after_task_{_tag(view, position)}", confusion_last(view), step)
        if position > 0 and self._gap:
            self._image(f"gap_figure/switch_{_tag(view, position)}", gap_zoom(view, position), step)

    def _image(self, tag: str, figure: Figure | None, step: int) -> None:
        if figure is None:
            return
        from PIL import Image

        from cl_platform.report.drawing import png

        pixels = np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB"))  # (H, W, 3)
        self._writer.add_image(tag, pixels, step, dataformats="HWC")


def boards(loggers: Iterable[Any], folder: Path, figures: bool = True, gaps: bool = True) -> list[StabilityBoard]:
    """A board for each TensorBoard logger of the run."""
    chosen = [made for made in loggers if type(made).__name__ == "TensorBoardLogger"]
    return [StabilityBoard(made, folder, figures, gaps) for made in chosen]


def _chosen(config: Mapping[str, Any]) -> dict[str, Any]:
    """What runs are told apart by: names first, then the keys of strategy, optimizer and trainer that hold a value."""
    strategies = config.get("strategy") or {}
    names = {
        "_strategy": "+".join(strategies),
        "_scenario": (config.get("scenario") or {}).get("kind"),
        "_backbone": (config.get("backbone") or {}).get("kind"),
        "_seed": config.get("seed"),
    }
    groups = {**{name: keys or {} for name, keys in strategies.items()}, "optimizer": config.get("optimizer") or {}}
    trainer = config.get("trainer") or {}
    groups["trainer"] = {key: trainer.get(key) for key in ("max_epochs", "batch_size", "precision")}
    flat = {
        f"{group}/{key}": value
        for group, keys in groups.items()
        for key, value in keys.items()
        if isinstance(value, str | int | float) and key != "optimizer"
    }
    return {**names, **flat}


def _tag(view: RunView, position: int) -> str:
    return f"{view.task_ids[position]:0{3 if len(view.task_ids) > 100 else 2}d}"


def _shown(value: Mapping[str, Any]) -> str:
    number = value.get("value")
    if isinstance(number, float):
        return f"{number:.4f}"
    return f"- ({value.get('reason')})" if number is None else "list"
