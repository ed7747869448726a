"""What a drop takes along beside the bytes: references, kept features, optimizers; and what it refuses."""

import gc
import weakref

import pytest
from paired import CASES, IDS, compared, forgot, names_that_differ, trained
from tiny import built, config_of, digits, learn

from cl_platform.errors import UserError
from cl_platform.unlearning.lineage import learnt_state


@pytest.mark.parametrize("name, keys", CASES, ids=IDS)
def test_nothing_of_the_last_task_is_referenced_once_it_is_dropped(name, keys):
    config, stream = config_of(name, strategy=keys), digits(2)
    learner = trained(config, stream)
    own = [weakref.ref(t) for n, t in (*learner.named_parameters(), *learner.named_buffers()) if ".tasks.1." in n]
    assert own
    learner.drop_task(1)
    gc.collect()
    assert not [ref for ref in own if ref() is not None]
    assert not any(".tasks.1." in key for key in learnt_state(learner))
    assert all(key[2] != 1 for key in learner.cache._kept)
    assert learner.task is None
    assert not learner.trainer.optimizers


def test_a_dropped_learner_is_restored_by_its_state_alone():
    config, stream = config_of("s_lora"), digits(3)
    one = forgot(config, stream)
    other = built(config, stream)
    other.load_learnt_state({name: tensor.clone() for name, tensor in one.learnt_state().items()})
    assert compared(one, other).equal
    assert not names_that_differ(one, other)


def test_a_task_that_was_not_learnt_or_is_dropped_already_is_refused():
    config, stream = config_of("nmc"), digits(3)
    learner = learn(built(config, stream), config, stream.tasks[:2])
    with pytest.raises(UserError, match=r"task=2: was never learnt here.*Learnt are: 0, 1"):
        learner.drop_task(2)
    learner.drop_task(1)
    with pytest.raises(UserError, match=r"task=1: .*forgotten already"):
        learner.drop_task(1)


def test_the_scale_of_losses_in_half_precision_starts_anew_in_each_task():
    class Scaler:
        def __init__(self):
            self.state = {"scale": 65536.0}

        def is_enabled(self):
            return True

        def state_dict(self):
            return dict(self.state)

        def load_state_dict(self, state):
            self.state = dict(state)

    config, stream = config_of("s_lora"), digits(2)
    learner = trained(config, stream)
    learner.trainer.precision_plugin.scaler = scaler = Scaler()
    learner.configure_optimizers()
    scaler.state["scale"] = 2.0
    learner.configure_optimizers()
    assert scaler.state == {"scale": 65536.0}
