"""What a suite has done so far: records of its stages, and a file to go on from."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clusterguard._support import read_archive, write_atomically
from clusterguard.errors import ConfigurationError, PersistenceError, in_one_line
from torch import Generator, Tensor

_KEYS = ("suite", "clean_margins", "best", "margins", "records", "generator")


@dataclass(frozen=True)
class StageRecord:
    """What one stage of a suite did.

    Attributes:
        name: of the stage.
        attacked: how many images had survived until then.
        broken: how many of those it broke.
        forward: images judged.
        backward: gradients taken.
    """

    name: str
    attacked: int
    broken: int
    forward: int
    backward: int


class SuiteResult(NamedTuple):
    """What a suite found.

    Attributes:
        images: (B, C, H, W), each image's attacked version with the smallest success margin.
        stages: one record per stage, in order.
    """

    images: Tensor
    stages: tuple[StageRecord, ...]


@dataclass
class SuiteState:
    """What an interrupted suite goes on from.

    Attributes:
        suite: how it prints.
        clean_margins: (B,), by which another detector, other images or labels are noticed.
        best: (B, C, H, W) strongest images so far.
        margins: (B,) their success margins.
        records: of the stages that are done.
    """

    suite: str
    clean_margins: Tensor
    best: Tensor
    margins: Tensor
    records: list[StageRecord]

    def save(self, path: str | Path, generator: Generator | None) -> None:
        """Write the state, whole or not at all."""
        state = {
            "suite": self.suite,
            "clean_margins": self.clean_margins,
            "best": self.best,
            "margins": self.margins,
            "records": [asdict(record) for record in self.records],
            "generator": None if generator is None else generator.get_state(),
        }
        write_atomically(path, partial(torch.save, state))

    def load(self, path: str | Path, generator: Generator | None) -> None:
        """Take over a state that `save` wrote for the same suite, detector, images and labels.

        Raises:
            ConfigurationError: it is of something else.
            PersistenceError: it is damaged, or no state of a suite.
        """
        again = f"delete {path} to begin the suite anew, or choose another checkpoint"
        try:
            state = read_archive(path, *_KEYS, device=self.best.device)
        except PersistenceError as error:
            raise PersistenceError(f"{error}; {again}") from error
        if not _is_state(state):
            raise PersistenceError(f"{path} holds no state of a suite; {again}")
        clean = state["clean_margins"]
        if state["suite"] != self.suite or state["best"].shape != self.best.shape:
            raise ConfigurationError(
                f"{path} belongs to {state['suite'][:200]} on {len(clean)} images; use another checkpoint"
            )
        if not torch.allclose(clean.to(self.clean_margins), self.clean_margins, rtol=1e-3, atol=1e-3):
            raise ConfigurationError(f"{path} belongs to another detector or other images; use another checkpoint")
        if generator is not None and state["generator"] is not None:
            try:
                generator.set_state(state["generator"].cpu())
            except (RuntimeError, TypeError) as error:
                raise PersistenceError(
                    f"{path} holds another generator's state ({in_one_line(error)}); {again}"
                ) from error
        self.best, self.margins = state["best"], state["margins"]
        self.records = [StageRecord(**record) for record in state["records"]]


def _is_state(state: dict[str, Any]) -> bool:
    """Whether an archive holds what `SuiteState.save` writes: its kinds, its shapes, and no margin that is NaN."""
    clean, best, margins, generator = (state[name] for name in ("clean_margins", "best", "margins", "generator"))
    if not all(isinstance(own, Tensor) and own.is_floating_point() for own in (clean, best, margins)):
        return False
    if clean.ndim != 1 or margins.shape != clean.shape or best.ndim != 4 or len(best) != len(clean):
        return False
    if clean.isnan().any() or margins.isnan().any() or not best.isfinite().all():
        return False
    kinds = {"name": str, "attacked": int, "broken": int, "forward": int, "backward": int}
    return (
        isinstance(state["suite"], str)
        and (generator is None or isinstance(generator, Tensor))
        and isinstance(state["records"], list)
        and all(
            isinstance(record, dict) and {k: type(v) for k, v in record.items()} == kinds for record in state["records"]
        )
    )
