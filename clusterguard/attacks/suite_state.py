"""What a suite has done so far: records of its stages, and a file to go on from."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from clusterguard.errors import ConfigurationError
from clusterguard.files import write_atomically
from torch import Generator, Tensor


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
        """
        state = torch.load(path, weights_only=True, map_location=self.best.device)
        clean = state["clean_margins"]
        if state["suite"] != self.suite or clean.shape != self.clean_margins.shape:
            raise ConfigurationError(
                f"{path} belongs to {state['suite']} on {len(clean)} images; use another checkpoint"
            )
        if not torch.allclose(clean, self.clean_margins, rtol=1e-3, atol=1e-3):
            raise ConfigurationError(f"{path} belongs to another detector or other images; use another checkpoint")
        self.best, self.margins = state["best"], state["margins"]
        self.records = [StageRecord(**record) for record in state["records"]]
        if generator is not None and state["generator"] is not None:
            generator.set_state(state["generator"].cpu())
