"""Tiny learners that carry out instructions, for the tests of CLPU."""

from tiny import copy_of
from torch import nn

from cl_platform.backbones.base import Backbone
from cl_platform.random_streams import RUN_LEVEL, seeded_globals
from cl_platform.unlearning.sequence import parse

KEYS = {"per_task": 12, "memory_batch": 8}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.0, "weight_decay": 5e-4}
PUBLISHED = "R0 T1 T2 R3 R1 F2 T4 F4"


def cnn():
    """Two convolutions, with batch norm."""
    with seeded_globals(0, RUN_LEVEL, "tiny_cnn"):
        first = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
        model = nn.Sequential(*first, nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    return Backbone(model.eval(), "cnn", 128, 16)


def obeying(learner_of, monkeypatch):
    """Makes learners on five tasks that obey sequences; ``network`` is ``vit`` or ``cnn``."""

    class Obeying(learner_of):
        def obey(self, text, epochs=1):
            return self.carry_out(parse(text), epochs)

        def carry_out(self, stages, epochs=1):
            learner = self.learner
            for stage in stages:
                if stage.kind == "learn":
                    learner.composition.instruct(stage.task_id, stage.instruction)
                    self.learn(stage.task_id, epochs=epochs)
                elif stage.kind == "promote":
                    learner.composition.promote(stage.task_id)
                else:
                    learner.drop_task(stage.task_id)
            return self

        def told(self, text):
            """The start of a task, without its training."""
            (stage,) = parse(text)
            self.learner.composition.instruct(stage.task_id, stage.instruction)
            return self.begin(stage.task_id)

        def whole(self):
            return copy_of(self.learner.state_dict())

    def make(network="cnn", strategies=None, pretrained=False, **keys):
        if network == "cnn":
            monkeypatch.setitem(learner_of.__init__.__globals__, "tiny_vit", lambda **_: cnn())
        chosen = {"clpu": {**KEYS, **keys}} if strategies is None else strategies
        if pretrained:
            plain = learner_of.__init__.__globals__["tiny_vit"]

            def marked(**changes):
                trunk = plain(**changes)
                trunk.weights_from = "packed"
                return trunk

            monkeypatch.setitem(learner_of.__init__.__globals__, "tiny_vit", marked)
        return Obeying(chosen, vit={"depth": 2}, stream={"tasks": 5}, **SGD)

    return make


def network_of(bench, task_id):
    return bench.strategy._network(task_id)


def own_logits(bench, task_id, images):
    """Logits (n, C) of a task's own network over the task's classes."""
    with bench.learner.answering():
        return bench.strategy._logits(task_id, network_of(bench, task_id)(bench.batch(images=images).images))
