"""What a training run leaves behind: a record of each epoch, and a file that it can go on from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from clusterguard.files import write_atomically
from torch import Generator


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: counted from 1.
        loss: mean over steps; for `AdversarialClusterTrainer` equation 31 as a negative log-likelihood, without its
            constant.
        accuracy: share of benign training images that were labelled rightly, while training.
        attack_success_rate: share of the training attack's images accepted under a wrong label; NaN in warm-up.
        mean_threshold: mean over classes of the thresholds in use at the end; +inf before the first refresh.
        seconds: wall time.
    """

    epoch: int
    loss: float
    accuracy: float
    attack_success_rate: float
    mean_threshold: float
    seconds: float


class Stateful(Protocol):
    """Modules, optimisers, schedulers."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take over a state."""
        ...


def save_checkpoint(
    path: str | Path,
    *,
    parts: Mapping[str, Stateful | None],
    generators: Mapping[str, Generator | None],
    values: Mapping[str, Any],
) -> None:
    """Write states, torch's global randomness included, whole or not at all; no code is pickled.

    Args:
        path: of the file.
        parts: by name; None where a run has no such part.
        generators: by name; None where a run has no such generator.
        values: tensors, numbers, strings, lists and dicts of them.
    """
    state = {
        "parts": {name: part.state_dict() for name, part in parts.items() if part is not None},
        "generators": {name: own.get_state() for name, own in generators.items() if own is not None},
        "global_generator": torch.get_rng_state(),
        "values": dict(values),
    }
    write_atomically(path, partial(torch.save, state))


def load_checkpoint(
    path: str | Path, *, parts: Mapping[str, Stateful | None], generators: Mapping[str, Generator | None]
) -> dict[str, Any]:
    """Set parts and generators to what `save_checkpoint` wrote under their names.

    Args:
        path: of the file.
        parts: as when saved.
        generators: as when saved.

    Returns:
        The values, tensors on the CPU.
    """
    state = torch.load(path, weights_only=True, map_location="cpu")
    for name, part in parts.items():
        if part is not None:
            part.load_state_dict(state["parts"][name])
    for name, own in generators.items():
        if own is not None:
            own.set_state(state["generators"][name])
    torch.set_rng_state(state["global_generator"])
    values: dict[str, Any] = state["values"]
    return values
