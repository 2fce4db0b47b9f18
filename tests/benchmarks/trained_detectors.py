"""Every detector of the comparison, trained for seconds on the digits inside the package."""

from functools import cache

import torch
from clusterguard import PGD
from clusterguard.samples import load_digits
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.detectors import RECIPES, Schedule
from benchmarks.detectors import _networks as networks

SHAPE = 1, 28, 28
IMAGES, LABELS = load_digits("test").tensors
CALIBRATION = DataLoader(load_digits("calibration"), batch_size=500)
TRAINING = TensorDataset(*(part[:1800] for part in load_digits("train").tensors))
ATTACK = PGD(eps=0.2, step_size=0.1, steps=2)
INFINITE = torch.full((10,), torch.inf)


def network(seed=0):
    torch.manual_seed(seed)
    return networks.build_network("tiny-cnn", SHAPE)


def schedule(attack=ATTACK):
    return Schedule(attack=attack, optimizer=lambda model: torch.optim.Adam(model.parameters(), 2e-3), warmup_epochs=1)


@cache
def trained(training):
    recipe = next(recipe for recipe in RECIPES.values() if recipe.training_name == training)
    detector = recipe.build(network())
    loader = DataLoader(TRAINING, batch_size=100, shuffle=True, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    trainer = recipe.trainer(detector, schedule())
    trainer.fit(loader, CALIBRATION, epochs=5, calibrate=False, progress=False, generator=generator)
    return detector.eval()
