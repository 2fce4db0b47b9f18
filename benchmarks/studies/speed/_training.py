"""A step of the paper's training in both precisions, against its passes alone and against a peer's attack."""

import copy
from collections.abc import Iterator
from functools import partial
from importlib import import_module

import torch
from clusterguard import PGD, AdversarialClusterTrainer, CertifiedTrainer, ClusterGuard, TrainingOptions
from torch import Tensor, nn

from benchmarks.detectors import add_classifier, build_network
from benchmarks.studies.speed._measure import Work
from benchmarks.studies.speed._race import OUR_PRECISIONS, OUR_SIDES, Race

# By title: network, image shape, and the batch size and number of steps on a CPU.
_CASES = {"SmallCNN": ("small-cnn", (1, 28, 28), (32, 10)), "ResNet-18": ("resnet18", (3, 32, 32), (8, 4))}
_EPS, _STEP = 0.1, 0.02


def run_passes(guard: ClusterGuard, images: Tensor, labels: Tensor, steps: int) -> None:
    """Run the passes of a training step: one input gradient for each attack step, then the gradients of all weights.

    The input gradients are computed in eval mode.
    """
    guard.eval()
    for _ in range(steps):
        leaf = images.detach().requires_grad_()
        torch.autograd.grad(nn.functional.cross_entropy(guard(leaf), labels), leaf)
    guard.train()
    loss = nn.functional.cross_entropy(guard(torch.cat([images, images])), torch.cat([labels, labels]))
    torch.autograd.grad(loss, list(guard.parameters()))


def peer_step(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Work:
    """A step of adversarial training as one writes it with torchattacks, on benign and attacked images."""
    attack = import_module("torchattacks").PGD(model, eps=_EPS, alpha=_STEP, steps=steps, random_start=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        both = torch.cat([images, attack(images, labels)])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(both), torch.cat([labels, labels])).backward()
        optimizer.step()

    return step


def our_step(guard: ClusterGuard, images: Tensor, labels: Tensor, steps: int, options: TrainingOptions) -> Work:
    """A training step of ours on these images."""
    attack = PGD(eps=_EPS, step_size=_STEP, steps=steps, keep="last")
    optimizer = torch.optim.Adam(guard.parameters(), lr=1e-4)
    engine = AdversarialClusterTrainer(guard.train(), attack, optimizer=optimizer, options=options).engine
    return partial(engine.take_step, images, labels, generator=None)


def compare_training_steps(device: torch.device) -> Iterator[Race]:
    """Race training steps on a small and a larger network."""
    for title, (name, shape, (batch, steps)) in _CASES.items():
        batch = 128 if device.type == "cuda" else batch
        torch.manual_seed(0)
        network = build_network(name, shape)
        guard = ClusterGuard(network, num_classes=10, example=torch.zeros(1, *shape)).to(device).train()
        guards = {side: copy.deepcopy(guard) for side in OUR_SIDES}
        images, labels = torch.rand(batch, *shape, device=device), torch.arange(batch, device=device) % 10
        sides: dict[str, Work] = {
            side: our_step(guards[side], images, labels, steps, TrainingOptions(precision=precision))
            for side, precision in OUR_PRECISIONS.items()
        }
        sides["its passes, float32"] = partial(run_passes, guard, images, labels, steps)
        model = add_classifier(build_network(name, shape)).to(device).train()
        sides["torchattacks and a step"] = peer_step(model, images, labels, steps)
        yield Race(f"training step, {title}, batch {batch}, PGD-{steps}", sides, gradients=batch * (steps + 2))


def compare_certified_steps(device: torch.device) -> Iterator[Race]:
    """Race steps of training for certificates in both precisions, on the paper's network and on a wider one."""
    for title, name, batch in (("SmallCNN", "small-cnn", 32), ("strided CNN of width 32", "wide-cnn", 128)):
        torch.manual_seed(0)
        network = build_network(name, (1, 28, 28))
        guard = ClusterGuard(network, num_classes=10, example=torch.zeros(1, 1, 28, 28)).to(device).train()
        images, labels = torch.rand(batch, 1, 28, 28, device=device), torch.arange(batch, device=device) % 10
        sides: dict[str, Work] = {}
        for side, precision in OUR_PRECISIONS.items():
            twin = copy.deepcopy(guard)
            optimizer = torch.optim.Adam(twin.parameters(), lr=1e-4)
            options = TrainingOptions(precision=precision)
            engine = CertifiedTrainer(
                twin, eps=0.1, warmup_epochs=0, ramp_epochs=0, optimizer=optimizer, options=options
            ).engine
            sides[side] = partial(engine.take_step, images, labels, generator=None)
        yield Race(f"training step for certificates, {title}, batch {batch}", sides, gradients=batch)
