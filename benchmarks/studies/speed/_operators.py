"""What the working copy of an attack in bfloat16 saves: operators, memory written and seconds, before and after."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from clusterguard import PGD, Detector
from clusterguard.attacks import in_precision
from torch import Tensor

from benchmarks.studies.speed._attack import Victim, train_on_digits, untrained
from benchmarks.studies.speed._measure import Work, count_operators
from benchmarks.studies.speed._race import Race

_STEPS, _OTHER_STEPS = 10, 2
STAGES = ("float32", "autocast alone", "working copy")


def build_vit(device: torch.device, batch: int) -> Victim:
    """A vision transformer of six blocks for images of 32 × 32 pixels, with random weights and images."""
    import timm

    torch.manual_seed(0)
    size: Any = {"img_size": 32, "patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **size).eval().requires_grad_(False).to(device)
    images = torch.rand(batch, 3, 32, 32, device=device)
    with torch.no_grad():
        return Victim(model, images, model(images).argmax(dim=1))


def under_autocast(attack: PGD, detector: Detector, images: Tensor, labels: Tensor) -> Tensor:
    """Run an attack on the detector itself under autocast: no channels last, nothing folded, weights cast each step."""
    with torch.autocast(images.device.type, torch.bfloat16):
        return attack(detector, images, labels)


def count_step(works: dict[str, tuple[Work, Work]]) -> dict[str, dict[str, float]]:
    """The operators and megabytes of one step, from the difference between attacks of two lengths."""
    counts: dict[str, dict[str, float]] = {}
    for stage, (longer, shorter) in works.items():
        more, fewer = count_operators(longer), count_operators(shorter)
        apart = _STEPS - _OTHER_STEPS
        counts[stage] = {unit: round((more[unit] - fewer[unit]) / apart, 2) for unit in ("operators", "megabytes")}
    return counts


def compare_stages(device: torch.device) -> Iterator[Race]:
    """Race PGD in float32, under autocast alone and on a working copy, on three networks."""
    victims = {
        "SmallCNN": partial(train_on_digits, device, 32),
        "ResNet-18": partial(untrained, "ResNet-18", device, 4),
        "ViT of 6 blocks": partial(build_vit, device, 8),
    }
    for network, build in victims.items():
        victim = build()
        given = victim.detector(), victim.images, victim.labels
        works: dict[str, tuple[Work, Work]] = {}
        long, short = (
            PGD(eps=0.1, step_size=0.02, steps=steps, objective="cross_entropy", keep="last")
            for steps in (_STEPS, _OTHER_STEPS)
        )
        works["float32"] = partial(long, *given), partial(short, *given)
        works["autocast alone"] = partial(under_autocast, long, *given), partial(under_autocast, short, *given)
        works["working copy"] = tuple(partial(in_precision(attack, "bf16"), *given) for attack in (long, short))  # type: ignore[assignment]
        count = len(victim.images)
        yield Race(
            f"PGD-{_STEPS}, {network}, batch {count}",
            {stage: longer for stage, (longer, _) in works.items()},
            gradients=_STEPS * count,
            facts={"of one step": count_step(works)},
        )
