"""What experiments will cost.

The definitions of cells give the number of gradient evaluations, and the measured throughput of a device gives seconds.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._support import write_atomically
from benchmarks.data import find_data_set
from benchmarks.detectors import RECIPES, build_network
from benchmarks.experiments import KINDS, Cell
from benchmarks.running._store import RESULTS, device_name

THROUGHPUT_FILE = RESULTS / "throughput.json"
# Assumptions for a device that has not been measured yet: FLOP/s that small convolutional networks sustain in float32,
# and kernels that eager PyTorch launches in a second.
_ASSUMED = {"h200": (15e12, 100_000.0), "cpu": (20e9, 50_000.0)}
PATIENCE = 2.0  # seconds that a measurement lasts at least
KERNELS = {  # numbers of kernels that a forward pass launches, by network
    "tiny-cnn": 25,
    "wide-cnn": 25,
    "cnn-5": 40,
    "small-cnn": 50,
    "released-cnn": 30,
    "resnet18": 220,
    "wrn-10-1": 100,
    "wrn-16-4": 180,
    "wrn-28-10": 330,
    "wrn-34-10": 400,
}


@dataclass(frozen=True)
class Throughput:
    """How fast a device is.

    Attributes:
        source: origin of the figures, for people.
        seconds: function of the model, the data set and the number of images in a batch. It returns the seconds of a
            forward pass for one image, and those of a forward and a backward pass.
    """

    source: str
    seconds: Callable[[str, str, int], tuple[float, float]]


def measure_throughput(cells: Sequence[Cell], device: torch.device) -> None:
    """Measure every network of the cells at every batch size, and write results/throughput.json."""
    known: dict[str, Any] = json.loads(THROUGHPUT_FILE.read_text()) if THROUGHPUT_FILE.exists() else {}
    measured = known.setdefault(device_name(device), {})
    trainings = {(cell.training.model, cell.training.dataset, cell.training.batch_size) for cell in cells}
    attacks = {(cell.training.model, cell.training.dataset, min(cell.chunk, cell.images)) for cell in cells}
    for model, dataset, batch in sorted(trainings | attacks):
        measured[f"{model} {dataset} {batch}"] = _measure(model, find_data_set(dataset).image_shape, batch, device)
    write_atomically(THROUGHPUT_FILE, lambda file: file.write_text(json.dumps(known, indent=1) + "\n"))


def _measure(model: str, shape: tuple[int, int, int], batch: int, device: torch.device) -> tuple[float, float]:
    """The seconds for one image of a forward pass, and of a forward and a backward pass."""
    network = build_network(model, shape).to(device).eval().requires_grad_(False)
    images = torch.rand(batch, *shape, device=device, requires_grad=True)

    def forward() -> None:
        with torch.no_grad():
            network(images)

    def both() -> None:
        torch.autograd.grad(network(images).sum(), images)

    def time_of(work: Callable[[], None]) -> float:
        work()
        calls, started = 0, time.perf_counter()
        while time.perf_counter() - started < PATIENCE or calls < 3:
            work()
            calls += 1
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / calls / batch

    return time_of(forward), time_of(both)


def find_throughput(device: str) -> Throughput:
    """The throughput of a device, measured if possible and else assumed.

    Args:
        device: part of the name of a measured device, or "cpu", "cuda" or "h200".
    """
    known: dict[str, dict[str, Any]] = json.loads(THROUGHPUT_FILE.read_text()) if THROUGHPUT_FILE.exists() else {}
    kind = "h200" if device.startswith("cuda") else device
    flops, launches = _ASSUMED.get(kind, _ASSUMED["cpu"])
    for name, measured in known.items():
        if device.lower() in name.lower():
            source = f"measured on {name}, assumed for networks that were not"
            return Throughput(source, partial(_nearest, measured, flops, launches))
    return Throughput(
        f"assumed for {device}: {flops / 1e9:,.0f} GFLOP/s, {launches:,.0f} kernels/s",
        partial(_assumed, flops, launches),
    )


def _nearest(
    measured: dict[str, Any], flops: float, launches: float, model: str, dataset: str, batch: int
) -> tuple[float, float]:
    """The seconds at the measured batch size that is nearest to `batch`, and assumed ones if there is none."""
    sizes = [int(key.split()[2]) for key in measured if key.split()[:2] == [model, dataset]]
    if not sizes:
        return _assumed(flops, launches, model, dataset, batch)
    forward, both = measured[f"{model} {dataset} {min(sizes, key=lambda size: abs(math.log(size / batch)))}"]
    return forward, both


def _assumed(flops: float, launches: float, model: str, dataset: str, batch: int) -> tuple[float, float]:
    """The seconds that arithmetic or the launching of kernels takes, whichever takes longer."""
    forward = max(_flops(model, find_data_set(dataset).image_shape) / flops, KERNELS[model] / launches / batch)
    return forward, 3 * forward


@cache
def _flops(model: str, shape: tuple[int, int, int]) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        build_network(model, shape).eval()(torch.rand(1, *shape))
    total: int = counter.get_total_flops()
    return total


def training_passes(cell: Cell) -> int:
    """The number of forward and backward passes in the training of a cell.

    Each image takes the passes of its recipe in every epoch, and the steps of the attack in epochs with the attack.
    Perturbing weights adds a pass for each clean and each attacked image.
    """
    training, recipe = cell.training, RECIPES[cell.detector]
    count: int = training.images or find_data_set(training.dataset).training_images
    attacked = training.epochs - training.warmup_epochs if recipe.attacked else 0
    steps: int = training.attack["steps"] * (training.options.get("targets") or 1)
    looks = 2 if training.options.get("weight_perturbation") else 1
    return count * (looks * recipe.passes * training.epochs + attacked * (steps + looks))


def attack_passes(cell: Cell) -> tuple[int, int]:
    """The largest numbers of forward passes and of backward passes that the attack of a cell takes, over all images."""
    forward, backward = KINDS[cell.kind].cost(10, **cell.options)
    times = cell.images * (len(cell.rates) if KINDS[cell.kind].sees_thresholds else 1)
    if cell.consistency:
        steps = cell.consistency.get("steps", 3)  # each call runs a search and then the detector twice
        forward, backward = (steps + 2) * forward, 2 * backward + steps * forward
    return times * forward, times * backward


def attack_cost(cell: Cell) -> int:
    """The passes of the attack of a cell in units of a forward pass. A backward pass costs about two forward passes."""
    forward, backward = attack_passes(cell)
    return forward + 2 * backward


def print_plan(cells: Sequence[Cell], speed: Throughput, *, trained: Callable[[str], bool] = lambda key: False) -> None:
    """Print the trainings and then the cells, each with its gradient evaluations and the seconds it should take.

    Args:
        cells: cells that are left to run.
        speed: throughput of the device.
        trained: function that says whether the training with a key is finished.
    """
    print(f"seconds: {speed.source}")
    total = 0.0
    needed = {owner.training.key: owner for cell in cells for owner in (cell, cell.surrogate) if owner is not None}
    for owner in (owner for key, owner in needed.items() if not trained(key)):
        training, count = owner.training, training_passes(owner)
        seconds = count * speed.seconds(training.model, training.dataset, training.batch_size)[1]
        total += seconds
        print(f"  train  {owner.detector:40} {count:>14,} gradients {seconds:>9,.0f} s")
    for cell in cells:
        forward, backward = attack_passes(cell)
        batch = min(cell.chunk, cell.images) * len(cell.options.get("step_sizes", [0]))
        alone, both = speed.seconds(cell.training.model, cell.training.dataset, batch)
        seconds = (forward - backward) * alone + backward * both
        total += seconds
        print(f"  attack {cell.title:40} {backward:>14,} gradients {seconds:>9,.0f} s")
    print(f"{len(cells)} cells, {len(needed)} trainings, about {total:,.0f} s in all")
