"""Peak memory by batch size for ResNet-50 at 224. Attacks and evaluations should hold one batch at a time only."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
from clusterguard import PGD, ClusterGuard, evaluate
from torch import Tensor

from benchmarks._support import write_json
from benchmarks.running import provenance
from benchmarks.studies.speed._measure import SPEED_RESULTS

IMAGES, BATCHES = 8, (1, 2, 4, 8)


def detect_in_batches(guard: ClusterGuard, images: Tensor, batch: int) -> None:
    """Detect images in batches, without gradients."""
    for part in images.split(batch):
        guard.detect(part)


def attack_in_batches(guard: ClusterGuard, images: Tensor, batch: int) -> None:
    """Run one step of PGD in batches. More steps take no more memory."""
    PGD(eps=0.01, step_size=0.01, steps=1, batch_size=batch)(
        guard, images, guard.detect(images[:1]).labels.expand(IMAGES)
    )


def evaluate_in_batches(guard: ClusterGuard, images: Tensor, batch: int) -> None:
    """Evaluate a guard in batches."""
    labels = torch.cat([guard.detect(part).labels for part in images.split(batch)])
    loader = list(zip(images.split(batch), labels.split(batch), strict=True))
    evaluate(guard, PGD(eps=0.01, step_size=0.01, steps=1, batch_size=batch), loader, sanity_images=0)


WORKS: dict[str, Callable[[ClusterGuard, Tensor, int], None]] = {
    "detect": detect_in_batches,
    "PGD": attack_in_batches,
    "evaluate": evaluate_in_batches,
}


def peak_memory(work: str, batch: int, device_type: str) -> float:
    """The largest memory in megabytes that a work takes, beyond what was in use when it began.

    Args:
        work: key of `WORKS`.
        batch: number of images in a batch.
        device_type: "cpu" or "cuda".

    This function has to be called in a fresh process.
    """
    import timm

    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device(device_type)
    guard = ClusterGuard(timm.create_model("resnet50", num_classes=1000)).eval().to(device)
    guard.thresholds = torch.full((1000,), 1e6, device=device)
    images = torch.rand(IMAGES, 3, 224, 224, device=device)
    guard.detect(images[:1, :, :32, :32])  # libraries load what they need at the first call
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        WORKS[work](guard, images, batch)
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    Path("/proc/self/clear_refs").write_text("5")  # Linux then forgets the peak of building the model
    before = _resident("VmRSS")
    WORKS[work](guard, images, batch)
    return round((_resident("VmHWM") - before) / 2**10, 1)


def _resident(name: str) -> int:
    """One of the memory figures that Linux reports for this process, in kilobytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def measure_memory(device: torch.device) -> None:
    """Measure every work at every batch size, and write the figures to a file in benchmarks/results/speed."""
    peaks: dict[str, dict[str, float]] = {}
    # Two run at a time, each in a fresh process.
    with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        asked = [(work, batch, device.type) for work in WORKS for batch in BATCHES]
        for (work, batch, _), megabytes in zip(asked, pool.starmap(peak_memory, asked, chunksize=1), strict=True):
            peaks.setdefault(work, {})[str(batch)] = megabytes
            print(f"{work}, batch {batch}: {megabytes:,.0f} MB", flush=True)
    content = {"images": IMAGES, "megabytes": peaks, "provenance": provenance(device)}
    file = SPEED_RESULTS / f"memory-{device.type}.json"
    write_json(file, content)
