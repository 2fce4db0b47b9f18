"""PGD and APGD in both precisions, against bare loops of forward passes and input gradients, and against peers."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from clusterguard import APGD, PGD, Detector
from clusterguard.attacks import Attack, in_precision
from clusterguard.detectors import ConfidenceDetector, WithThresholds
from clusterguard.samples import load_digits
from torch import Tensor, nn

from benchmarks.detectors import add_classifier, build_network
from benchmarks.studies.speed._measure import Work
from benchmarks.studies.speed._peers import PEER_NAMES, build_apgd, build_pgd
from benchmarks.studies.speed._race import BARE, OUR_PRECISIONS, Race

FASTEST = ("torchattacks", "adv-lib")  # peers that race on larger networks, where a call takes long


class Victim(NamedTuple):
    """A classifier with images to attack.

    Attributes:
        model: classifier in eval mode that maps images in [0, 1] to logits.
        images: (B, C, H, W).
        labels: (B,). Of an untrained network they are its own labels, so that a success is a change of the label.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor

    def detector(self) -> Detector:
        """The classifier as a detector that accepts everything."""
        detector = ConfidenceDetector(self.model, 10, mean=[0.0], std=[1.0])
        return WithThresholds(detector.eval(), torch.full((10,), torch.inf)).to(self.images.device)

    @torch.no_grad()
    def success(self, attacked: Tensor) -> float:
        """The share of attacked images that the classifier labels wrongly in float32."""
        return float((self.model(attacked.contiguous()).argmax(dim=1) != self.labels).float().mean())


def train_on_digits(device: torch.device, batch: int) -> Victim:
    """The paper's network for MNIST, trained for two epochs on 1,500 digits, with test digits."""
    torch.manual_seed(0)
    images, labels = (part.to(device) for part in load_digits("calibration").tensors)
    model = add_classifier(build_network("small-cnn", (1, 28, 28))).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for rows in torch.arange(2 * len(images)).remainder(len(images)).split(50):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    shown, truth = (part[:batch].to(device) for part in load_digits("test").tensors)
    return Victim(model.eval().requires_grad_(False), shown, truth)


def untrained(network: str, device: torch.device, batch: int) -> Victim:
    """ResNet-18 for images of 32 × 32 pixels or ResNet-50 for 224 × 224, with random weights and images."""
    torch.manual_seed(0)
    if network == "ResNet-50":
        import timm

        model, shape = timm.create_model("resnet50", num_classes=10), (3, 224, 224)
    else:
        shape = (3, 32, 32)
        model = add_classifier(build_network("resnet18", shape))
    model = model.eval().requires_grad_(False).to(device)
    images = torch.rand(batch, *shape, device=device)
    with torch.no_grad():
        return Victim(model, images, model(images).argmax(dim=1))


def run_gradients(model: nn.Module, images: Tensor, labels: Tensor, *, steps: int, half: bool) -> Tensor:
    """Compute input gradients of the same images again and again, without an attack around them.

    Returns:
        The images, moved by the last gradient.
    """
    for _ in range(steps):
        leaf = images.detach().requires_grad_()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            logits = model(leaf)
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), leaf)
    return images + gradient


def put_channels_last(model: nn.Module) -> nn.Module:
    """Put the weights of a model into channels last."""
    moved: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def bare_loops(victim: Victim, steps: int) -> dict[str, Work]:
    """Bare loops in float32, and in bfloat16 with channels last and weights that are cast before."""
    half = put_channels_last(copy.deepcopy(victim.model))
    for module in half.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.bfloat16()
    images = victim.images.contiguous(memory_format=torch.channels_last)
    return {
        BARE[0]: partial(run_gradients, victim.model, victim.images, victim.labels, steps=steps, half=False),
        BARE[1]: partial(run_gradients, half, images, victim.labels, steps=steps, half=True),
    }


def our_sides(attack: Attack, victim: Victim) -> dict[str, Work]:
    """An attack of ours in both precisions."""
    return {
        side: partial(in_precision(attack, precision), victim.detector(), victim.images, victim.labels)
        for side, precision in OUR_PRECISIONS.items()
    }


def compare_attacks(device: torch.device) -> Iterator[Race]:
    """Race PGD in linf, l2 and l1 and APGD against bare loops and peers, on the paper's network for MNIST."""
    victim = train_on_digits(device, 500 if device.type == "cuda" else 32)
    radii = {"linf": (0.1, 0.01, 40), "l2": (1.5, 0.3, 10), "l1": (12.0, 2.0, 10)}
    for norm, (eps, step, steps) in radii.items():
        yield _race_pgd("SmallCNN", victim, norm=norm, eps=eps, step=step, steps=steps)
    apgd = APGD(eps=0.1, steps=10, objective="cross_entropy")
    sides = our_sides(apgd, victim) | build_apgd(*victim, eps=0.1, steps=10)
    count = len(victim.images)
    yield Race(f"APGD-10 linf, SmallCNN, batch {count}", sides, gradients=10 * count, success=victim.success)


def compare_on_resnet18(device: torch.device) -> Iterator[Race]:
    """Race PGD in linf against bare loops and peers, on ResNet-18 for images of 32 × 32 pixels."""
    victim = untrained("ResNet-18", device, 128 if device.type == "cuda" else 2)
    yield _race_pgd("ResNet-18", victim, norm="linf", eps=0.03, step=0.003, steps=20, peers=FASTEST)


def compare_on_resnet50(device: torch.device) -> Iterator[Race]:
    """Race PGD in linf against bare loops and peers, on ResNet-50 for images of 224 × 224 pixels."""
    on_gpu = device.type == "cuda"
    victim = untrained("ResNet-50", device, 64 if on_gpu else 1)
    yield _race_pgd(
        "ResNet-50 at 224", victim, norm="linf", eps=0.01, step=0.003, steps=20 if on_gpu else 3, peers=FASTEST
    )


def _race_pgd(
    network: str, victim: Victim, *, norm: str, eps: float, step: float, steps: int, peers: tuple[str, ...] = PEER_NAMES
) -> Race:
    options = {"norm": norm, "eps": eps, "steps": steps}
    attack = PGD(step_size=step, sparsity=None, objective="cross_entropy", keep="last", **options)  # type: ignore[arg-type]
    theirs = build_pgd(*victim, step=step, **options)  # type: ignore[arg-type]
    raced = {peer: work for peer, work in theirs.items() if peer in peers}
    sides = our_sides(attack, victim) | bare_loops(victim, steps) | raced
    count = len(victim.images)
    name = f"PGD-{steps} {norm}, {network}, batch {count}"
    return Race(name, sides, gradients=steps * count, success=victim.success)
