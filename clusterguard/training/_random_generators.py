"""The states of random generators of torch, NumPy and Python, as values that a checkpoint takes."""

import random
from typing import Any

import numpy as np
from torch import Generator


def is_of_the_system(generator: object) -> bool:
    """Whether a generator draws from the operating system, so that it has no state."""
    return isinstance(generator, random.SystemRandom)


def get_state(generator: Any) -> Any:
    """The state of a generator."""
    if isinstance(generator, Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return _plain(_numpy_state(generator))


def set_state(generator: Any, state: Any) -> None:
    """Give a generator a state that `get_state` returned."""
    if isinstance(generator, Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_arrays(state))
    else:
        _bits(generator).state = _arrays(state)


def _numpy_state(generator: Any) -> Any:
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return _bits(generator).state


def _bits(generator: Any) -> Any:
    return generator.bit_generator if isinstance(generator, np.random.Generator) else generator


def _plain(state: Any) -> Any:
    """The state of a NumPy generator, with arrays as type and list of numbers, because a checkpoint takes no arrays."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    if isinstance(state, np.ndarray):
        return [str(state.dtype), state.tolist()]
    return state.item() if isinstance(state, np.generic) else state


def _arrays(state: Any) -> Any:
    """The inverse of `_plain`."""
    if isinstance(state, dict):
        return {name: _arrays(value) for name, value in state.items()}
    return np.array(state[1], dtype=state[0]) if isinstance(state, list) else state


def kind_of(generator: Any) -> str:
    """A description of a generator, from which `make_generator` makes one of the same kind."""
    if isinstance(generator, Generator):
        return f"torch {generator.device}"
    if isinstance(generator, random.Random):
        return "python"
    if isinstance(generator, np.random.RandomState):
        return f"old {generator.get_state(legacy=False)['bit_generator']}"
    return f"{'new' if isinstance(generator, np.random.Generator) else 'bits'} {type(_bits(generator)).__name__}"


def make_generator(kind: str) -> Any:
    """A new generator of the kind that `kind_of` describes."""
    family, _, detail = kind.partition(" ")
    if family == "torch":
        return Generator(detail)
    if family == "python":
        return random.Random()
    bits = getattr(np.random, detail)()
    return {"old": np.random.RandomState, "new": np.random.Generator}.get(family, lambda bits: bits)(bits)
