"""Attack a cell's images in chunks that are kept, so that a killed run goes on after the last one."""

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
from benchmarks.experiments.cells import Cell
from benchmarks.experiments.kinds import KINDS, Outcome, Scene
from benchmarks.running.clock import Clock
from benchmarks.running.store import Store, read_chunk, save_chunk

REFERENCES = 2000  # calibration images that attacks may start towards


@dataclass(frozen=True, kw_only=True)
class AttackedDetector:
    """What a cell's attack meets at one false-positive rate.

    Attributes:
        detector: calibrated for that rate.
        rate: the false-positive rate.
        images: (n, C, H, W) in [0, 1].
        labels: (n,).
        references: benign images and their labels, to start from or towards.
        surrogate: where transfer attacks are made, and the objective of attackers who know it.
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
    """What the cell's attack finds on all images; a killed run loses one chunk at most.

    Args:
        cell: whose attack it is.
        target: detector and images.
        store: has the work folder that chunks lie in.
        clock: the time budget.
        progress: show a progress bar.
        twin: the cell of the same attack with the other goal, which finds its chunks in its own work folder then.

    Raises:
        OutOfTimeError: the budget is used up; the next call goes on where this one stopped.
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
                # A chunk's randomness is its own, so that results do not depend on where a run was killed.
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
    """What the cell's attack finds, and what it finds with the other goal, unless memory is too small for both."""
    kind, state = KINDS[cell.kind], scene.generator.get_state()
    assert kind.run_both is not None  # it has a twin
    try:
        return kind.run_both(scene, **cell.options)
    except torch.OutOfMemoryError:
        scene.generator.set_state(state)
    return [kind.run(scene, **cell.options)]


def _write_chunks(files: Sequence[Path], outcomes: Sequence[Outcome]) -> None:
    """Write the cell's chunk last: where that is, the twin's is too, unless memory was too small for it."""
    for file, outcome in reversed(list(zip(files, outcomes, strict=False))):
        kept = outcome._asdict() | {"stages": [asdict(stage) for stage in outcome.stages]}
        save_chunk(file, kept)


def _join(chunks: Sequence[dict[str, Any]]) -> Outcome:
    """Chunks as they were read, image after image."""
    attacked = {name: torch.cat([chunk["attacked"][name] for chunk in chunks]) for name in chunks[0]["attacked"]}
    stages = tuple(StageRecord(**stage) for chunk in chunks for stage in chunk["stages"])
    unproved = None if chunks[0].get("unproved") is None else torch.cat([chunk["unproved"] for chunk in chunks])
    return Outcome(attacked, stages, unproved)


def pair_goals(cells: Iterable[Cell]) -> list[tuple[Cell, ...]]:
    """Cells in their order, but those that differ only in being targeted together: they can share batches."""
    left, groups = {cell.key: cell for cell in cells}, list[tuple[Cell, ...]]()
    for cell in list(left.values()):
        if left.pop(cell.key, None) is None:
            continue  # went with its twin
        options = dict(cell.options)
        if not options.pop("targeted", False):
            options["targeted"] = True
        twin = left.pop(replace(cell, options=options).key, None) if KINDS[cell.kind].run_both else None
        groups.append((cell,) if twin is None else (cell, twin))
    return groups
