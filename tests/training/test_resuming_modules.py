"""What the layers of a detector keep outside of their state dict, when a training goes on from its checkpoint."""

import random
from itertools import count

import numpy as np
import pytest
import torch
from clusterguard import AdversarialClusterTrainer
from clusterguard.errors import PersistenceError, TrainingStoppedError
from torch import nn
from trainings import ATTACK, held_out, new_guard, weights


class Layer(nn.Module):
    """Changes features by what it keeps, while it is trained."""

    shared = 0

    def __init__(self, change, **kept):
        super().__init__()
        self.change = change
        vars(self).update(kept)
        self.register_buffer("mean", torch.zeros(16), persistent=False)
        self.register_buffer("large", torch.zeros(200, 100), persistent=False)

    def forward(self, features):
        return self.change(self, features) if self.training else features


def noise(draw):
    return lambda layer, features: features + 0.3 * draw(layer)


def count_openly(layer, features):
    layer.count += 1
    return features * layer.count / 10


def count_privately(layer, features):
    layer._count = getattr(layer, "_count", 0) + 1
    return features * layer._count / 10


def count_in_the_class(layer, features):
    layer.shared += 1
    return features * layer.shared / 10


def count_in_a_list(layer, features):
    layer.seen.append(len(layer.seen))
    return features * len(layer.seen) / 10


def count_in_a_tensor(layer, features):
    layer.tensor = layer.tensor + 1
    return features * layer.tensor / 10


def average(layer, features):
    layer.mean = layer.mean * 0.9 + 0.1 * features.detach().mean(0)
    return features - layer.mean


def fill(layer, features):
    layer.large.add_(features.detach().mean())
    return features - layer.large.mean()


def make_a_generator(layer, features):
    if layer.lazy is None:
        layer.lazy = torch.Generator().manual_seed(2)
    return features + torch.rand(1, generator=layer.lazy)


LAYERS = {
    "torch's generator": lambda: Layer(
        noise(lambda layer: torch.rand(1, generator=layer.rng)), rng=torch.Generator().manual_seed(1)
    ),
    "numpy's generator": lambda: Layer(noise(lambda layer: layer.rng.random()), rng=np.random.default_rng(1)),
    "python's generator": lambda: Layer(noise(lambda layer: layer.rng.random()), rng=random.Random(1)),
    "a generator made in training": lambda: Layer(make_a_generator, lazy=None),
    "a counter": lambda: Layer(count_openly, count=0),
    "a private counter": lambda: Layer(count_privately),
    "a counter of the class": lambda: Layer(count_in_the_class),
    "a list": lambda: Layer(count_in_a_list, seen=[]),
    "a tensor": lambda: Layer(count_in_a_tensor, tensor=torch.zeros(1)),
    "a buffer": lambda: Layer(average),
    "a large buffer, in place": lambda: Layer(fill),
}
DEEP = 8  # blocks around a layer, as in a large network


def train(blobs, make, file, *, stop=-1, epochs=3):
    layer = make()
    for _ in range(DEEP):
        layer = nn.Sequential(layer)
    trainer = AdversarialClusterTrainer(new_guard(layer), ATTACK, warmup_epochs=9)
    steps = iter(range(1, 10**6))
    options = {"checkpoint": file, "stop_when": lambda: next(steps) == stop, "calibrate": False, "progress": False}
    torch.manual_seed(0)
    if stop < 0:
        trainer.fit(blobs, held_out(blobs), epochs=epochs, **options)
    else:
        with pytest.raises(TrainingStoppedError):
            trainer.fit(blobs, held_out(blobs), epochs=epochs, **options)
    return weights(trainer.detector)


@pytest.mark.parametrize("name", LAYERS)
def test_a_resumed_training_is_bit_by_bit_the_uninterrupted_one(name, blobs, tmp_path):
    make = LAYERS[name]
    whole = train(blobs, make, tmp_path / "whole.pt")
    assert not torch.equal(whole, train(blobs, nn.Identity, tmp_path / "other.pt"))
    train(blobs, make, tmp_path / "run.pt", stop=13)  # within the second epoch
    assert torch.equal(train(blobs, make, tmp_path / "run.pt"), whole)


def test_what_a_layer_cannot_keep_is_said_before_training(blobs, tmp_path):
    with pytest.warns(UserWarning, match=r"because detector\..*places is an iterator"):
        train(blobs, lambda: Layer(noise(lambda layer: next(layer.places) % 2), places=count()), tmp_path / "run.pt")


def test_a_layer_with_another_generator_is_another_run(blobs, tmp_path):
    unchanged = noise(lambda _: 0)
    train(blobs, lambda: Layer(unchanged, rng=torch.Generator().manual_seed(1)), tmp_path / "run.pt", epochs=1)
    with pytest.raises(PersistenceError, match="expected a detector with the generators"):
        train(blobs, lambda: Layer(unchanged), tmp_path / "run.pt")
