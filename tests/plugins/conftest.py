"""What plug-ins register inside a test is gone after it."""

import copy

import pytest
from hydra.core.config_store import ConfigStore

import cl_platform.plugins as loading
from cl_platform import registry


@pytest.fixture(autouse=True)
def forget_plugins():
    loading._registered()  # what is built in stays
    states = [kind.state() for kind in registry.KINDS]
    found, choices = dict(loading._found), copy.deepcopy(loading._choices)
    yield
    for group, names in loading._choices.items():
        for name in set(names) - set(choices.get(group, ())):
            del ConfigStore.instance().repo[group][f"{name}.yaml"]
    for kind, state in zip(registry.KINDS, states, strict=True):
        kind.put_back(state)
    loading._found.clear()
    loading._found.update(found)
    loading._choices.clear()
    loading._choices.update(choices)
