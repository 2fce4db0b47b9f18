"""The record of each training epoch, and checkpoint files from which a training can continue."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clusterguard._support import read_progress, save_progress
from clusterguard.attacks import Precision
from clusterguard.attacks._internal import check_precision
from clusterguard.errors import PersistenceError, in_one_line
from clusterguard.training._descriptions import differences, doubts, listed
from clusterguard.training._overfitting import LastGood
from clusterguard.training._validation import Best
from torch import Tensor

_KIND = "training"


@dataclass(frozen=True)
class EpochRecord:
    """The figures of one training epoch.

    Attributes:
        epoch: number of the epoch, counted from 1.
        loss: mean loss over steps; for `AdversarialClusterTrainer`, equation 31 as a negative log-likelihood without
            its constant.
        accuracy: share of benign training images that were labelled correctly in the training steps, in [0, 1].
        attack_success_rate: share of the training attack's images accepted under a wrong label; NaN in warm-up.
        mean_threshold: mean over classes of the thresholds at the end of the epoch; +inf before the first refresh.
        seconds: wall time.
        precision: precision of attacks and gradients: "float32", "bf16", or the precision of the accelerator.
        validation: mean figures of the validation images by name; empty without a `Validation`. Those of an undone
            epoch are of the weights that were taken.
        check_success_rate: success rate of the attack of an `OverfittingCheck` after the epoch; None without one.
        returned_to: number of the epoch whose weights were taken because this epoch had overfitted; None if it had not.
    """

    epoch: int
    loss: float
    accuracy: float
    attack_success_rate: float
    mean_threshold: float
    seconds: float
    precision: str = "float32"
    validation: Mapping[str, float] = field(default_factory=dict)
    check_success_rate: float | None = None
    returned_to: int | None = None


@dataclass
class EpochTotals:
    """Sums over the steps of an unfinished epoch.

    Attributes:
        steps: number of batches.
        loss: sum of the batches' losses.
        images: number of images.
        correct: number of images labelled correctly.
        attacked: number of attacked images.
        successes: number of attacked images that got through.
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
        """Add the figures of one step."""
        self.steps += 1
        self.loss += loss.item()
        self.images += images
        self.correct += int(correct)
        if successes is not None:
            self.attacked += images
            self.successes += int(successes)

    def record(self, epoch: int, mean_threshold: float) -> EpochRecord:
        """The record of the epoch."""
        return EpochRecord(
            epoch=epoch,
            loss=self.loss / max(1, self.steps),
            accuracy=self.correct / max(1, self.images),
            attack_success_rate=self.successes / self.attacked if self.attacked else math.nan,
            mean_threshold=mean_threshold,
            seconds=self.seconds,
        )


class Stateful(Protocol):
    """Anything with a state to save, such as a module, an optimizer or a scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """The state, which `load_state_dict` can restore."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Restore a state."""
        ...


def save_checkpoint(path: str | Path, *, parts: Mapping[str, Stateful | None], values: Mapping[str, Any]) -> None:
    """Write states to a file, completely or not at all, without pickling code.

    A file that was at the path before stays next to it under the suffix ``.previous``.

    Args:
        path: path of the file.
        parts: modules, optimizers and the like by name; None for a part that the run does not have.
        values: tensors, numbers, strings, lists and dicts of them.

    Raises:
        PersistenceError: the file cannot be written, for example because the disk is full.
    """
    states = {name: part.state_dict() for name, part in parts.items() if part is not None}
    save_progress(path, _KIND, {"parts": states, "values": dict(values)})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read from a file but not restored yet.

    Attributes:
        file: path of the file.
        states: states of the parts, by name.
        values: values as `save_checkpoint` took them, with tensors on the CPU.
    """

    file: Path
    states: Mapping[str, dict[str, Any]]
    values: Mapping[str, Any]

    @contextmanager
    def restored(self, parts: Mapping[str, Stateful | None]) -> Iterator[None]:
        """Restore the states of parts; if one does not fit, or the block fails, no part changes.

        Args:
            parts: parts by name, the same as when saving.

        Raises:
            PersistenceError: the checkpoint belongs to another run.
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
            except Exception as error:  # parts can be user classes, which may raise anything
                raise PersistenceError(
                    f"{self.file} does not fit, so it is another run's ({in_one_line(error)}); choose another file, or "
                    "delete it to start anew"
                ) from None
            yield
        except BaseException:
            for name, part in wanted.items():
                part.load_state_dict(before[name])
            raise


