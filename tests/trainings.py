"""A small guard, and the ways to train it that tests share."""

import torch
from clusterguard import PGD, AdversarialClusterTrainer, ClusterGuard
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ATTACK = PGD(eps=0.1, step_size=0.05, steps=3, keep="last")


def new_guard(*layers: nn.Module, seed: int = 0) -> ClusterGuard:
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), *layers)
    return ClusterGuard(backbone, num_classes=3, example=torch.rand(2, 1, 8, 8))


def held_out(blobs):
    """Images that no training has seen: the bands of the blobs look the same in a mirror, their noise does not."""
    images, labels = blobs.dataset.tensors
    return DataLoader(TensorDataset(images.flip(3), labels), batch_size=60)


def train(guard, blobs, *, epochs=2, seed=0, **options):
    fit = {name: options.pop(name) for name in list(options) if name in ("checkpoint", "on_epoch_end", "calibrate")}
    torch.manual_seed(seed)
    optimizer = options.pop("optimizer", None) or torch.optim.Adam(guard.parameters(), lr=5e-3)
    attack = options.pop("attack", ATTACK)
    trainer = AdversarialClusterTrainer(guard, attack, optimizer=optimizer, refresh_every=3, **options)
    loader = DataLoader(blobs.dataset, batch_size=60, shuffle=True)
    return trainer.fit(loader, held_out(blobs), epochs=epochs, progress=False, **fit)


def fit(guard, loader, *, epochs=2, attack=ATTACK, **options):
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(guard.parameters(), lr=1e-3)
    trainer = AdversarialClusterTrainer(guard, attack, optimizer=optimizer, refresh_every=3, **options)
    trainer.fit(loader, loader, epochs=epochs, calibrate=False, progress=False)
    return trainer


def weights(guard):
    return torch.cat([parameter.detach().flatten() for parameter in guard.parameters()])
