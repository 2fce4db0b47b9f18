"""A step of the paper's training, compared with the passes that such a step cannot do without."""

import torch
from clusterguard import PGD, AdversarialClusterTrainer, ClusterGuard
from torch import Tensor, nn

from benchmarks.detectors import build_network
from benchmarks.studies.speed._measure import Comparison

_STEPS = 10
_CASES = {"SmallCNN": ("small-cnn", (1, 28, 28), {"cpu": 32}), "ResNet-18": ("resnet18", (3, 32, 32), {"cpu": 4})}


def run_passes(guard: ClusterGuard, images: Tensor, labels: Tensor) -> None:
    """Run the passes of a training step: one input gradient for each attack step, then the gradients of all weights.

    The input gradients are computed in eval mode.
    """
    guard.eval()
    for _ in range(_STEPS):
        leaf = images.detach().requires_grad_()
        torch.autograd.grad(nn.functional.cross_entropy(guard(leaf), labels), leaf)
    guard.train()
    loss = nn.functional.cross_entropy(guard(torch.cat([images, images])), torch.cat([labels, labels]))
    torch.autograd.grad(loss, list(guard.parameters()))


def compare_training_steps(device: torch.device) -> list[Comparison]:
    """Compare a training step with its passes, for a small and a larger network."""
    comparisons = []
    for title, (name, shape, batches) in _CASES.items():
        batch = batches.get(device.type, 128)
        torch.manual_seed(0)
        guard = (
            ClusterGuard(build_network(name, shape), num_classes=10, example=torch.zeros(1, *shape)).to(device).train()
        )
        attack = PGD(eps=0.1, step_size=0.02, steps=_STEPS, keep="last")
        trainer = AdversarialClusterTrainer(guard, attack)
        images, labels = torch.rand(batch, *shape, device=device), torch.arange(batch, device=device) % 10

        def step(trainer: AdversarialClusterTrainer = trainer, batch: tuple[Tensor, Tensor] = (images, labels)) -> None:
            trainer.engine.take_step(*batch, generator=None)

        def passes(guard: ClusterGuard = guard, batch: tuple[Tensor, Tensor] = (images, labels)) -> None:
            run_passes(guard, *batch)

        name = f"training step, {title}, batch {batch}, PGD-{_STEPS}, against its passes"
        comparisons.append(Comparison(name, step, passes, target=1 / 1.1))
    return comparisons
