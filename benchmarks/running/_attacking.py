"""Attack the images of a cell in chunks. Finished chunks are kept, so that a killed run can be resumed."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from clusterguard import Detector
from clusterguard.attacks import Objective, StageRecord
from torch import Generator, Tensor
from tqdm import tqdm

from benchmarks.detectors import RECIPES
from benchmarks.experiments import KINDS, Cell, Outcome, Scene
from benchmarks.running._clock import Clock
from benchmarks.running._store import Store, read_chunk, save_chunk

REFERENCE_IMAGES = 2000  # calibration images that an attack may start at or move towards


@dataclass(frozen=True, kw_only=True)
class AttackedDetector:
    """A detector at one false-positive rate, and the images to attack it with.

    Attributes:
        detector: detector that is calibrated for that rate.
        rate: false-positive rate.
        images: clean images (n, C, H, W) in [0, 1].
        labels: their true classes (n,).
        references: benign images and their labels. An attack may start at them or move towards them.
        surrogate: detector that transfer attacks are computed on, and the objective of an attacker who knows it.
    """

    detector: Detector
    rate: float
    images: Tensor
    labels: Tensor
    references: tuple[Tensor, Tensor]
    surrogate: tuple[Detector, str | Objective] | None = None


def attack_cell(
    cell: Cell,
    target: AttackedDetector,
    store: Store,
    *,
    clock: Clock,
    progress: bool = False,
    twin: Cell | None = None,
) -> Outcome:
    """Run the attack of a cell on all images. A killed run loses one chunk at most.

    Args:
        cell: cell whose attack is run.
        target: detector and images.
        store: store with the work folders that hold the chunks.
        clock: time budget.
        progress: whether to show a progress bar.
        twin: cell of the same attack with the other goal. Its chunks are made in the same batches and are written to
            its work folder.

    Returns:
        The outcomes of all chunks, joined into one.

    Raises:
        OutOfTimeError: the budget is used up. The next call continues after the last chunk.
    """
    folders = [store.work(member.key) for member in (cell, twin) if member is not None]
    device = target.images.device
    size = len(target.labels) if KINDS[cell.kind].whole else cell.chunk
    chunks, took = [], 0.0
    rows = torch.arange(len(target.labels), device=device).split(size)
    for index, chosen in enumerate(tqdm(rows, desc=cell.title, disable=not progress, leave=False)):
        name = f"{target.rate:g}-{index}"
        file = folders[0] / f"{name}.pt"
        if not file.exists():
            clock.check(took)
            started = time.perf_counter()
            scene = Scene(
                detector=target.detector,
                images=target.images[chosen],
                labels=target.labels[chosen],
                objective=RECIPES[cell.detector].objective,
                references=target.references,
                surrogate=target.surrogate,
                # Each chunk has a generator with a seed of its own, so that results do not depend on where a run was
                # killed.
                generator=Generator(device).manual_seed(10_000 * cell.seed + index),
                checkpoint=folders[0] / f"{name}.state",
                on_stage=lambda stage: clock.check(),
            )
            outcomes = [KINDS[cell.kind].run(scene, **cell.options)] if twin is None else _run_both(scene, cell)
            _write_chunks([folder / file.name for folder in folders], outcomes)
            took = time.perf_counter() - started
        chunks.append(read_chunk(file, device))
    return _join(chunks)


def _run_both(scene: Scene, cell: Cell) -> list[Outcome]:
    """Run the attack of a cell with both goals, or with its goal alone if memory is too small for both."""
    kind, state = KINDS[cell.kind], scene.generator.get_state()
    assert kind.run_both is not None  # the cell has a twin
    try:
        return kind.run_both(scene, **cell.options)
    except torch.OutOfMemoryError:
        scene.generator.set_state(state)
    return [kind.run(scene, **cell.options)]


def _write_chunks(files: Sequence[Path], outcomes: Sequence[Outcome]) -> None:
    """Write the chunk of the twin, if there is one, and then that of the cell.

    In this order, the chunk of the cell exists only if that of the twin does, unless memory was too small for both
    goals.
    """
    for file, outcome in reversed(list(zip(files, outcomes, strict=False))):
        kept = outcome._asdict() | {"stages": [asdict(stage) for stage in outcome.stages]}
        save_chunk(file, kept)


def _join(chunks: Sequence[dict[str, Any]]) -> Outcome:
    """Join chunks into one outcome."""
    attacked = {name: torch.cat([chunk["attacked"][name] for chunk in chunks]) for name in chunks[0]["attacked"]}
    stages = tuple(StageRecord(**stage) for chunk in chunks for stage in chunk["stages"])
    unproved = None if chunks[0].get("unproved") is None else torch.cat([chunk["unproved"] for chunk in chunks])
    return Outcome(attacked, stages, unproved)


def pair_goals(cells: Iterable[Cell]) -> list[tuple[Cell, ...]]:
    """Group cells that differ only in whether the attack is targeted, since they can share batches.

    The groups are in the order of their first cells.
    """
    left, groups = {cell.key: cell for cell in cells}, list[tuple[Cell, ...]]()
    for cell in list(left.values()):
        if left.pop(cell.key, None) is None:
            continue  # the cell is in the group of its twin
        options = dict(cell.options)
        if not options.pop("targeted", False):
            options["targeted"] = True
        twin = left.pop(replace(cell, options=options).key, None) if KINDS[cell.kind].run_both else None
        groups.append((cell,) if twin is None else (cell, twin))
    return groups
