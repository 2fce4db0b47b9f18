"""The global random states of torch, NumPy and Python."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def random_states(device: torch.device) -> dict[str, Any]:
    """The global random states of torch, NumPy and Python, as tensors and numbers.

    Args:
        device: device whose state is taken in addition to the CPU's.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # transforms draw from it, so a replay needs it
    of_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_index(device))
    return {
        "torch": torch.get_rng_state(),
        "device": of_device,
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore random states that `random_states` returned.

    Args:
        states: states of an earlier moment.
        device: same device as in the call of `random_states`.
    """
    name, keys, *rest = states["numpy"]
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        torch.get_device_module(device).set_rng_state(states["device"], *_index(device))
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # torch knows one mps device, and takes no argument for it


def draws_random_numbers(call: Callable[[], object], device: torch.device) -> bool:
    """Whether a call moves a global random state every time.

    Another thread may move one meanwhile, but hardly during each of three calls.

    Args:
        call: function to call up to three times.
        device: device whose state is watched in addition to the CPU's.
    """
    return all(_moves_random_states(call, device) for _ in range(3))


def _moves_random_states(call: Callable[[], object], device: torch.device) -> bool:
    before = random_states(device)
    call()
    return not _is_equal(before, random_states(device))


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_is_equal(one[key], other[key]) for key in one)
    return all(map(_is_equal, one, other)) if isinstance(one, list) else bool(one == other)
