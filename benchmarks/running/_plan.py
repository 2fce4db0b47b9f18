"""What experiments will cost.

The definitions of cells give the number of gradient evaluations, and the measured throughput of a device gives seconds.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks._support import write_json
from benchmarks.data import find_data_set
from benchmarks.detectors import RECIPES, build_network
from benchmarks.experiments import KINDS, Cell
from benchmarks.running._store import RESULTS, device_name

THROUGHPUT_FILE = RESULTS / "throughput.json"
# Assumptions for a device that has not been measured yet: FLOP/s that small convolutional networks sustain in float32,
# and kernels that eager PyTorch launches in a second.
_ASSUMED = {"h200": (15e12, 100_000.0), "cpu": (20e9, 50_000.0)}
PATIENCE = 2.0  # seconds that a measurement lasts at least
_FEW = 4  # smallest number of images that a measurement uses in place of a larger batch
KERNELS = {  # numbers of kernels that a forward pass launches, by network
    "tiny-cnn": 25,
    "wide-cnn": 25,
    "cnn-5": 40,
    "small-cnn": 50,
    "released-cnn": 30,
    "resnet9": 80,
    "resnet18": 220,
    "resnet18-half": 220,
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
        seconds: function of the model, the data set, the number of images in a batch and the precision, "float32" or
            "bf16". It returns the seconds of a forward pass for one image, and those of a forward and a backward pass.
    """

    source: str
    seconds: Callable[[str, str, int, str], tuple[float, float]]


def measure_throughput(cells: Sequence[Cell], device: torch.device) -> None:
    """Measure every network of the cells at every batch size and precision, and write results/throughput.json."""
    known: dict[str, Any] = json.loads(THROUGHPUT_FILE.read_text()) if THROUGHPUT_FILE.exists() else {}
    measured = known.setdefault(device_name(device), {})
    wanted = set()
    for cell in cells:
        network = cell.training.model, cell.training.dataset
        wanted.add((*network, cell.training.batch_size, _training_precision(cell)))
        wanted.add((*network, min(cell.chunk, cell.images), _attack_precision(cell)))
    for model, dataset, batch, precision in sorted(wanted):
        shape = find_data_set(dataset).image_shape
        measured[f"{model} {dataset} {batch} {precision}"] = _measure(model, shape, batch, device, precision)
    write_json(THROUGHPUT_FILE, known)


def _training_precision(cell: Cell) -> str:
    return "bf16" if cell.training.mixed_precision else "float32"


def _attack_precision(cell: Cell) -> str:
    return str(cell.options.get("precision", "float32"))


def _measure(
    model: str, shape: tuple[int, int, int], batch: int, device: torch.device, precision: str
) -> tuple[float, float]:
    """The seconds for one image of a forward pass, and of a forward and a backward pass.

    A batch that would take too long is replaced by its first images. On one thread of a CPU, the seconds are those of
    this process, so that other processes do not count.
    """
    is_half = precision == "bf16"
    layout = torch.channels_last if is_half else torch.contiguous_format
    network = build_network(model, shape).to(device).eval().requires_grad_(False)
    network = network.to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.rand(batch, *shape, device=device).contiguous(memory_format=layout)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def forward(part: Tensor) -> None:
        with torch.no_grad():
            network(part)

    def both(part: Tensor) -> None:
        torch.autograd.grad(network(part).sum(), part)

    def time_of(work: Callable[[Tensor], None], part: Tensor, seconds: float) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=is_half):
            work(part)
            calls, started = 0, clock()
            while calls < 1 or clock() - started < seconds:
                work(part)
                calls += 1
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            return (clock() - started) / calls / len(part)

    one = time_of(both, images[:_FEW].detach().requires_grad_(), 0.0)
    part = images[: max(_FEW, int(PATIENCE / 2 / one))].detach().requires_grad_()
    return time_of(forward, part, PATIENCE), time_of(both, part, PATIENCE)


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
    measured: dict[str, Any], flops: float, launches: float, model: str, dataset: str, batch: int, precision: str
) -> tuple[float, float]:
    """The seconds at the measured batch size that is nearest to `batch`, and assumed ones if there is none."""
    found = [key.split() for key in measured]
    sizes = [int(size) for *network, size, kind in found if network == [model, dataset] and kind == precision]
    if not sizes:
        return _assumed(flops, launches, model, dataset, batch, precision)
    nearest = min(sizes, key=lambda size: abs(math.log(size / batch)))
    forward, both = measured[f"{model} {dataset} {nearest} {precision}"]
    return forward, both


def _assumed(
    flops: float, launches: float, model: str, dataset: str, batch: int, _precision: str
) -> tuple[float, float]:
    """The seconds that arithmetic or the launching of kernels takes, whichever takes longer, in float32."""
    forward = max(_flops(model, find_data_set(dataset).image_shape) / flops, KERNELS[model] / launches / batch)
    return forward, 3 * forward


@cache
def _flops(model: str, shape: tuple[int, int, int]) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):  # operations are counted without computing them
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
        seconds = _training_seconds(owner, speed)
        total += seconds
        print(f"  train  {owner.detector:40} {training_passes(owner):>14,} gradients {seconds:>9,.0f} s")
    for cell in cells:
        seconds = _attack_seconds(cell, speed)
        total += seconds
        print(f"  attack {cell.title:40} {attack_passes(cell)[1]:>14,} gradients {seconds:>9,.0f} s")
    print(f"{len(cells)} cells, {len(needed)} trainings, about {_duration(total)} in all")


def print_experience(
    cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]], speed: Throughput, device: str
) -> None:
    """Print how long trainings and attacks took that are done, and what the plan says of them.

    Args:
        cells: cells, done or not.
        results: results by the key of the cell.
        speed: throughput of the device.
        device: part of the name of the device. Results of other devices are left out.
    """
    done = [
        (cell, results[cell.key])
        for cell in cells
        if cell.key in results and device.lower() in results[cell.key]["provenance"]["device"].lower()
    ]
    trained = {
        cell.training.key: (result["training"]["seconds"], _training_seconds(cell, speed)) for cell, result in done
    }
    attacked = [(result["seconds"], _attack_seconds(cell, speed)) for cell, result in done]
    for what, pairs in (("trainings", [*trained.values()]), ("attacks", attacked)):
        if pairs:
            taken, planned = (sum(column) for column in zip(*pairs, strict=True))
            print(f"done: {len(pairs)} {what} in {taken:,.0f} s, where the plan says {planned:,.0f} s")


def _training_seconds(cell: Cell, speed: Throughput) -> float:
    training = cell.training
    precision = _training_precision(cell)
    return training_passes(cell) * speed.seconds(training.model, training.dataset, training.batch_size, precision)[1]


def _attack_seconds(cell: Cell, speed: Throughput) -> float:
    forward, backward = attack_passes(cell)
    batch = min(cell.chunk, cell.images) * len(cell.options.get("step_sizes", [0]))
    alone, both = speed.seconds(cell.training.model, cell.training.dataset, batch, _attack_precision(cell))
    return (forward - backward) * alone + backward * both


def _duration(seconds: float) -> str:
    """Seconds, and from some hours on also hours or days, which people can imagine."""
    longer = f", {seconds / 86400:.1f} days" if seconds >= 2 * 86400 else f", {seconds / 3600:.1f} hours"
    return f"{seconds:,.0f} s" + longer * (seconds >= 7200)
