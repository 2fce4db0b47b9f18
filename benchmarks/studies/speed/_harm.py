"""What the same attack breaks in float32, under autocast alone, and with its search in bfloat16."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from clusterguard import PGD, ClusterGuard
from clusterguard.attacks import in_precision
from clusterguard.detection import decide
from clusterguard.samples import load_digits
from torch import Tensor

from benchmarks._support import markdown_table
from benchmarks.studies.speed._operators import STAGES, under_autocast
from benchmarks.studies.speed._race import write_results
from benchmarks.studies.speed._suite import train_guard

_GUARDS = Path(__file__).parents[3] / "guards"
_STEPS, _IMAGES = 40, 300
_SHIPPED, _DEMO = "guards/mnist", "the demo's guard after five epochs"
_RADII = {_DEMO: (0.1, 0.2, 0.3), _SHIPPED: (0.3, 0.35, 0.4)}


def count_broken_by_precision(
    guard: ClusterGuard, images: Tensor, labels: Tensor, *, eps: float, steps: int
) -> dict[str, int]:
    """Count the images that PGD in linf breaks, by the way in which it computes.

    The guard judges every attacked image in float32. All images are accepted under their true label when clean.
    """
    attack = PGD(eps=eps, step_size=eps / 10, steps=steps)
    ways = (
        attack(guard, images, labels),
        under_autocast(attack, guard, images, labels),
        in_precision(attack, "bf16")(guard, images, labels),
    )
    verdicts = [guard.detect(attacked) for attacked in ways]
    broken = [int((~verdict.is_adversarial & (verdict.labels != labels)).sum()) for verdict in verdicts]
    return dict(zip(STAGES, broken, strict=True))


def accepted_digits(guard: ClusterGuard, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those of the first test digits that a guard accepts under their true label, and their labels."""
    images, labels = (part[:_IMAGES].to(device) for part in load_digits("test").tensors)
    with torch.no_grad():
        verdict = decide(guard.evidence(images), guard.thresholds)
    rows = ~verdict.is_adversarial & (verdict.labels == labels)
    return images[rows], labels[rows]


def measure_harm(device: torch.device) -> None:
    """Count what PGD breaks at several radii of two guards, and write the counts to benchmarks/results/speed."""
    torch.set_num_threads(1)
    races: dict[str, Any] = {}
    guards = {_DEMO: train_guard(device), _SHIPPED: ClusterGuard.from_pretrained(_GUARDS / "mnist").to(device)}
    for name, guard in guards.items():
        images, labels = accepted_digits(guard, device)
        for eps in _RADII[name]:
            broken = count_broken_by_precision(guard, images, labels, eps=eps, steps=_STEPS)
            races[f"{name} | {eps:g}"] = {"images": len(images), "broken": broken}
            print(name, eps, len(images), broken, flush=True)
            write_results("harm", {"races": races}, device)


def harm_lines(races: dict[str, Any]) -> Iterator[str]:
    """The rows of the table in Markdown."""
    head = "guard", "radius", "digits", f"broken in {STAGES[0]}", f"under {STAGES[1]}", f"on a {STAGES[2]}"
    cells = [
        [*name.split(" | "), race["images"], *(race["broken"][way] for way in STAGES)] for name, race in races.items()
    ]
    yield from markdown_table(head, cells)
    yield ""
