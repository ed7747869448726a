"""Every strategy either learns a stream whose bounds are hidden, or is refused by name with those that do."""

import dataclasses

import pytest
import torch
from tiny import answers, built, config_of, digits, images_of, trainer_for

import cl_platform.strategies  # noqa: F401  registers the strategies
from cl_platform import registry
from cl_platform.errors import UserError
from cl_platform.plan import Plan
from cl_platform.scenarios import as_told

NAMES = registry.strategies.names()
FREE = [name for name in NAMES if not registry.strategies.get(name).needs.boundaries]
HIDDEN = dataclasses.replace(digits(), hidden=True)


def config_for(name):
    config = config_of(name)
    if registry.strategies.get(name).needs.buffer:
        config = dataclasses.replace(config, strategy={"er": config_of("er").strategy["er"], **config.strategy})
    return config


def through(name, **changes):
    """A learner that went through the hidden stream as a run lets it."""
    config = config_for(name)
    learner = built(config, as_told(HIDDEN))
    plan = Plan(dataclasses.replace(config.trainer, **changes), 0, HIDDEN, learner.composition)
    learner.trainer = trainer_for(config)
    for phase in plan.phases:
        learner.begin_task(phase.task, plan.epochs)
        if learner.composition.needs_gradient:
            learner.trainer.fit_loop.max_epochs = plan.epochs
            loader = plan.loader(phase, learner.composition.training_set(phase.task))
            learner.trainer.fit(learner, train_dataloaders=loader)
        learner.end_task(phase.task)
    return learner, plan


@pytest.mark.parametrize("name", FREE)
def test_a_strategy_that_needs_no_bounds_learns_without_them(name):
    learner, plan = through(name)
    assert learner.learnt == [0]
    assert learner.seen_classes() == [0, 1, 2, 3]
    logits = answers(learner, images_of(digits()))
    assert logits.shape == (24, 4)
    assert bool(torch.isfinite(logits).all())
    if plan.through:
        assert plan.epochs == 1
        assert [look.position for look in plan.looks] == [0, 1]
    else:
        assert [look.position for look in plan.looks] == [1]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FREE])
def test_a_strategy_that_needs_bounds_is_refused_by_name_with_those_that_do_not(name):
    with pytest.raises(UserError) as caught:
        built(config_for(name), HIDDEN)
    line = str(caught.value)
    assert line.startswith(f"scenario.boundaries=hidden: {name} ")
    for able in FREE:
        assert able in line


@pytest.mark.parametrize("batches", [1, 3])
def test_planned_updates_add_up_to_those_taken(batches):
    learner, plan = through("finetune", batch_size=10, accumulate_grad_batches=1, max_epochs=batches)
    assert learner.trainer.global_step == sum(plan.updates)
    assert len(plan.updates) == 2


def test_a_run_with_shown_bounds_is_planned_as_before():
    config = config_for("finetune")
    plan = Plan(dataclasses.replace(config.trainer, max_epochs=3), 0, digits(), built(config, digits()).composition)
    assert not plan.through
    assert plan.phases == plan.looks
    assert (plan.epochs, plan.passes, plan.updates) == (3, 1, [6, 6])


@pytest.mark.parametrize(("insert", "offers"), [("first_epoch", 32), ("every_epoch", 96)])
def test_passes_inside_the_one_epoch_offer_an_image_once(insert, offers):
    config = config_of("er", strategy={"insert": insert})
    learner = built(config, as_told(HIDDEN))
    plan = Plan(dataclasses.replace(config.trainer, max_epochs=3, batch_size=10), 0, HIDDEN, learner.composition)
    learner.trainer = trainer_for(config)
    learner.begin_task(plan.phases[0].task, 1)
    learner.trainer.fit(learner, train_dataloaders=plan.loader(plan.phases[0]))
    buffer = learner.composition.members["er"].buffer
    assert len(buffer) == offers  # a batch may hold images of two passes
    assert buffer.unique == 32


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("er", {"buffer": {"policy": "herding"}}, r"strategy\.er\.buffer\.policy=herding.*hidden bounds"),
        ("er_ace", {"task_free": False}, r"strategy\.er_ace\.task_free=false.*hidden bounds"),
    ],
)
def test_what_would_never_happen_without_bounds_is_refused(name, keys, message):
    with pytest.raises(UserError, match=message):
        built(config_of(name, strategy=keys), as_told(HIDDEN))
