import warnings

import numpy as np
import pytest
import torch

from cl_platform.errors import UserError
from cl_platform.memory.adapters import STORAGES, AvalanchePolicy, avalanche_storage
from cl_platform.memory.buffer import ReplayBuffer
from cl_platform.random_streams import seeded_globals

warnings.filterwarnings("ignore")
IMAGES = torch.arange(60 * 12, dtype=torch.int64).reshape(60, 3, 2, 2).to(torch.uint8)
CLASSES = [np.array([3, 0, 3, 0] * 5), np.array([9, 1] * 10), np.array([0, 6] * 10)]


def storages():
    from avalanche.training.storage_policy import ParametricBuffer

    made = {name: lambda name=name: avalanche_storage(name, 11) for name in STORAGES}
    made |= {f"by_{g}": lambda g=g: ParametricBuffer(11, groupby=g) for g in ("class", "task", "experience")}
    return made


NAMES = (*STORAGES, "by_class", "by_task", "by_experience")


def offer(buffer, task_id):
    ids = range(20 * task_id, 20 * task_id + 20)
    buffer.insert(IMAGES[list(ids)], CLASSES[task_id], [task_id] * 20, ids, task_id)


def avalanches_own(storage, seed, tasks):
    """Ids that the policy keeps when Avalanche alone holds its state."""
    from types import SimpleNamespace

    from cl_platform.memory.adapters import _dataset

    for task_id in tasks:
        dataset = _dataset(np.arange(20 * task_id, 20 * task_id + 20), CLASSES[task_id], np.full(20, task_id))
        agent = SimpleNamespace(clock=SimpleNamespace(train_exp_counter=task_id))
        with seeded_globals(seed, task_id, "buffer.insert"):
            storage.post_adapt(agent, SimpleNamespace(dataset=dataset))
    return sorted(int(storage.buffer[i][0]) for i in range(len(storage.buffer)))


@pytest.mark.parametrize("name", NAMES)
def test_the_buffer_holds_what_avalanche_keeps_and_goes_on_after_loading(name):
    make = storages()[name]
    state = torch.get_rng_state()
    one, other = ReplayBuffer(AvalanchePolicy(make(), 4)), ReplayBuffer(AvalanchePolicy(make(), 4))
    for task_id in range(3):
        offer(one, task_id)
        assert sorted(one.contents.example_ids.tolist()) == avalanches_own(make(), 4, range(task_id + 1))
        assert torch.equal(one.read(np.arange(len(one))).images, IMAGES[one.contents.example_ids])
        if task_id == 1:
            other.load_state_dict(one.state_dict())
    offer(other, 2)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_tasks_rows_are_gone_and_the_next_task_is_taken(name):
    buffer = ReplayBuffer(AvalanchePolicy(storages()[name](), 4))
    offer(buffer, 0)
    offer(buffer, 1)
    others = [i for i in buffer.contents.example_ids.tolist() if i < 20]
    buffer.drop_task(1)
    assert buffer.contents.example_ids.tolist() == others
    offer(buffer, 2)
    assert buffer.owners() <= {0, 2}
    assert len(buffer) <= 11
    assert torch.equal(buffer.read(np.arange(len(buffer))).images, IMAGES[buffer.contents.example_ids])


def test_policies_whose_state_could_not_be_saved_are_refused():
    from avalanche.training.storage_policy import HerdingSelectionStrategy, ParametricBuffer, ReservoirSamplingBuffer

    herding = HerdingSelectionStrategy(torch.nn.Sequential(torch.nn.Linear(2, 2)), "0")
    with pytest.raises(UserError, match="Use buffer.policy=herding"):
        AvalanchePolicy(ParametricBuffer(5, selection_strategy=herding), 0)
    own = ReservoirSamplingBuffer(5)
    own.diary = [1, 2]
    with pytest.raises(UserError, match="keeps diary"):
        AvalanchePolicy(own, 0)
    with pytest.raises(UserError, match="Did you mean ClassBalancedBuffer"):
        avalanche_storage("ClassBalanceBuffer", 5)
