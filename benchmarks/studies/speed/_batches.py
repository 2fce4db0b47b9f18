"""Gradients a second by batch size, in both precisions."""

from collections.abc import Iterator

import torch
from clusterguard import PGD

from benchmarks.studies.speed._attack import Victim, our_sides, train_on_digits, untrained
from benchmarks.studies.speed._race import Race

_STEPS = 4
_SIZES = {"SmallCNN": (1, 8, 32, 128), "ResNet-18": (1, 4, 16)}
_SIZES_ON_GPU = (1, 32, 256, 1024)


def compare_batches(device: torch.device) -> Iterator[Race]:
    """Race both precisions of PGD at several batch sizes."""
    attack = PGD(eps=0.1, step_size=0.02, steps=_STEPS, objective="cross_entropy", keep="last")
    for network, on_cpu in _SIZES.items():
        sizes = _SIZES_ON_GPU if device.type == "cuda" else on_cpu
        most = max(sizes)
        victim = train_on_digits(device, most) if network == "SmallCNN" else untrained(network, device, most)
        for size in sizes:
            part = Victim(victim.model, victim.images[:size], victim.labels[:size])
            yield Race(f"PGD-{_STEPS}, {network}, batch {size}", our_sides(attack, part), gradients=_STEPS * size)
