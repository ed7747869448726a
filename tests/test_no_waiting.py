"""No step makes the host wait for the device: steps run on a device without numbers, where reading one fails."""

import pytest
from tiny import begun, config_of, digits, trainer_for

import cl_platform.strategies  # noqa: F401
from cl_platform import registry
from cl_platform.scenarios import TaskLoader
from cl_platform.testing.stepping import NOTHING, NoBlockingCopies, autocast_without_numbers, without_numbers

READS = {  # name -> keys under which it does so at every step
    "gem": {},  # its Gram matrix goes to a solver on the host
    "online_lora": {"window": 2},  # one truth value, whether to fold an adapter in
}


@pytest.fixture(autouse=True)
def _a_device_without_numbers():
    with autocast_without_numbers():
        yield


def step_without_numbers(name, batches=2):
    config = config_of(name, strategy=READS.get(name, {}))
    stream = digits(3)
    learner = begun(config, stream, position=1)
    task = stream.tasks[1]
    learner.trainer = trainer_for(config)
    optimizer = without_numbers(learner)
    for strategy in learner.composition.strategies:
        if hasattr(strategy, "_anchored"):
            strategy._anchored = None  # worked out once a task
    for number, batch in zip(range(batches), TaskLoader(task.train, task.task_id, 8, 0), strict=False):
        moved = learner.transfer_batch_to_device(batch, NOTHING, 0)
        with NoBlockingCopies():
            optimizer.zero_grad()
            learner.training_step(moved, number).backward()
            learner.on_after_backward()
            learner.on_before_optimizer_step(optimizer)
        optimizer.step()
        with NoBlockingCopies():
            learner.composition.after_update(learner._last_step)
            learner.on_train_batch_end(None, moved, number)


WITH_STEPS = [name for name in registry.strategies.names() if registry.strategies.get(name).needs.gradient]


@pytest.mark.parametrize("name", [name for name in WITH_STEPS if name not in READS])
def test_a_step_reads_nothing_from_the_device(name):
    step_without_numbers(name)


@pytest.mark.parametrize("name", READS)
def test_what_must_read_from_the_device_does(name):
    with pytest.raises((RuntimeError, NotImplementedError)):
        step_without_numbers(name)
