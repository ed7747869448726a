import random

import numpy as np
import pytest
import torch

from cl_platform.random_streams import RUN_LEVEL, seeded_globals, stream, stream_seed


@pytest.mark.parametrize(
    ("key", "seed"),
    [
        ((0, 1, "shuffle", 0), 3190234297057571680),
        ((0, 2, "shuffle", 0), 5632441125679486113),
        ((0, 1, "init"), 161941982790833951),
        ((0, RUN_LEVEL, "ranpac/projection"), 2956574636905160716),
    ],
)
def test_seeds_are_a_fixed_function_of_their_key(key, seed):
    assert stream_seed(*key) == seed


def test_two_keys_give_two_streams_and_one_key_the_same():
    draw = [torch.randn(4, generator=stream(0, t, "init")) for t in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_seeded_globals_leaves_the_global_generators_as_they_were():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with seeded_globals(0, 1, "head"):
        first = torch.randn(3), np.random.rand(), random.random()
    with seeded_globals(0, 1, "head"):
        second = torch.randn(3), np.random.rand(), random.random()
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