@dataclass(frozen=True)
class Kept:
    """What a checkpoint holds for one process, beside the states of the parts.

    Attributes:
        state: positions and random states of this process.
        thresholds: (K,) thresholds in use.
        history: records of the finished epochs.
        totals: sums over the unfinished epoch.
        steps: number of optimizer steps.
        precision: precision that was taken.
        image_shape: shape of the images that the detector takes.
        best: best epoch so far.
        last_good: what to go back to after catastrophic overfitting.
    """

    state: dict[str, Any]
    thresholds: Tensor
    history: list[EpochRecord]
    totals: EpochTotals
    steps: int
    precision: Precision
    image_shape: Any
    best: Best
    last_good: LastGood


def read_values(
    checkpoint: Checkpoint,
    accelerator: Any,
    descriptions: Sequence[Mapping[str, str]],
    *,
    precision: Precision,
    like: Tensor,
) -> Kept:
    """Read the values of a checkpoint, which must be of the same run.

    Args:
        checkpoint: checkpoint that was read from a file.
        accelerator: accelerator that knows the number of processes and the index of this one.
        descriptions: what the run is, by process; a checkpoint of another one is refused.
        precision: precision for a checkpoint that does not tell it.
        like: (K,) thresholds whose shape and device those in the file get.

    Raises:
        PersistenceError: it is not of this run.
    """
    values = checkpoint.values
    try:
        processes, steps = values["processes"], int(values["steps"])
        taken = values.get("precision", precision)
        check_precision(taken)
        state = processes[accelerator.process_index % len(processes)]
        thresholds = values["thresholds"].to(like.device).view_as(like)
        history = [EpochRecord(**record) for record in values["history"]]
        totals, best = EpochTotals(**state["totals"]), Best(**values.get("best", {}))
        last_good = LastGood(**values.get("last_good", {}))
        pairs = zip(values.get("descriptions", ()), descriptions, strict=False)
        changed, open_questions = [], []
        for before, now in pairs:
            changed += differences(before, now)
            open_questions += doubts(before, now)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise PersistenceError(
            f"{checkpoint.file} is not a checkpoint of this training ({in_one_line(error)}); choose another file, "
            "or delete it to start anew"
        ) from error
    if len(processes) != accelerator.num_processes:
        raise PersistenceError(
            f"{checkpoint.file} was written by {len(processes)} processes; go on with as many, "
            f"not with {accelerator.num_processes}"
        )
    if changed:
        raise PersistenceError(
            f"{checkpoint.file} belongs to another run: {listed(changed)}; choose another file, or delete it to "
            "start anew"
        )
    if open_questions:
        warnings.warn(
            f"the training goes on from {checkpoint.file}. Make sure that it is the same one: {listed(open_questions)}",
            stacklevel=6,
        )
    return Kept(state, thresholds, history, totals, steps, taken, values.get("image_shape"), best, last_good)


def read_checkpoint(path: str | Path) -> Checkpoint | None:
    """Read the last checkpoint or, if its file is damaged, the one before it.

    Args:
        path: path of the file.

    Returns:
        The checkpoint; None if there is none.

    Raises:
        PersistenceError: files exist, but all of them are damaged.

    Warns:
        UserWarning: the last file is damaged or missing, and the one before it is used.
    """
    progress = read_progress(path, _KIND, hint="delete it to start anew, or choose another checkpoint")
    if progress is None:
        return None
    states, values = (progress.state.get(key) for key in ("parts", "values"))
    if not isinstance(states, dict) or not isinstance(values, dict):
        raise PersistenceError(f"{progress.file} holds something else than a checkpoint; choose another file")
    return Checkpoint(progress.file, states, values)
