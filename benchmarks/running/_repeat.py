"""Run finished cells again from the weights that are kept, and compare verdicts image by image."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from clusterguard.errors import ConfigurationError

from benchmarks.experiments import Cell
from benchmarks.running._judging import from_hex
from benchmarks.running._runner import run_cell
from benchmarks.running._store import Store
from benchmarks.running._training import Trainings


class Repeated(NamedTuple):
    """A cell's verdicts at one setting and one false-positive rate, before and now.

    Attributes:
        title: name of the cell.
        setting: name of the setting, "" if there is only one.
        rate: false-positive rate, as results write it.
        before: number of broken images in the kept result.
        now: number of broken images now.
        changed: number of images whose verdict differs.
        images: number of attacked images.
    """

    title: str
    setting: str
    rate: str
    before: int
    now: int
    changed: int
    images: int

    def __str__(self) -> str:
        same = f"verdicts differ on {self.changed}" if self.changed else "the same verdicts on all"
        setting = f", setting {self.setting}" if self.setting else ""
        return (
            f"{self.title}{setting}, false-positive rate {self.rate}: {same} of {self.images} images; "
            f"{self.before} broken before, {self.now} now"
        )


def choose_cells(cells: list[Cell], store: Store, count: int, seed: int) -> list[Cell]:
    """A few random cells that have a result and need no training.

    Raises:
        ConfigurationError: there are fewer of them.
    """
    known = store.cell_keys()
    ready = [cell for cell in cells if cell.key in known and all(map(store.has_weights, _trainings_of(cell)))]
    if len(ready) < count:
        raise ConfigurationError(f"expected {count} matching cells with results and weights, found {len(ready)}")
    return Random(seed).sample(ready, count)


def repeat_cell(cell: Cell, store: Store, *, device: torch.device, data: Path | None = None) -> Iterator[Repeated]:
    """Run a cell again, and compare it with the result in the store, which stays as it is.

    Args:
        cell: cell with a result and weights in the store.
        store: store of results.
        device: device to compute on.
        data: folder of data sets.
    """
    kept = store.read_cell(cell.key)
    if kept is None:
        raise ConfigurationError(f"expected a cell with a result, got {cell.title!r}")
    with TemporaryDirectory() as folder:
        fresh = Store(Path(folder), store.profile)
        for key in _trainings_of(cell):
            weights, record = store.load_weights(key) or ({}, {})
            fresh.save_weights(key, weights, record)
        result = run_cell(cell, Trainings(fresh, device=device, data=data, progress=True))
    for setting, verdicts in kept["results"].items():
        for rate, before in verdicts["rates"].items():
            now = result["results"][setting]["rates"][rate]
            masks = [from_hex(part["broken"], kept["images"]) for part in (before, now)]
            changed = int((masks[0] != masks[1]).sum())
            yield Repeated(cell.title, setting, rate, before["success"][0], now["success"][0], changed, kept["images"])


def _trainings_of(cell: Cell) -> list[str]:
    return [cell.training.key, *([] if cell.surrogate is None else _trainings_of(cell.surrogate))]
