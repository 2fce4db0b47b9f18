import random

import numpy as np
import pytest
import torch
from clusterguard._support import random_states, set_random_states
from clusterguard.errors import InputError
from clusterguard.training._replay import Replay
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

CPU = torch.device("cpu")


class Noisy(Dataset):
    """Ten images, augmented from all three global random states."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index + torch.rand(1) + np.random.rand() + random.random(), index  # noqa: NPY002


def draw(count):
    return torch.rand(count).tolist() + np.random.rand(count).tolist() + [random.random()]  # noqa: NPY002


def test_all_random_states_come_back():
    states = random_states(CPU)
    first = draw(3)
    set_random_states(states, CPU)
    assert draw(3) == first


@given(st.integers(0, 9), st.booleans(), st.integers(0, 3))
def test_a_replay_goes_on_with_the_batches_that_would_have_come(taken, has_generator, noise):
    def loader(seed):
        generator = torch.Generator().manual_seed(seed) if has_generator else None
        return DataLoader(Noisy(), batch_size=3, shuffle=True, generator=generator)

    torch.manual_seed(1)
    replay = Replay(loader(1), CPU)
    for _ in range(taken):
        next(replay, None)
        draw(noise)  # as attacks do between batches
    state, states = replay.state_dict(), random_states(CPU)
    expected = [[part.tolist() for part in batch] for _ in range(2) for batch in replay]

    torch.manual_seed(5)
    fresh = Replay(loader(7), CPU)
    fresh.load_state_dict(state)
    set_random_states(states, CPU)
    replayed = [[part.tolist() for part in batch] for _ in range(2) for batch in fresh]
    assert replayed == expected


def test_passes_follow_each_other_and_positions_are_known():
    replay = Replay([1, 2, 3], CPU)
    assert replay.length == 3
    assert list(replay) == [1, 2, 3]
    assert replay.taken == 0
    next(replay)
    assert replay.taken == 1
    replay.rewind()
    assert list(replay) == [1, 2, 3]
    assert Replay(iter([1]), CPU).length is None


def test_a_loader_that_has_shrunk_is_named():
    replay = Replay([1, 2, 3], CPU)
    for _ in range(3):
        next(replay)
    with pytest.raises(InputError, match="at least 3 batches"):
        Replay([1, 2], CPU).load_state_dict(replay.state_dict())
