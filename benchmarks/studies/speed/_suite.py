"""The worst-case suite, compared with running all its stages to the end on every image."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from clusterguard import PGD, AdversarialClusterTrainer, ClusterGuard, WorstCaseSuite
from clusterguard.attacks import Attack, Metered, Towards
from clusterguard.cli import digit_network
from clusterguard.samples import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.studies.speed._measure import Comparison

_CASES = {0.1: 8, 0.3: 40}  # number of digits by radius; the radius of the training attack is 0.3


def train_guard(device: torch.device) -> ClusterGuard:
    """Train the guard of the demo for five epochs, so that attacks break some images but not all."""
    torch.manual_seed(0)
    train, calibration = load_digits("train"), load_digits("calibration")
    guard = ClusterGuard(digit_network(), num_classes=10, example=train[0][0][None]).to(device)
    attack = PGD(norm="linf", eps=0.3, step_size=0.1, steps=5, keep="last")
    trainer = AdversarialClusterTrainer(
        guard, attack, optimizer=torch.optim.Adam(guard.parameters(), lr=2e-3), warmup_epochs=2
    )
    loaders = DataLoader(train, batch_size=100, shuffle=True), DataLoader(calibration, batch_size=250)
    trainer.fit(*loaders, epochs=5, progress=False)
    return guard.eval()


def without_early_stopping(attack: Attack) -> Attack:
    """Copy an attack, and the attacks that it wraps, with early stopping switched off."""
    changes: dict[str, Any] = {}
    if hasattr(attack, "attack"):
        changes["attack"] = without_early_stopping(attack.attack)
    if getattr(attack, "stop_early", False):
        changes["stop_early"] = False
    return replace(attack, **changes) if changes else attack  # type: ignore[type-var]  # all stages are dataclasses


def run_all(guard: ClusterGuard, suite: WorstCaseSuite, images: Tensor, labels: Tensor) -> tuple[Metered, Tensor]:
    """Run every stage of a suite on every image.

    Returns:
        The guard with the costs that it has counted, and a boolean mask (B,) of the images that some stage broke.
    """
    metered = Metered(guard)
    broken = torch.zeros_like(labels, dtype=torch.bool)
    for attack in suite.stages(guard, Towards.accepted(guard, images, labels)).values():
        generator = torch.Generator(images.device).manual_seed(0)
        verdict = guard.detect(without_early_stopping(attack)(metered, images, labels, generator=generator))
        broken |= ~verdict.is_adversarial & (verdict.labels != labels)
    return metered, broken


def run_suite(guard: ClusterGuard, suite: WorstCaseSuite, images: Tensor, labels: Tensor) -> tuple[Metered, Tensor]:
    """Run a suite.

    Returns:
        The guard with the costs that it has counted, and a boolean mask (B,) of the images that the suite broke.
    """
    metered = Metered(guard)
    verdict = guard.detect(suite(metered, images, labels, generator=torch.Generator(images.device).manual_seed(0)))
    return metered, ~verdict.is_adversarial & (verdict.labels != labels)


def check_same_broken(ours: tuple[Metered, Tensor], theirs: tuple[Metered, Tensor]) -> None:
    """Print the costs, and check that both break the same images.

    One image in twenty may differ, because the attacks draw random numbers.
    """
    print("broken", int(ours[1].sum()), int(theirs[1].sum()), "of", len(ours[1]), ours[0].cost, theirs[0].cost)
    assert int((ours[1] != theirs[1]).sum()) <= len(ours[1]) // 20


def compare_suites(device: torch.device) -> list[Comparison]:
    """Compare the suite with all its stages, at two radii."""
    guard = train_guard(device)
    comparisons = []
    for eps, count in _CASES.items():
        images, labels = (part[:count].to(device) for part in load_digits("test").tensors)
        suite = WorstCaseSuite("linf", eps=eps, budget="quick")
        name = f"suite, quick, linf {eps}, {count} digits, against all stages on all images"
        arguments = guard, suite, images, labels
        comparisons.append(
            Comparison(
                name,
                partial(run_suite, *arguments),
                partial(run_all, *arguments),
                target=2.0,
                check=check_same_broken,
                gradients=lambda result: result[0].cost.backward,
                pairs=6,  # a pair takes some ten seconds
            )
        )
    return comparisons
