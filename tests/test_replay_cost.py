"""What a step costs, counted by hooks: passes through the network with and without gradient, backwards, examples.

The unit is a forward pass of one example; its backward costs two. A step is taken in a later task, with a filled buffer
and more remembered images than any draw takes.
"""

import contextlib
from dataclasses import dataclass, field

import lightning as L
import pytest
import torch
from tiny import SIDE, built, config_of, digits, fit, learn

B, b, S, M = 8, 4, 12, 15
"""Images of a batch, of a draw, candidates of a draw, and slots of the buffer; a ring of it has M / 3."""


@dataclass
class Count:
    """Examples of each pass of one step, in their order."""

    with_gradient: list[int] = field(default_factory=list)
    without: list[int] = field(default_factory=list)
    backwards: int = 0
    backwarded: list[int] = field(default_factory=list)

    @property
    def per_example(self) -> float:
        """Cost for each of the B current examples."""
        return (sum(self.with_gradient) + sum(self.without) + 2 * sum(self.backwarded)) / B


class Counter(L.Callback):
    """Counts what happens between the start and the end of each batch."""

    def __init__(self, monkeypatch):
        self.patch, self.steps = monkeypatch, []
        self._stack, self._inside = contextlib.ExitStack(), False

    def on_train_batch_start(self, trainer, learner, *rest):
        count = Count()
        self.steps.append(count)
        hook = learner.backbone.register_forward_hook(lambda _, inputs, output: self._passed(count, output))
        self._stack.callback(hook.remove)
        patch = self._stack.enter_context(self.patch.context())
        for owner, name in ((torch.Tensor, "backward"), (torch.autograd, "grad"), (torch.autograd, "backward")):
            patch.setattr(owner, name, self._counted(count, owner, name))

    def _passed(self, count, output):
        if not torch.is_grad_enabled():
            count.without.append(len(output))
            return
        count.with_gradient.append(len(output))
        output.register_hook(lambda gradient: count.backwarded.append(int(gradient.flatten(1).any(1).sum())))

    def _counted(self, count, owner, name):
        real = getattr(owner, name)

        def called(*args, **kwargs):
            outermost, self._inside = not self._inside, True  # one of these functions may call another
            count.backwards += outermost
            try:
                return real(*args, **kwargs)
            finally:
                self._inside = not outermost

        return called

    def on_train_batch_end(self, *rest):
        self._stack.close()


def counted(name, monkeypatch, task, keys=(), tasks=3):
    """The counts of every step of the given task, those before it learnt."""
    config = config_of(name, strategy=dict(keys))
    stream = digits(tasks)
    learner = learn(built(config, stream), config, stream.tasks[:task])
    counter = Counter(monkeypatch)
    fit(learner, config, stream.tasks[task], counter)
    assert len(counter.steps) == 2
    return counter.steps


RHO = b / B
DRAW = {"batch_size": b, "buffer": {"policy": "reservoir", "size": M}}
RING = {"policy": "ring", "size": M}
EXPECTED = {  # keys; passes with gradient, without, and backwards in the third task; cost of a current example
    "finetune": ({}, [B], [], 1, 3),
    "er": (DRAW, [B + b], [], 1, 3 * (1 + RHO)),
    "er_ace": (DRAW, [B, b], [], 1, 3 * (1 + RHO)),
    "der": (DRAW, [B, b], [], 1, 3 * (1 + RHO)),
    "derpp": (DRAW, [B, b, b], [], 1, 3 * (1 + 2 * RHO)),
    "agem": ({"batch_size": b, "buffer": RING}, [B, b], [], 2, 3 * (1 + RHO)),
    "gem": ({"buffer": RING}, [B, M // 3, M // 3], [], 3, 3 * (1 + 2 * (M // 3) / B)),
    "mir": ({**DRAW, "candidates": S}, [B, b], [S, S], 2, 3 * (1 + RHO) + 2 * S / B),
    "ewc": ({}, [B], [], 1, 3),
    "l2": ({}, [B], [], 1, 3),
    "si": ({}, [B], [], 1, 3),
    "lwf": ({}, [B], [B], 1, 4),
    "feature_distillation": ({}, [B], [B], 1, 4),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_step_of_a_later_task_takes_these_passes_and_no_more(name, monkeypatch):
    keys, with_gradient, without, backwards, cost = EXPECTED[name]
    for count in counted(name, monkeypatch, 2, keys):
        assert count.with_gradient == with_gradient
        assert count.without == without
        assert count.backwards == backwards
        assert sorted(count.backwarded) == sorted(with_gradient)
        assert count.per_example == pytest.approx(cost)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_first_batch_of_all_costs_what_finetuning_costs(name, monkeypatch):
    count = counted(name, monkeypatch, 0, EXPECTED[name][0])[0]
    assert (count.with_gradient, count.without, count.backwards) == ([B], [], 1)
    assert count.backwarded == [B]


@pytest.mark.parametrize("name", ["agem", "gem", "lwf", "feature_distillation", "er_ace"])
def test_what_looks_at_old_tasks_costs_nothing_more_in_the_first(name, monkeypatch):
    for count in counted(name, monkeypatch, 0, EXPECTED[name][0]):
        assert (count.with_gradient, count.without, count.backwards) == ([B], [], 1)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_gem_pays_for_every_old_task_and_agem_for_one_draw(tasks, monkeypatch):
    for name, backwards in (("gem", 1 + tasks), ("agem", 2)):
        keys = {**EXPECTED[name][0], "buffer": {"policy": "ring", "size": 20}}
        count = counted(name, monkeypatch, tasks, keys, tasks=4)[0]
        assert count.backwards == backwards
        assert len(count.with_gradient) == backwards


def test_mir_scores_nothing_where_all_candidates_are_replayed(monkeypatch):
    for count in counted("mir", monkeypatch, 2, {**DRAW, "candidates": b}):
        assert (count.with_gradient, count.without, count.backwards) == ([B, b], [], 2)


def test_the_counter_sees_a_pass_a_backward_and_a_gradient_too_many(monkeypatch):
    from cl_platform.strategies.finetune import Finetune

    real = Finetune.losses

    def wasteful(self, step):
        images = torch.zeros(3, 3, SIDE, SIDE)
        with torch.no_grad():
            self.context.backbone(images)
        other = self.context.backbone(images).sum()
        torch.autograd.grad(other, list(self.context.backbone.parameters()), allow_unused=True)
        return real(self, step)

    monkeypatch.setattr(Finetune, "losses", wasteful)
    for count in counted("finetune", monkeypatch, 1):
        assert (count.with_gradient, count.without, count.backwards) == ([B, 3], [3], 2)
        assert count.backwarded == [3, B]
