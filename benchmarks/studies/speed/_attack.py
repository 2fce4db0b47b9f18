"""PGD compared with a bare loop of forward passes and input gradients, and with the same attack of other libraries."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from clusterguard import PGD, Detector
from clusterguard.detectors import ConfidenceDetector, WithThresholds
from torch import Tensor, nn

from benchmarks.detectors import add_classifier, build_network
from benchmarks.studies.speed._measure import Check, Comparison

_EPS, _STEP = 0.1, 0.02
# By title: network, image shape, and the batch size and number of steps on a CPU and on a GPU.
_CASES = {
    "SmallCNN": ("small-cnn", (1, 28, 28), {"cpu": (32, 5), "cuda": (128, 40)}),
    "ResNet-18": ("resnet18", (3, 32, 32), {"cpu": (2, 2), "cuda": (128, 20)}),
}
# On a GPU, small batches wait for kernels to be launched. CUDA graphs avoid that.
_COMPILED = {"cpu": "default", "cuda": "reduce-overhead"}


def run_gradients(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Compute input gradients of the same images again and again. No attack can be faster."""
    for _ in range(steps):
        leaf = images.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
        torch.autograd.grad(loss, leaf)


def build_peer_attacks(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, Callable[[], Any]]:
    """Make the same attack with each other library, by its name.

    All start at the image, take the same steps and return the last iterate.
    """
    theirs = import_module("torchattacks").PGD(model, eps=_EPS, alpha=_STEP, steps=steps, random_start=False)
    foolbox = import_module("foolbox")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=_STEP, steps=steps, random_start=False)
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
        estimator, eps=_EPS, eps_step=_STEP, max_iter=steps, batch_size=len(images), verbose=False
    )
    one_hot = nn.functional.one_hot(labels, 10).cpu().numpy()
    return {
        "torchattacks": lambda: theirs(images, labels),
        "Foolbox": lambda: attack(shown, images, labels, epsilons=_EPS)[1],
        "ART": lambda: torch.from_numpy(of_art.generate(images.cpu().numpy(), y=one_hot)).to(images.device),
    }


def compare_attacks(device: torch.device) -> list[Comparison]:
    """Compare PGD with a bare loop and with the peers, in float32, in bfloat16 and compiled."""
    comparisons = []
    for title, (name, shape, sizes) in _CASES.items():
        batch, steps = sizes[device.type]
        torch.manual_seed(0)
        model = add_classifier(build_network(name, shape)).eval().to(device)
        images, labels = torch.rand(batch, *shape, device=device), torch.arange(batch, device=device) % 10
        eager, compiled = (ConfidenceDetector(model, 10).to(device) for _ in range(2))
        compiled.compile(mode=_COMPILED[device.type])
        harm = partial(check_same_harm, model, images, labels)
        ways: dict[str, tuple[Detector, Check]] = {"": (eager, check_same_images), "bfloat16, ": (eager, harm)}
        if has_same_gradients(compiled, compiled.forward, images):
            ways["compiled, "] = compiled, check_same_images
        else:
            print(f"{title}: torch.compile gives wrong gradients, so the compiled attack is not timed")
        attack = PGD(eps=_EPS, step_size=_STEP, steps=steps, objective="cross_entropy", keep="last")
        theirs = build_peer_attacks(model, images, labels, steps)
        limit = partial(run_gradients, model, images, labels, steps)
        for way, (detector, check) in ways.items():
            accepting = WithThresholds(detector, torch.full((10,), torch.inf, device=device))
            ours = partial(run_attack, attack, accepting, images, labels, half=way == "bfloat16, ")
            setting = f"PGD, {way}{title}, batch {batch}, {steps} steps, against"
            comparisons.append(Comparison(f"{setting} a bare loop", ours, limit, target=0.95))
            target = 2.0 if device.type == "cuda" else 1.3
            comparisons += [
                Comparison(f"{setting} {peer}", ours, their, target=target, check=check)
                for peer, their in theirs.items()
                if way == "" or device.type == "cuda" or peer == "torchattacks"  # on a CPU the fastest peer is enough
            ]
    return comparisons


def has_same_gradients(first: Callable[..., Tensor], second: Callable[..., Tensor], images: Tensor) -> bool:
    """Whether the input gradients of two functions of images differ by less than 1 % of the largest one."""
    gradients = []
    for function in (first, second):
        leaf = images.detach().clone().requires_grad_()
        output = function(leaf)
        # The weights are unequal, so that errors do not cancel by symmetry.
        weights = torch.linspace(1, 2, output.numel(), device=output.device).view_as(output)
        gradients.append(torch.autograd.grad((output * weights).sum(), leaf)[0])
    return bool((gradients[0] - gradients[1]).abs().max() <= 0.01 * gradients[1].abs().max())


def run_attack(attack: PGD, detector: Detector, images: Tensor, labels: Tensor, *, half: bool) -> Tensor:
    """Run the attack, with the network in bfloat16 by autocast if `half` is set."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
        return attack(detector, images, labels)


@torch.no_grad()
def check_same_harm(model: nn.Module, images: Tensor, labels: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Check that our attack raises the loss in float32 by at least 95 % of what the other attack does.

    The images themselves differ, because the attacks round differently.
    """
    clean, mine, other = (nn.functional.cross_entropy(model(x), labels).item() for x in (images, ours, theirs))
    assert mine - clean > 0.95 * (other - clean), f"the loss went from {clean} to {mine} instead of {other}"


def check_same_images(ours: Tensor, theirs: Tensor) -> None:
    """Check that attacked images are equal in at least 99 % of their pixels.

    In the others, a gradient is so close to 0 that rounding decides its sign.
    """
    differ = ((ours - theirs).abs() > 1e-5).float().mean()
    assert differ < 1e-2, f"{differ:.2%} of pixels differ"
