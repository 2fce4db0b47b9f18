"""PGD against its limit, a bare loop of forward and input gradient, and against the same attack of the peers."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from clusterguard import PGD, ConfidenceDetector, WithThresholds
from torch import Tensor, nn

from benchmarks import models
from benchmarks.recipe import add_classifier
from benchmarks.speed.measure import Row, measure

EPS, STEP = 0.1, 0.02
CASES = {"SmallCNN": ("small-cnn", (1, 28, 28), 32, 5), "ResNet-18": ("resnet18", (3, 32, 32), 2, 2)}


def bare(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """The limit: nothing but forward and input gradient, on the same images again and again."""
    for _ in range(steps):
        leaf = images.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
        torch.autograd.grad(loss, leaf)


def peers(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    """The same deterministic attack as each peer runs it: no random start, the same step, the last iterate."""
    theirs = import_module("torchattacks").PGD(model, eps=EPS, alpha=STEP, steps=steps, random_start=False)
    foolbox = import_module("foolbox")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=steps, random_start=False)
    shown = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    estimator = import_module("art.estimators.classification").PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(images.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    of_art = import_module("art.attacks.evasion").ProjectedGradientDescent(
        estimator, eps=EPS, eps_step=STEP, max_iter=steps, batch_size=len(images), verbose=False
    )
    one_hot = nn.functional.one_hot(labels, 10).numpy()
    return {
        "torchattacks": lambda: theirs(images, labels),
        "Foolbox": lambda: attack(shown, images, labels, epsilons=EPS)[1],
        "ART": lambda: torch.from_numpy(of_art.generate(images.numpy(), y=one_hot)),
    }


def rows() -> list[Row]:
    """The comparisons."""
    found = []
    for title, (name, shape, batch, steps) in CASES.items():
        torch.manual_seed(0)
        model = add_classifier(models.build(name, shape)).eval()
        detector = WithThresholds(ConfidenceDetector(model, 10), torch.full((10,), torch.inf))
        images, labels = torch.rand(batch, *shape), torch.arange(batch) % 10
        attack = PGD(eps=EPS, step_size=STEP, steps=steps, objective="cross_entropy", keep="last")
        ours = partial(attack, detector, images, labels)
        setting = f"PGD, {title}, batch {batch}, {steps} steps, against"
        found.append(Row(f"{setting} a bare loop", ours, partial(bare, model, images, labels, steps), target=0.95))
        same = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
        found += [
            Row(f"{setting} {peer}", ours, theirs, target=1.3, check=same)
            for peer, theirs in peers(model, images, labels, steps).items()
        ]
    return found


if __name__ == "__main__":
    measure("attack", rows())
