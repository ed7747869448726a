"""What the answers on the whole test sets say beyond how many are right: confusion, flips, calibration."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from cl_platform.metrics.calibration import CALIBRATION_DEFINITIONS, BinCounts, ece, overconfidence
from cl_platform.metrics.confusion import (
    CONFUSION_DEFINITIONS,
    check_bound,
    confusion,
    recency_bias,
    task_confusion,
    task_inference_acc,
)
from cl_platform.metrics.definitions import Definition
from cl_platform.metrics.flips import FLIP_DEFINITIONS, Flips, churn, negative_flip_rate, positive_flip_rate
from cl_platform.metrics.matrix import Outcome, Result, Undefined
from cl_platform.metrics.results import entry

if TYPE_CHECKING:
    from cl_platform.evaluation import Counts
    from cl_platform.scenarios import Stream, Task

_DEFINITIONS: dict[str, Definition] = {
    d.key: d for d in (*FLIP_DEFINITIONS, *CALIBRATION_DEFINITIONS, *CONFUSION_DEFINITIONS)
}


class Diagnostics:
    """Confusion after each task, flips at each switch and calibration, in the run's primary prediction space.

    Args:
        stream: the tasks.
        space: the primary prediction space.
    """

    def __init__(self, stream: Stream, space: str) -> None:
        self._stream, self._space = stream, space
        self._after: list[dict[str, Any]] = []
        self._flips: dict[int, Flips] = {}  # position of the new task -> counts over old tasks' images
        self._bins: dict[int, BinCounts] = {}
        self._answers: dict[int, list[int]] = {}  # of the latest evaluation, by task id
        self._forgotten: set[int] = set()

    def add(self, position: int, counts: Counts, tasks: Sequence[Task] | None = None) -> None:
        """Take the evaluation after the task at ``position``.

        Args:
            position: of the task just learnt.
            counts: of its evaluation.
            tasks: those learnt by then and not forgotten, the first that were counted; all of them by default.

        Raises:
            ValueError: the counts of the two spaces contradict each other.
        """
        tasks = self._stream.tasks[: position + 1] if tasks is None else tasks
        answers = [a.tolist() for a in counts.answers[: len(tasks)]]
        labels = [task.test.labels.tolist() for task in tasks]
        known = {c for classes in self._answerable(position) for c in classes}
        gone = {c for task in self._stream.tasks if task.task_id in self._forgotten for c in task.classes} - known
        classes = sorted(known | gone.intersection(chain(*answers)))  # answered where its head rows were kept
        flat = confusion([*chain(*answers)], [*chain(*labels)], classes)
        names = [f"class {c}" if c in gone else self._stream.class_names[c] for c in classes]
        newest = self._stream.tasks[position].task_id
        record = {"position": position, "task_id": newest, "classes": classes, "class_names": names}
        self._after.append({**record, "counts": flat})
        self._bins[position] = counts.calibration
        compared = Flips()
        for task, now, truth in zip(tasks, answers, labels, strict=True):
            if task.task_id in self._answers:
                compared += Flips.between(self._answers[task.task_id], now, truth)
        if self._answers:
            self._flips[position] = compared
        self._answers = {task.task_id: now for task, now in zip(tasks, answers, strict=True)}
        if self._space == "cil" and (by_task := self._by_task()) is not None:
            right = {space: sum(counts.correct[space][: len(tasks)]) for space in ("cil", "til")}
            check_bound(right["cil"], right["til"], by_task)

    def take_back(self) -> None:
        """Remove the newest evaluation; flips at the next one are counted from its answers."""
        record = self._after.pop()
        self._flips.pop(record["position"], None)

    def forget(self, task_id: int, classes: Collection[int]) -> None:
        """Delete what is known about a task's images, one by one and class by class.

        Args:
            task_id: of the forgotten task.
            classes: class ids that no other task has.
        """
        self._forgotten.add(task_id)
        self._answers.pop(task_id, None)
        for record in self._after:
            kept = [place for place, c in enumerate(record["classes"]) if c not in classes]
            for name in ("classes", "class_names"):
                record[name] = [record[name][place] for place in kept]
            record["counts"] = [[record["counts"][row][column] for column in kept] for row in kept]

    def confusion(self) -> dict[str, Any]:
        """Content of ``confusion.json``."""
        return {"space": self._space, "after": self._after}

    def entries(self) -> dict[str, dict[str, Any]]:
        """Entries of ``metrics.json`` under suffixed keys, as of the latest evaluation."""
        flips = sum(self._flips.values(), Flips())
        bins = self._bins[max(self._bins)] if self._bins else BinCounts.empty()
        rates = {"negative_flip_rate": negative_flip_rate, "positive_flip_rate": positive_flip_rate, "churn": churn}
        outcomes: dict[str, Outcome] = {key: function(flips) for key, function in rates.items()}
        outcomes |= {"ece_15": ece(bins), "overconfidence": overconfidence(bins)}
        by_task = self._by_task()
        missing = Undefined("tasks_share_classes" if self._after else "empty")
        outcomes["task_inference_acc"] = missing if by_task is None else task_inference_acc(by_task)
        outcomes["recency_bias"] = missing if by_task is None else recency_bias(by_task)
        made = {f"{key}_{self._space}": self._entry(key, outcome) for key, outcome in outcomes.items()}
        for key, function in rates.items():
            switches = {str(self._stream.tasks[p].task_id): _value(function(f)) for p, f in self._flips.items()}
            made[f"{key}_{self._space}"]["by_switch"] = switches
        return made

    def scalars(self) -> dict[str, float]:
        """For loggers, as of the latest evaluation."""
        outcome = ece(self._bins[max(self._bins)])
        return {"calibration/ece_15": float(outcome.value)} if isinstance(outcome, Result) else {}  # type: ignore[arg-type]

    def _by_task(self) -> list[list[int]] | None:
        """The latest confusion summed by task; ``None`` where tasks share classes."""
        if not self._after:
            return None
        latest = self._after[-1]
        tasks = self._answerable(latest["position"])
        known = {c for classes in tasks for c in classes}
        if len(known) < sum(map(len, tasks)):
            return None
        gone = tuple(c for c in latest["classes"] if c not in known)  # first: the newest task stays last
        return task_confusion(latest["counts"], [gone, *tasks] if gone else tasks)

    def _answerable(self, position: int) -> list[tuple[int, ...]]:
        """Classes, by task, that may be answered after the task at ``position``: declared ones from the start."""
        tasks = self._stream.tasks if self._stream.hidden else self._stream.tasks[: position + 1]
        return [task.classes for task in tasks if task.task_id not in self._forgotten]

    def _entry(self, key: str, outcome: Outcome) -> dict[str, Any]:
        definition = _DEFINITIONS[key]
        if isinstance(outcome, Result):
            return entry(definition.id, outcome.value, self._space, definition.unit)
        return entry(definition.id, None, self._space, definition.unit, reason=outcome.reason)

    def to_json(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "after": self._after,
            "answers": {str(task_id): answers for task_id, answers in self._answers.items()},
            "forgotten": sorted(self._forgotten),
            "bins": {str(position): bins.to_dict() for position, bins in self._bins.items()},
            "flips": {str(p): [f.negative, f.positive, f.changed, f.total] for p, f in self._flips.items()},
        }

    def load_json(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`to_json` gave."""
        self._after = list(state["after"])
        self._answers = {int(task_id): list(answers) for task_id, answers in state["answers"].items()}
        self._forgotten = set(state["forgotten"])
        self._bins = {int(position): BinCounts.from_dict(bins) for position, bins in state["bins"].items()}
        self._flips = {int(position): Flips(*numbers) for position, numbers in state["flips"].items()}


def _value(outcome: Outcome) -> Any:
    return outcome.value if isinstance(outcome, Result) else None
