"""What a training run leaves behind: a record of each epoch, and a file that it can go on from."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clusterguard._support import read_progress, save_progress
from clusterguard.errors import PersistenceError, in_one_line
from torch import Tensor

_KIND = "training"


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


@dataclass
class EpochTotals:
    """Sums over the steps of an epoch so far.

    Attributes:
        steps: batches, that is.
        loss: summed over steps.
        images: seen.
        correct: of them, labelled rightly.
        attacked: images attacked.
        successes: of them, those that got through.
        seconds: wall time.
    """

    steps: int = 0
    loss: float = 0.0
    images: int = 0
    correct: int = 0
    attacked: int = 0
    successes: int = 0
    seconds: float = 0.0

    def add(self, loss: Tensor, images: int, correct: Tensor, successes: Tensor | None) -> None:
        """Count a step."""
        self.steps += 1
        self.loss += loss.item()
        self.images += images
        self.correct += int(correct)
        if successes is not None:
            self.attacked += images
            self.successes += int(successes)

    def record(self, epoch: int, mean_threshold: float) -> EpochRecord:
        """The epoch's record."""
        return EpochRecord(
            epoch=epoch,
            loss=self.loss / max(1, self.steps),
            accuracy=self.correct / max(1, self.images),
            attack_success_rate=self.successes / self.attacked if self.attacked else math.nan,
            mean_threshold=mean_threshold,
            seconds=self.seconds,
        )


class Stateful(Protocol):
    """Modules, optimisers, schedulers."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take over a state."""
        ...


def save_checkpoint(path: str | Path, *, parts: Mapping[str, Stateful | None], values: Mapping[str, Any]) -> None:
    """Write states, whole or not at all; no code is pickled. What was at the path stays beside it, as ``.previous``.

    Args:
        path: of the file.
        parts: by name; None where a run has no such part.
        values: tensors, numbers, strings, lists and dicts of them.

    Raises:
        PersistenceError: it cannot be written, because the disk is full, say.
    """
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    save_progress(path, _KIND, {"parts": states, "values": dict(values)})


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` wrote, read but not restored.

    Attributes:
        file: where it was.
        states: of the parts, by name.
        values: tensors on the CPU.
    """

    file: Path
    states: Mapping[str, dict[str, Any]]
    values: Mapping[str, Any]

    @contextmanager
    def restored(self, parts: Mapping[str, Stateful | None]) -> Iterator[None]:
        """Set parts to the states under their names; if one does not fit, or the block fails, none of them changes.

        Args:
            parts: as when saved.

        Raises:
            PersistenceError: the checkpoint is another run's.
        """
        wanted = {name: part for name, part in parts.items() if part is not None}
        if set(wanted) != set(self.states):
            raise PersistenceError(
                f"{self.file} was written by another run: it holds {', '.join(self.states)}, "
                f"expected {', '.join(wanted)}; choose another file, or delete it to start anew"
            )
        before = {name: copy.deepcopy(part.state_dict()) for name, part in wanted.items()}
        try:
            try:
                for name, part in wanted.items():
                    part.load_state_dict(self.states[name])
            except Exception as error:  # parts are anyone's, and so is how they refuse
                raise PersistenceError(
                    f"{self.file} does not fit, so it is another run's ({in_one_line(error)}); choose another file, or "
                    "delete it to start anew"
                ) from None
            yield
        except BaseException:
            for name, part in wanted.items():
                part.load_state_dict(before[name])
            raise


def read_checkpoint(path: str | Path) -> Checkpoint | None:
    """What `save_checkpoint` wrote last or, if that file is damaged, before.

    Args:
        path: of the file.

    Returns:
        None if there is no checkpoint.

    Raises:
        PersistenceError: there are files, but none of them is whole.

    Warns:
        UserWarning: the last file is damaged, and the one before it is used.
    """
    progress = read_progress(path, _KIND, hint="delete it to start anew, or choose another checkpoint")
    if progress is None:
        return None
    states, values = (progress.state.get(key) for key in ("parts", "values"))
    if not isinstance(states, dict) or not isinstance(values, dict):
        raise PersistenceError(f"{progress.file} holds something else than a checkpoint; choose another file")
    return Checkpoint(progress.file, states, values)
