"""Run cells: have their detectors trained, once; attack, chunk by chunk; judge; write each result."""

import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clusterguard import Detector, DetectorModule, Evaluation
from clusterguard._support import write_atomically
from clusterguard.attacks import StageRecord
from clusterguard.detectors import ConsistentDetector, WithThresholds
from torch import Generator, Tensor
from tqdm import tqdm

from benchmarks.data import datasets
from benchmarks.data.datasets import Batches, DataSet
from benchmarks.detectors import RECIPES, make_recipe, networks
from benchmarks.experiments.cells import Cell, Training
from benchmarks.experiments.kinds import KINDS, Outcome, Scene
from benchmarks.running.clock import Clock
from benchmarks.running.judging import count_unproved, judge_attacked, map_points, thresholds_at
from benchmarks.running.store import Store, provenance
from benchmarks.running.training import JUDGED_AT_ONCE
from benchmarks.running.training import train as train_detector

REFERENCES = 2000  # calibration images that attacks may start towards


class Runner:
    """Runs cells into a store.

    Args:
        store: of results.
        device: where to compute.
        data: folder of data sets, see `benchmarks.data.fetch.data_root`.
        clock: the time budget.
        progress: show progress bars.
        compiled: run networks through torch.compile, in this mode; results agree to rounding. "auto" measures, once a
            network, which mode pays on this device, if any does.
    """

    def __init__(
        self,
        store: Store,
        *,
        device: torch.device,
        data: Path | None = None,
        clock: Clock | None = None,
        progress: bool = False,
        compiled: networks.CompileChoice | None = None,
    ) -> None:
        self.store = store
        self.device = device
        self.data = data
        self.clock = Clock() if clock is None else clock
        self.progress = progress
        self.compiled = compiled
        self._modes: dict[tuple[str, str], networks.CompileMode | None] = {}
        self._sets: dict[str, DataSet] = {}
        self._trained: dict[tuple[str, str], tuple[DetectorModule, dict[str, Any]]] = {}

    def dataset(self, name: str) -> DataSet:
        """A data set, training and calibration images on the device."""
        if name not in self._sets:
            loaded = datasets.load(name, self.data)
            train, calibration = loaded.train.to(self.device), loaded.calibration.to(self.device)
            self._sets[name] = replace(loaded, train=train, calibration=calibration)
        return self._sets[name]

    def run(self, cell: Cell, twin: Cell | None = None) -> dict[str, Any]:
        """A cell's result, from the store if it is there.

        Args:
            cell: to run.
            twin: its attack with the other goal, if that is to be run next: both share batches where memory allows, and
                it will find its images there. Results agree to rounding with those of a cell run alone.

        Raises:
            OutOfTimeError: the budget is used up; the next run goes on where this one stopped.
        """
        known = self.store.read_cell(cell.key)
        if known is not None:
            return known
        started = time.perf_counter()
        detector, record = self.detector(cell)
        if cell.consistency:
            detector = ConsistentDetector(detector, **cell.consistency)
        surrogate = None if cell.surrogate is None else self._surrogate(cell.surrogate)
        data = self.dataset(cell.training.dataset)
        held, judged = data.held_out() if cell.split == "validation" else (data.calibration, data.open_test())
        images, labels = judged.head(cell.images).to(self.device).floats()
        calibration = Batches(held, JUDGED_AT_ONCE)
        thresholds = thresholds_at(detector, calibration, cell.rates)
        # An attack that sees thresholds is run for each rate; what another finds is judged at all of them.
        groups = [cell.rates] if not KINDS[cell.kind].sees_thresholds else [(rate,) for rate in cell.rates]
        results: dict[str, Any] = {}
        stages: list[dict[str, Any]] = []
        first: Evaluation | None = None
        for rates in groups:
            attacked = self._attack(
                cell, WithThresholds(detector, thresholds[rates[0]]), images, labels, surrogate, rates[0], twin
            )
            report, verdicts = judge_attacked(
                detector,
                {rate: thresholds[rate] for rate in rates},
                attacked.attacked,
                images,
                labels,
                norm=cell.options.get("norm", "l2"),
                eps=cell.options["eps"],
                calibration=calibration,
            )
            if attacked.unproved is not None:
                count_unproved(verdicts, attacked.unproved)
            first = first or report
            stages += [{"rate": rates[0], **asdict(stage)} for stage in attacked.stages]
            for variant, own in verdicts.items():
                results.setdefault(variant, {"eroc": own["eroc"], "rates": {}})["rates"] |= own["rates"]
        assert first is not None  # there is at least one rate
        points = {}
        if cell.points:
            seen = WithThresholds(detector, thresholds[cell.rates[0]])
            shown = (part[: cell.points] for part in (images, labels, next(iter(attacked.attacked.values()))))
            points = {"points": map_points(seen, *shown, seed=cell.seed)}
        result = {
            "title": cell.title,
            "definition": cell.definition,
            "training": record,
            "images": cell.images,
            "accuracy": [first.accuracy.count, first.accuracy.total],
            "results": results,
            "stages": stages,
            **points,
            "seconds": round(time.perf_counter() - started, 2),
            "checksums": data.checksums,
            "provenance": provenance(self.device) | {"compiled": self.compile_mode(cell.training)},
        }
        self.store.write_cell(cell, result)
        self.store.finish(cell.key)
        return result

    def detector(self, cell: Cell) -> tuple[DetectorModule, dict[str, Any]]:
        """A cell's detector, trained and finished but not calibrated, and the record of its training."""
        name = cell.detector, cell.training.key
        if name not in self._trained:
            recipe, data = make_recipe(cell.detector, cell.training.options), self.dataset(cell.training.dataset)
            trained, record = train_detector(
                cell.training,
                recipe,
                data,
                self.store,
                device=self.device,
                clock=self.clock,
                progress=self.progress,
                compiled=self.compile_mode(cell.training),
            )
            batches = Batches(data.train.head(cell.training.images), JUDGED_AT_ONCE)
            finished = recipe.finish(trained.eval(), batches).to(self.device).eval().requires_grad_(False)
            self._trained = dict(list(self._trained.items())[-3:]) | {name: (finished, record)}
        return self._trained[name]

    def compile_mode(self, training: Training) -> networks.CompileMode | None:
        """How a training's network is compiled, if it is."""
        if self.compiled != "auto":
            return self.compiled
        name = training.dataset, training.model
        if name not in self._modes:
            shape = self.dataset(training.dataset).image_shape
            network = networks.build(training.model, shape).to(self.device).eval()
            images = torch.rand(training.batch_size, *shape, device=self.device)
            self._modes[name] = networks.quickest_mode(network, images)
        return self._modes[name]

    def _surrogate(self, cell: Cell) -> tuple[Detector, Any]:
        detector, _ = self.detector(cell)
        calibration = Batches(self.dataset(cell.training.dataset).calibration, JUDGED_AT_ONCE)
        (thresholds,) = thresholds_at(detector, calibration, cell.rates[:1]).values()
        return WithThresholds(detector, thresholds), RECIPES[cell.detector].objective

    def _attack(
        self,
        cell: Cell,
        detector: Detector,
        images: Tensor,
        labels: Tensor,
        surrogate: tuple[Detector, Any] | None,
        rate: float,
        twin: Cell | None,
    ) -> Outcome:
        """All images attacked, in chunks that are kept, so that a killed run loses one of them at most."""
        kind, folder = KINDS[cell.kind], self.store.work(cell.key)
        folders = [folder] if twin is None else [folder, self.store.work(twin.key)]
        references = self.dataset(cell.training.dataset).calibration.head(REFERENCES).floats()
        size = len(labels) if kind.whole else cell.chunk
        outcomes, took = [], 0.0
        rows = torch.arange(len(labels), device=self.device).split(size)
        for index, own in enumerate(tqdm(rows, desc=cell.title, disable=not self.progress, leave=False)):
            file = folder / f"{rate:g}-{index}.pt"
            if not file.exists():
                self.clock.check(took)
                started = time.perf_counter()
                scene = Scene(
                    detector=detector,
                    images=images[own],
                    labels=labels[own],
                    objective=RECIPES[cell.detector].objective,
                    references=references,
                    surrogate=surrogate,
                    # A chunk's randomness is its own, so that results do not depend on where a run was killed.
                    generator=Generator(self.device).manual_seed(10_000 * cell.seed + index),
                    checkpoint=folder / f"{rate:g}-{index}.state",
                    on_stage=lambda stage: self.clock.check(),
                )
                found = [kind.run(scene, **cell.options)] if twin is None else _run_both(scene, cell)
                # Its own file is written last: where that is, the twin's is too.
                for place, outcome in reversed(list(zip(folders, found, strict=False))):
                    kept = outcome._asdict() | {"stages": [asdict(stage) for stage in outcome.stages]}
                    write_atomically(place / file.name, partial(torch.save, kept))
                took = time.perf_counter() - started
            outcomes.append(torch.load(file, weights_only=True, map_location=self.device))
        variants = {name: torch.cat([part["attacked"][name] for part in outcomes]) for name in outcomes[0]["attacked"]}
        stages = tuple(StageRecord(**stage) for part in outcomes for stage in part["stages"])
        unproved = None if outcomes[0].get("unproved") is None else torch.cat([part["unproved"] for part in outcomes])
        return Outcome(variants, stages, unproved)


def _run_both(scene: Scene, cell: Cell) -> list[Outcome]:
    """What the cell's attack finds, and what it finds with the other goal, unless memory is too small for both."""
    kind, state = KINDS[cell.kind], scene.generator.get_state()
    assert kind.run_both is not None  # it has a twin
    try:
        return kind.run_both(scene, **cell.options)
    except torch.OutOfMemoryError:
        scene.generator.set_state(state)
    return [kind.run(scene, **cell.options)]


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
