"""Replay of random states and loaders, so that a resumed training continues with exactly the next batch."""

import copy
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from clusterguard._support import check_numbers, random_states, set_random_states
from clusterguard.detection import Loader, Pairs
from clusterguard.detection._internal import have_common_images, number_of_batches
from clusterguard.errors import ConfigurationError, InputError, PersistenceError
from clusterguard.training._descriptions import describe, describe_data
from clusterguard.training._loader_state import LoaderState
from clusterguard.training._overfitting import OverfittingCheck
from clusterguard.training._validation import Validation
from torch import Generator, Tensor
from torch.utils.data import DataLoader, IterableDataset

UNKNOWN = (
    "it has a random generator or a counter that cannot be found; keep generators and counters in attributes of the "
    "data set or the sampler"
)


def restarting_workers(loader: Any) -> Any:
    """The same loader without persistent workers, because their random states cannot be saved.

    Example:
        >>> restarting_workers(DataLoader(range(3), num_workers=1, persistent_workers=True)).persistent_workers
        False
    """
    if not isinstance(loader, DataLoader) or not loader.persistent_workers:
        return loader
    same = copy.copy(loader)
    same.__dict__["persistent_workers"] = False  # DataLoader forbids setting the attribute itself
    return same


class Replay:
    """An iterator over the batches of a loader, pass after pass, whose position can be saved and restored.

    Restoring sets the random states to those at the start of the pass, and draws the same batches again. So shuffling
    and augmentation repeat exactly, if they draw from the global generators of torch, NumPy or Python, or from
    generators that `LoaderState` finds in the loader.

    Args:
        loader: loader that can be iterated repeatedly.
        device: device whose random state is kept in addition to the CPU's.

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
        self._loader_state = LoaderState(loader)
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None
        self._taken, self._digest, self._start = 0, 0, self._present_states()
        self._past: dict[str, Any] | None = None  # where the last pass began, and the digest of its first batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next batch. After the last one of a pass it raises StopIteration once, and then starts a new pass."""
        if self._batches is None:
            self._start = self._present_states()
            self._batches = iter(self.loader)
        try:
            batch = next(self._batches)
        except StopIteration:
            self.rewind()
            raise
        if not self._taken:  # later batches may depend on other draws from the global generators
            self._digest = _digest(batch)
        self._taken += 1
        return batch

    def forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this pass and of all further passes.

        Raises:
            InputError: a pass has no batches.
        """
        while True:
            count = self.taken
            for batch in self:
                count += 1
                yield batch
            if not count:
                raise InputError(
                    "expected a calibration loader with at least one batch in every pass, got an empty pass; let its "
                    "__iter__ begin anew each time, or pass a list of the batches"
                )

    def rewind(self) -> None:
        """Make the next batch the first one of a new pass."""
        if self._taken:
            self._past = {"digest": self._digest, "start": self._kept(self._start)}
        self._batches, self._taken, self._digest = None, 0, 0

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Restore all random states at the end of the block, so that drawing batches in it changes no later draw."""
        states = self._present_states()
        try:
            yield
        finally:
            self._set_states(states)

    @property
    def obstacles(self) -> list[str]:
        """Known reasons why the position in this loader cannot be restored, in words; empty if there are none."""
        return self._loader_state.obstacles

    def is_repeatable(self) -> bool:
        """Whether two passes from the present random states give the same batches, as far as a sample shows.

        The first batch is compared. If the loader takes items by an index, the batches after a quarter, a half and
        three quarters of a pass and the last one are compared too. Each of these is drawn separately.
        """
        with self.undisturbed():
            further = _further_on(self.loader)
        for batches, count in ((self.loader, 1), (further, 4)):
            digests = set()
            for _ in range(2):
                with self.undisturbed():
                    digests.add(tuple(map(_digest, islice(batches, count))))
            if len(digests) > 1:
                return False
        return True

    def state_dict(self) -> dict[str, Any]:
        """The states at the start of the pass, the number of batches taken since, and a digest of the first batch.

        If the pass has not taken a batch yet, it starts from the present states.
        """
        start = self._start if self._taken else self._present_states()
        past = None if self._taken else self._past
        return {"taken": self._taken, "digest": self._digest, "start": self._kept(start), "past": past}

    def _kept(self, states: dict[str, Any]) -> dict[str, Any]:
        return states | {"loader": self._loader_state.changed(states["loader"])}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restore the position; the global random states are then those after the last batch that was taken.

        Raises:
            InputError: the loader has fewer batches than before the interruption.
            PersistenceError: the state belongs to another loader.

        Warns:
            UserWarning: the first batch of the pass differs from that before the interruption.
        """
        if not isinstance(state["start"]["loader"], dict):
            raise PersistenceError("expected a checkpoint of this version of clusterguard, got an older one's")
        self.rewind()
        self._set_states(state["start"])
        for _ in range(state["taken"]):
            if next(self, None) is None:
                raise InputError(f"expected a loader of at least {state['taken']} batches, as when it was interrupted")
        self._past = state.get("past")
        if self._digest != state.get("digest", self._digest):
            self._warn_of_others()

    def look_back(self) -> None:
        """Check that the first batch of the last pass can be drawn again. Does nothing during a pass.

        Warns:
            UserWarning: the batch differs from the one that was drawn before.
        """
        if self._past is None or self._taken:
            return
        with self.undisturbed():
            self._set_states(self._past["start"])
            digest = _digest(next(iter(self.loader), None))
        if digest != self._past["digest"]:
            self._warn_of_others()

    def _warn_of_others(self) -> None:
        warnings.warn(
            "training that goes on from its checkpoint is not the same as without the interruption, because the "
            f"loader gives other batches than before: its images have changed, or {UNKNOWN}",
            stacklevel=3,
        )

    def _present_states(self) -> dict[str, Any]:
        return {"global": random_states(self._device), "loader": self._loader_state.get()}

    def _set_states(self, states: dict[str, Any]) -> None:
        set_random_states(states["global"], self._device)
        self._loader_state.set(states["loader"])

    @property
    def taken(self) -> int:
        """The number of batches taken in this pass."""
        return self._taken

    @property
    def length(self) -> int | None:
        """The number of batches of a whole pass; None if the loader has no known length."""
        return number_of_batches(self.loader)


def _further_on(loader: object) -> Iterable[Any]:
    """A loader of the batches after each quarter of a pass, or an empty one if items are not taken by an index."""
    source = loader.loader if isinstance(loader, Pairs) else loader
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
        return []
    name = "sampler" if source.batch_sampler is None else "batch_sampler"
    items = [
        *islice(getattr(source, name), number_of_batches(source) or 0)
    ]  # the indices of each batch; islice is needed because a sampler may be endless
    places = sorted({len(items) * part // 4 for part in (1, 2, 3)} | {len(items) - 1})
    same = copy.copy(source)
    same.__dict__[name] = [items[place] for place in places if place > 0]  # DataLoader forbids setting the attribute
    return Pairs(same, loader.unpack) if isinstance(loader, Pairs) else same


def _digest(batch: Any, before: int = 0) -> int:
    """A checksum of a batch, over a sample of each tensor's elements, to recognise the batch again.

    Args:
        batch: tensor, or tuples and lists of tensors.
        before: checksum so far.
    """
    if isinstance(batch, Tensor):
        if batch.layout != torch.strided or batch.is_meta:
            return before  # later checks refuse such a tensor
        flat = batch.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 4096)].cpu().contiguous()
        return zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), before)
    for part in batch if isinstance(batch, tuple | list) else ():
        before = _digest(part, before)
    return before


def warn_of_shared_images(train: Loader, calibration: Loader | None, judged: Loader | None) -> bool:
    """Warn if images that are trained on are used to calibrate, or to judge the training.

    Args:
        train: training loader.
        calibration: calibration loader, if thresholds will be fitted in the end.
        judged: validation loader, if there is one.

    Returns:
        Whether they are used to calibrate.
    """
    calibrates = calibration is not None and have_common_images(train, calibration)
    if calibrates:
        warnings.warn(
            "the calibration loader gives images that are trained on. Thresholds that are fitted to them refuse too "
            "many new images; keep the calibration images out of training",
            stacklevel=3,
        )
    if judged is not None and have_common_images(train, judged):
        warnings.warn(
            "the validation loader gives images that are trained on, which tell nothing of other images; keep the "
            "validation images out of training",
            stacklevel=3,
        )
    return calibrates


@dataclass(frozen=True)
class Run:
    """The batches, the randomness and the checkpoint settings of one call of a trainer's `fit`.

    Attributes:
        train: training batches of this process, with the position among them.
        calibration: calibration batches of this process, with the position among them.
        generator: randomness of the attack; None takes torch's global one.
        checkpoint: path of the checkpoint; None writes none.
        checkpoint_every: number of steps between two checkpoints; None writes them after epochs only.
        stop_when: function that says after a step whether to stop; None never stops.
        judged: validation batches, which all processes have; None without validation.
        validation: what is done with their figures; None without validation.
        held_out: batches of the check for catastrophic overfitting, which all processes have; None without a check.
        overfitting: check for catastrophic overfitting, or None.

    Raises:
        ConfigurationError: `checkpoint_every` is below 1, or `stop_when` comes without a checkpoint.
    """

    train: Replay
    calibration: Replay
    generator: Generator | None
    checkpoint: str | Path | None
    checkpoint_every: int | None
    stop_when: Callable[[], bool] | None
    judged: Replay | None = None
    validation: Validation | None = None
    held_out: Replay | None = None
    overfitting: OverfittingCheck | None = None

    def __post_init__(self) -> None:
        every = 1 if self.checkpoint_every is None else self.checkpoint_every
        check_numbers(whole=True, checkpoint_every=every)
        if every < 1:
            raise ConfigurationError(f"expected checkpoint_every of at least 1 step, got {every}")
        if self.stop_when is not None and self.checkpoint is None:
            raise ConfigurationError(
                "expected a checkpoint with stop_when, because a stopped training would be lost without one, got none"
            )

    def describe(self) -> dict[str, str]:
        """Describe the seed of the generator and the data of the loaders, as text."""
        seed = None if self.generator is None else self.generator.initial_seed()
        training = describe_data("training", self.train.loader)
        calibration = describe_data("calibration", self.calibration.loader)
        described = describe({"seed of the generator": seed}) | training | calibration
        if self.held_out is not None:
            described |= describe({"overfitting": self.overfitting}) | describe_data("held-out", self.held_out.loader)
        if self.judged is None or self.validation is None:
            return described
        return described | {"monitor": str(self.validation.monitor)} | describe_data("validation", self.judged.loader)

    def warn_of_obstacles(self, known: list[str], *, begin: bool) -> None:
        """Warn once before training about state that no checkpoint can keep.

        Args:
            known: reasons that lie outside of the loaders, in words.
            begin: whether passes may be begun to look for more reasons. Several processes must all finish a pass that
                they begin.
        """
        obstacles = [*known, *self.train.obstacles, *self.calibration.obstacles]
        if not obstacles and begin:
            loaders = {"training": self.train, "calibration": self.calibration}
            obstacles = [
                f"the {name} loader, begun again from the same random states, gives other batches: {UNKNOWN}"
                for name, replay in loaders.items()
                if not replay.is_repeatable()
            ]
        if obstacles:
            warnings.warn(
                "training that goes on from its checkpoint will not be the same as without the interruption, because "
                + "; ".join(dict.fromkeys(obstacles)),
                stacklevel=4,
            )

    def state_dict(self, device: torch.device) -> dict[str, Any]:
        """The positions and random states of this process."""
        return {
            "train": self.train.state_dict(),
            "calibration": self.calibration.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
            "global": random_states(device),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore positions and random states."""
        self.train.load_state_dict(state["train"])
        self.calibration.load_state_dict(state["calibration"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
        set_random_states(state["global"], device)
