"""Guard a classifier that is already trained: without training, then with it."""

import clusterguard as cg
import torch
from clusterguard.detectors import fit_feature_gaussians
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.utils.data import DataLoader

torch.manual_seed(0)
train, calibration, test = (
    DataLoader(cg.samples.load_digits(split), batch_size=100, shuffle=split == "train")
    for split in ("train", "calibration", "test")
)


def train_classifier() -> nn.Module:
    """The model that you have: a small network, trained without any defence."""
    convolutions = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*convolutions, nn.Linear(32 * 49, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(8):
        for images, labels in train:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def transferred(model: nn.Module, images: Tensor, labels: Tensor, eps: float = 0.1) -> Tensor:
    """Images that an attacker made against the model alone, without knowing of a guard."""
    moved = images
    for _ in range(20):
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(model(moved), labels), moved)
        moved = (images + (moved + 0.02 * gradient.sign() - images).clamp(-eps, eps)).clamp(0, 1)
    return moved.detach()


def report(name: str, guard: cg.ClusterGuard, model: nn.Module) -> None:
    """The accuracy on benign images, how many wrong labels are refused, and what an attack on the guard breaks."""
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    noise = 0.4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    kinds = {
        "noise": (images + noise).clamp(0, 1),
        "blurred": avg_pool2d(images, 7, 1, 3),
        "transferred": transferred(model, images, labels),
    }
    verdicts = guard.detect(images)
    right = verdicts.labels == labels
    print(f"{name}: accuracy {right.sum()}/{len(labels)}, false positives {(verdicts.is_adversarial & right).sum()}")
    for kind, changed in kinds.items():
        verdicts = guard.detect(changed)
        wrong = verdicts.labels != labels
        print(f"    {kind}: {wrong.sum()} wrong labels, {(verdicts.is_adversarial & wrong).sum()} of them refused")
    print(cg.evaluate(guard, attack, test, sanity_images=0))


model = train_classifier()
attack = cg.APGD(eps=0.1, steps=40)  # knows the guard
calibrator = cg.Calibrator(0.05)

guard = cg.ClusterGuard(model, 10)  # labels as before
calibrator.fit(guard, calibration)
report("wrapped", guard, model)

gaussians = cg.ClusterGuard(model, 10)
print(fit_feature_gaussians(gaussians, train))  # means and one covariance of the features
calibrator.fit(gaussians, calibration)
report("Gaussians", gaussians, model)

print(cg.align(guard, train))  # the last layer in closed form
calibrator.fit(guard, calibration)
report("aligned", guard, model)

training_attack = cg.PGD(eps=0.1, step_size=0.05, steps=5, keep="last")
trainer = cg.AdversarialClusterTrainer(guard, training_attack, calibrator=calibrator)
trainer.fit(train, calibration, epochs=4)
report("trained", guard, model)
