import time

import pytest
import torch
from clusterguard.cli import _threads
from clusterguard.cli._threads import settle_threads


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Four threads to begin with, and as many as before afterwards."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [({1: 1.0, 2: 0.5, 4: 0.3}, 4), ({1: 1.0, 2: 0.95, 4: 0.93}, 1), ({1: 1.0, 2: 0.6, 4: 3.0}, 2)],
    ids=["many", "one", "two"],
)
def test_as_many_threads_are_taken_as_pay(small_guard, monkeypatch, seconds, expected):
    monkeypatch.setattr(_threads, "seconds_of_gradient", lambda *_: seconds[torch.get_num_threads()])
    assert settle_threads(small_guard, torch.rand(20, 1, 8, 8)) == expected
    assert torch.get_num_threads() == expected


def test_what_the_environment_says_counts(small_guard, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(_threads, "seconds_of_gradient", None)
    assert settle_threads(small_guard, torch.rand(20, 1, 8, 8)) == 4


def test_a_slow_network_is_measured_on_few_images_and_the_detector_stays_as_it_is(small_guard, monkeypatch):
    asked = []

    def measure(detector, images):
        asked.append(len(images))
        return 1.0 if len(asked) == 1 else 0.1

    monkeypatch.setattr(_threads, "seconds_of_gradient", measure)
    small_guard.train()
    settle_threads(small_guard, torch.rand(20, 1, 8, 8))
    assert asked[0] == 20
    assert set(asked[1:]) == {8}
    assert small_guard.training


def test_a_gradient_is_what_is_measured(small_guard):
    started = time.perf_counter()
    assert 0 < _threads.seconds_of_gradient(small_guard.eval(), torch.rand(20, 1, 8, 8)) < time.perf_counter() - started
