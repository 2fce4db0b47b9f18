"""What it saves that the C library keeps freed memory, as the command line asks it to, instead of handing it back."""

import multiprocessing
from functools import partial
from typing import Any

import torch
from clusterguard import PGD
from clusterguard.attacks import Precision, in_precision

from benchmarks._support import keep_freed_memory
from benchmarks.studies.speed._attack import train_on_digits
from benchmarks.studies.speed._measure import seconds_of
from benchmarks.studies.speed._race import rounded, write_results

_SIDES = {"handed back": False, "kept": True}
_STEPS, _CALLS = 4, 3
_CASES: tuple[tuple[int, Precision], ...] = ((64, "float32"), (64, "bf16"), (300, "float32"), (300, "bf16"))


def seconds_of_attack(batch: int, precision: Precision, keep: bool) -> float:
    """Processor seconds of PGD on the paper's network in a process of its own, after a call that does not count.

    Args:
        batch: number of images.
        precision: precision of the search.
        keep: whether freed memory is kept. A process cannot undo this, so each needs a fresh one.
    """
    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    victim = train_on_digits(device, batch)
    attack = PGD(eps=0.1, step_size=0.02, steps=_STEPS, objective="cross_entropy", keep="last")
    work = partial(in_precision(attack, precision), victim.detector(), victim.images, victim.labels)
    work()
    return seconds_of(work, _CALLS)


def measure_freed_memory(device: torch.device, rounds: int = 7) -> None:
    """Time attacks on a CPU both ways in turns, and write the seconds to a file in benchmarks/results/speed.

    Args:
        device: the CPU; on any other device the C library has little to do, and nothing is measured.
        rounds: number of rounds, in each of which every side runs once.
    """
    if device.type != "cpu":
        return
    races: dict[str, Any] = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for batch, precision in _CASES:
            seconds: dict[str, list[float]] = {side: [] for side in _SIDES}
            for index in range(rounds):
                for side in list(_SIDES) if index % 2 else reversed(_SIDES):
                    seconds[side].append(pool.apply(seconds_of_attack, (batch, precision, _SIDES[side])))
            name = f"PGD-{_STEPS}, SmallCNN, batch {batch}, {precision}"
            races[name] = {
                "gradients": _STEPS * batch * _CALLS,
                "success": {},
                "seconds": rounded(seconds),
                "facts": {},
            }
            print(name, races[name]["seconds"], flush=True)
            write_results("freed-memory", {"races": races}, device)
