"""An experiment with every kind of attack that runs in seconds."""

import json

import torch

from benchmarks.running import Store, Trainings, run_cell

SMALL = """
title = "Everything once"
section = "paper"
form = "attacks"
dataset = "digits"
model = "tiny-cnn"
images = 12
chunk = 5
rates = [0.05, 0.2]
seeds = [0]
detectors = ["ours", "fs"]
points = 8

attacks = [
  { name = "PGD", kind = "pgd", norm = "linf", eps = 0.2, steps = 3, targeted = true, step_sizes = [0.05, 0.1] },
  { name = "MIM", kind = "mim", norm = "l1", eps = 9, steps = 3, step_sizes = [3] },
  { name = "NES", kind = "nes", norm = "l2", eps = 2.0, steps = 2, samples = 4, step_sizes = [0.5] },
  { name = "FGSM", kind = "fgsm", norm = "linf", eps = 0.2 },
  { name = "CW", kind = "cw", eps = 3.0, searches = 2, steps = 4 },
  { name = "Boundary", kind = "boundary", norm = "linf", eps = 0.3, queries = 9 },
  { name = "Transfer", kind = "transfer", norm = "linf", eps = 0.2, steps = 3, step_size = 0.1, surrogate = "vanilla" },
  { name = "suite", kind = "suite", norm = "l0", eps = 9.0, budget = "quick" },
]

[training]
epochs = 2
images = 500
batch_size = 50
attack = { norm = "linf", eps = 0.2, step_size = 0.1, steps = 2 }
"""


def run_all(chosen, root, clock=None):
    trainings = Trainings(Store(root), device=torch.device("cpu"), clock=clock)
    return [run_cell(cell, trainings) for cell in chosen]


def comparable(result):
    """Without what a repetition may change."""
    result = json.loads(json.dumps(result))
    for part in (result, result["training"], result["training"]["last"]):
        part.pop("seconds", None)
        part.pop("provenance", None)
    return result
