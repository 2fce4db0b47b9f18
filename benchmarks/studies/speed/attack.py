"""PGD against a bare loop of forward passes and input gradients, and against the same attack of the peers."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from clusterguard import PGD, Detector
from clusterguard._support import check_gradients
from clusterguard.detectors import ConfidenceDetector, WithThresholds
from clusterguard.errors import ConfigurationError
from torch import Tensor, nn

from benchmarks.detectors import networks
from benchmarks.detectors.recipe import add_classifier
from benchmarks.studies.speed.measure import Check, Row

EPS, STEP = 0.1, 0.02
# By title: network, image shape, and the batch size and number of steps on a CPU and on a GPU.
CASES = {
    "SmallCNN": ("small-cnn", (1, 28, 28), {"cpu": (32, 5), "cuda": (128, 40)}),
    "ResNet-18": ("resnet18", (3, 32, 32), {"cpu": (2, 2), "cuda": (128, 20)}),
}
# On a GPU, small batches wait for kernels to be launched. CUDA graphs avoid that.
COMPILED = {"cpu": "default", "cuda": "reduce-overhead"}


def bare(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Compute input gradients of the same images again and again. No attack can be faster."""
    for _ in range(steps):
        leaf = images.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
        torch.autograd.grad(loss, leaf)


def peers(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    """The same attack of each peer, by name: no random start, the same step size, the last iterate."""
    theirs = import_module("torchattacks").PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=False)
    foolbox = import_module("foolbox")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps, random_start=False)
    shown = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    estimator = import_module("art.estimators.classification").PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        tuple(images.shape[1:]),
        10,
        clip_values=(0.0, 1.0),
        device_type="gpu" if images.is_cuda else "cpu",
    )
    of_art = import_module("art.attacks.evasion").ProjectedGradientDescent(
        estimator, eps=EPS, eps_step=STEP, max_iter=steps, batch_size=len(images), verbose=False
    )
    one_hot = nn.functional.one_hot(labels, 10).cpu().numpy()
    return {
        "torchattacks": lambda: theirs(images, labels),
        "Foolbox": lambda: attack(shown, images, labels, epsilons=EPS)[1],
        "ART": lambda: torch.from_numpy(of_art.generate(images.cpu().numpy(), y=one_hot)).to(images.device),
    }


def rows(device: torch.device) -> list[Row]:
    """The comparisons on a device."""
    comparisons = []
    for title, (name, shape, sizes) in CASES.items():
        batch, steps = sizes[device.type]
        torch.manual_seed(0)
        model = add_classifier(networks.build(name, shape)).eval().to(device)
        images, labels = torch.rand(batch, *shape, device=device), torch.arange(batch, device=device) % 10
        eager, compiled = (ConfidenceDetector(model, 10).to(device) for _ in range(2))
        compiled.compile(mode=COMPILED[device.type])
        harm = partial(same_harm, model, images, labels)
        ways: dict[str, tuple[Detector, Check]] = {"": (eager, same_images), "bfloat16, ": (eager, harm)}
        try:
            check_gradients(compiled, compiled.forward, images)
            ways["compiled, "] = compiled, same_images
        except ConfigurationError as error:  # there is nothing to time then
            print(f"{title}: {error}")
        attack = PGD(eps=EPS, step_size=STEP, steps=steps, objective="cross_entropy", keep="last")
        theirs = peers(model, images, labels, steps)
        limit = partial(bare, model, images, labels, steps)
        for way, (detector, check) in ways.items():
            accepting = WithThresholds(detector, torch.full((10,), torch.inf, device=device))
            ours = partial(run, attack, accepting, images, labels, half=way == "bfloat16, ")
            setting = f"PGD, {way}{title}, batch {batch}, {steps} steps, against"
            comparisons.append(Row(f"{setting} a bare loop", ours, limit, target=0.95))
            target = 2.0 if device.type == "cuda" else 1.3
            comparisons += [
                Row(f"{setting} {peer}", ours, their, target=target, check=check)
                for peer, their in theirs.items()
                if way == "" or device.type == "cuda" or peer == "torchattacks"  # on a CPU the fastest peer is enough
            ]
    return comparisons


def run(attack: PGD, detector: Detector, images: Tensor, labels: Tensor, *, half: bool) -> Tensor:
    """Run the attack, with the network in bfloat16 by autocast if `half` is set."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        return attack(detector, images, labels)


@torch.no_grad()
def same_harm(model: nn.Module, images: Tensor, labels: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Check that our attack raises the float32 loss by at least 95 % of what theirs does.

    The images themselves differ, as both attacks round differently.
    """
    clean, mine, other = (nn.functional.cross_entropy(model(x), labels).item() for x in (images, ours, theirs))
    assert mine - clean > 0.95 * (other - clean), f"the loss went from {clean} to {mine} instead of {other}"


def same_images(ours: Tensor, theirs: Tensor) -> None:
    """Check that images are equal but for pixels where a gradient is so close to 0 that rounding decides its sign."""
    differ = ((ours - theirs).abs() > 1e-5).float().mean()
    assert differ < 1e-2, f"{differ:.2%} of pixels differ"
