"""Whether training for certificates in bfloat16 gives guards that are as good as those trained in float32.

`python -m benchmarks.studies.certified_precision` trains a small network on the digits that ship, in both precisions
from the same seeds, and counts what is right, accepted and proved. Proofs are always in float64. A training takes about
a minute on one core of a CPU.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from clusterguard import ClusterGuard, recipes
from clusterguard.certification import certify
from clusterguard.samples import load_digits
from clusterguard.training import initialise
from torch import nn
from torch.utils.data import DataLoader

from benchmarks._support import keep_freed_memory, markdown_table
from benchmarks.running import RESULTS, write_study

CERTIFIED_PRECISION = RESULTS / "certified-precision"
_EPS = 0.2
_BATCH = 100


def train_certified(seed: int, precision: Literal["float32", "bf16"], epochs: int) -> ClusterGuard:
    """A guard of three layers for the digits that ship, trained for certificates at ℓ∞ 0.2."""
    torch.manual_seed(seed)
    train, calibration = load_digits("train"), load_digits("calibration")
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 100), nn.ReLU()),
    )
    guard = ClusterGuard(network, num_classes=10, example=train[0][0][None])
    initialise(guard)
    loader = DataLoader(train, _BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    trainer = recipes.certified(guard, loader, epochs=epochs, eps=_EPS)
    trainer.options = replace(trainer.options, precision=precision)
    trainer.fit(loader, DataLoader(calibration, 250), epochs=epochs, progress=False)
    return guard


def count_certified(guard: ClusterGuard) -> dict[str, int]:
    """How many test digits are labelled correctly, are also accepted, and are also proved."""
    images, labels = load_digits("test").tensors
    detection = guard.detect(images)
    right = detection.labels == labels
    kept = right & ~detection.is_adversarial
    proved = certify(guard, images[kept], labels[kept], eps=_EPS).is_secure
    return {"images": len(labels), "right": int(right.sum()), "kept": int(kept.sum()), "proved": int(proved.sum())}


def certified_lines(runs: list[dict[str, Any]]) -> list[str]:
    """The counts as a table in Markdown."""
    names = ("seed", "precision", "images", "right", "kept", "proved")
    heads = ("seed", "precision of the training", "test digits", "right", "also accepted", f"also proved at ℓ∞ {_EPS}")
    return markdown_table(heads, [[run[name] for name in names] for run in runs], others="---:")


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 20,
    output: Annotated[Path, typer.Option(help="The folder for results.")] = CERTIFIED_PRECISION,
) -> None:
    """Train in both precisions, prove and count."""
    keep_freed_memory()
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = []
    precisions: tuple[Literal["float32", "bf16"], ...] = ("float32", "bf16")
    for seed in range(seeds):
        for precision in precisions:
            counts = count_certified(train_certified(seed, precision, epochs))
            runs.append({"seed": seed, "precision": precision, "epochs": epochs} | counts)
            print(runs[-1], flush=True)
    write_study(output, {"runs": runs}, certified_lines(runs))


if __name__ == "__main__":
    typer.run(main)
