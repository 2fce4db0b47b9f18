"""The way back to an exact moment of a run: random states, and loaders that return to the batch where they were."""

import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clusterguard.detection import Loader, number_of_batches
from clusterguard.errors import InputError, PersistenceError
from clusterguard.training._loader_state import LoaderState
from torch import Generator, Tensor

UNKNOWN = (
    "something that it draws from or counts with cannot be found; keep that in attributes of the data set or the "
    "sampler"
)


def random_states(device: torch.device) -> dict[str, Any]:
    """The global random states of torch, NumPy and Python, as tensors and numbers.

    Args:
        device: whose state is taken beside the CPU's.
    """
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # transforms draw from it, so a replay needs it
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return {
        "torch": torch.get_rng_state(),
        "device": own,
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Go back to what `random_states` returned.

    Args:
        states: of an earlier moment.
        device: as then.
    """
    name, keys, *rest = states["numpy"]
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        torch.get_device_module(device).set_rng_state(states["device"], device)
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(states["python"])


class Replay:
    """The batches of a loader, pass after pass; it knows where it is, and finds its way back there.

    It goes back by drawing the same batches again from the same random states, so whatever shuffles or augments
    them does so as before, provided that it draws from torch's, NumPy's or Python's global generators, or from those
    that `LoaderState` finds in the loader.

    Args:
        loader: whatever can be passed through repeatedly.
        device: whose random state counts beside the CPU's.

    Example:
        >>> replay = Replay([(torch.zeros(1), torch.tensor([index])) for index in range(3)], torch.device("cpu"))
        >>> [int(labels) for _, labels in replay], int(next(replay)[1])
        ([0, 1, 2], 0)
        >>> state = replay.state_dict()
        >>> int(next(replay)[1])
        1
        >>> replay.load_state_dict(state)
        >>> int(next(replay)[1])
        1
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader, self._device = loader, device
        self._carried = LoaderState(loader)
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self._taken, self._digest, self._start = 0, 0, self._present_states()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next batch; after the last of a pass, StopIteration once, then the first of another pass."""
        if self._batches is None:
            self._start = self._present_states()
            self._batches = iter(self.loader)
        try:
            batch = next(self._batches)
        except StopIteration:
            self.rewind()
            raise
        if not self._taken:  # later ones may hold what others have drawn meanwhile
            self._digest = _digest(batch)
        self._taken += 1
        return batch

    def forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this pass and of all that follow.

        Raises:
            InputError: there is none.
        """
        while True:
            given = self.taken
            for batch in self:
                given += 1
                yield batch
            if not given:
                raise InputError(
                    "expected a calibration loader with at least one batch in every pass, got an empty pass; let its "
                    "__iter__ begin anew each time, or pass a list of the batches"
                )

    def rewind(self) -> None:
        """Begin a new pass with the next batch."""
        self._batches, self._taken, self._digest = None, 0, 0

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """What is drawn from the loader in this context leaves no trace in what anything draws later."""
        states = self._present_states()
        try:
            yield
        finally:
            self._set_states(states)

    @property
    def obstacles(self) -> list[str]:
        """Why this loader cannot be brought back to where it was, in words; empty if nothing is known."""
        return self._carried.obstacles

    def is_repeatable(self) -> bool:
        """Whether the loader gives the same first batch twice, when it begins twice from where it is."""
        digests = set()
        for _ in range(2):
            with self.undisturbed():
                digests.add(_digest(next(iter(self.loader), None)))
        return len(digests) == 1

    def state_dict(self) -> dict[str, Any]:
        """Where the present pass began, or the next will, how many batches it has given, and a digest of the first."""
        start = self._start if self._taken else self._present_states()
        return {
            "taken": self._taken,
            "digest": self._digest,
            "start": start | {"loader": self._carried.changed(start["loader"])},
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go there; the global random states are then those after the last of the batches.

        Raises:
            InputError: the loader has fewer batches than when it was interrupted.
            PersistenceError: it is another loader.

        Warns:
            UserWarning: the first batch of the pass is another one than then.
        """
        if not isinstance(state["start"]["loader"], dict):
            raise PersistenceError("expected a checkpoint of this version of clusterguard, got an older one's")
        self.rewind()
        self._set_states(state["start"])
        for _ in range(state["taken"]):
            if next(self, None) is None:
                raise InputError(f"expected a loader of at least {state['taken']} batches, as when it was interrupted")
        if self._digest != state.get("digest", self._digest):
            warnings.warn(
                "training that goes on from its checkpoint is not the same as without the interruption, because the "
                f"loader gives other batches than before: its images have changed, or {UNKNOWN}",
                stacklevel=2,
            )

    def _present_states(self) -> dict[str, Any]:
        return {"global": random_states(self._device), "loader": self._carried.get()}

    def _set_states(self, states: dict[str, Any]) -> None:
        set_random_states(states["global"], self._device)
        self._carried.set(states["loader"])

    @property
    def taken(self) -> int:
        """Batches given in this pass."""
        return self._taken

    @property
    def length(self) -> int | None:
        """Batches of a whole pass; None if the loader does not tell."""
        return number_of_batches(self.loader)


def _digest(batch: Any, before: int = 0) -> int:
    """A number that tells batches apart, by some of the pixels and all labels."""
    if isinstance(batch, Tensor):
        if batch.layout != torch.strided or batch.is_meta:
            return before  # it will be refused
        flat = batch.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 4096)].cpu().contiguous()
        return zlib.crc32(some.view(torch.uint8).numpy().tobytes(), before)
    for part in batch if isinstance(batch, tuple | list) else ():
        before = _digest(part, before)
    return before


@dataclass(frozen=True)
class Run:
    """What one call of a trainer's `fit` draws from, where it leaves checkpoints, and when it stops.

    Attributes:
        train: where this process is among the training batches.
        calibration: the same among the calibration batches.
        generator: the attack's randomness; None takes torch's global one.
        checkpoint: the file; None writes none.
        checkpoint_every: steps between two checkpoints; None writes them after epochs only.
        stop_when: says after a step whether to stop; None never does.
    """

    train: Replay
    calibration: Replay
    generator: Generator | None
    checkpoint: str | Path | None
    checkpoint_every: int | None
    stop_when: Callable[[], bool] | None

    def state_dict(self, device: torch.device) -> dict[str, Any]:
        """Where this process is."""
        return {
            "train": self.train.state_dict(),
            "calibration": self.calibration.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
            "global": random_states(device),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go there."""
        self.train.load_state_dict(state["train"])
        self.calibration.load_state_dict(state["calibration"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
        set_random_states(state["global"], device)
