"""The number of threads on which a detector computes fastest. Small networks are faster on few threads."""

import os
from time import perf_counter

import torch
from clusterguard._support import evaluation_mode
from clusterguard.detection import Detector
from torch import Tensor

_WORTH_IT = 0.9  # more threads must take at most this share of the time
_LONG = 0.3  # seconds of a first gradient after which the others use fewer images
_FEWEST = 8


def settle_threads(detector: Detector, images: Tensor) -> int:
    """Measure on how many threads gradients of a detector are fastest, set torch to it, and return the number.

    Nothing is measured on a GPU, on one core, or where the environment names a number (OMP_NUM_THREADS).

    Args:
        detector: detector on the device of the images.
        images: (B, C, H, W), at least one.
    """
    cores: int = torch.get_num_threads()
    if images.device.type != "cpu" or cores == 1 or "OMP_NUM_THREADS" in os.environ:
        return cores
    counts: list[int] = sorted({1, *(2**power for power in range(1, cores.bit_length()) if 2**power < cores), cores})
    with evaluation_mode(detector) as detector:
        if seconds_of_gradient(detector, images) > _LONG:  # this first call also does work that later calls need not do
            images = images[:_FEWEST]
        best, least = counts[0], float("inf")
        for count in counts:
            torch.set_num_threads(count)
            seconds = min(seconds_of_gradient(detector, images) for _ in range(3))
            if seconds < _WORTH_IT * least:
                best, least = count, seconds
    torch.set_num_threads(best)
    return best


def seconds_of_gradient(detector: Detector, images: Tensor) -> float:
    """Seconds that one gradient of a detector takes for a batch of images (B, C, H, W)."""
    started = perf_counter()
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        torch.autograd.grad(detector.evidence(leaf).suspicion.sum(), leaf)
    return perf_counter() - started
