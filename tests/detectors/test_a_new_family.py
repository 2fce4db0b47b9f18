"""A family of backbones, known by nothing but its entry in FAMILIES, is treated like timm's and torchvision's."""

import warnings

import pytest
import torch
from clusterguard import ClusterGuard
from clusterguard.detectors import find_normalization, find_num_classes, make_encoder
from clusterguard.detectors._families import FAMILIES
from clusterguard.detectors._family import Family
from clusterguard.errors import ConfigurationError, PersistenceError
from torch import nn


class Towers(nn.Module):
    """A model of a library that has its own ideas."""

    def __init__(self, embed_dim=8, num_classes=5):
        super().__init__()
        self.embed_dim = embed_dim
        self.tower = nn.Conv2d(3, embed_dim, 3)
        self.verdict = nn.Linear(embed_dim, num_classes)

    def forward(self, images):
        return self.verdict(self.tower(images).mean(dim=(2, 3)))


class TowerFamily(Family):
    name = "towers"

    def fits(self, module):
        return isinstance(module, Towers)

    def is_model(self, module):
        return True

    def num_classes(self, model):
        return model.verdict.out_features

    def trained_normalization(self, model):
        return (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)

    def keep_main_output(self, model):
        pass

    def replace_classifier(self, model, out_features):
        old, model.verdict = model.verdict, nn.Linear(model.embed_dim, out_features)
        return [(old, model.verdict)]

    def recipes(self, model):
        if isinstance(model, Towers):
            yield "towers", {"embed_dim": model.embed_dim}

    def _build(self, name, arguments):
        return Towers(**arguments)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FAMILIES, TowerFamily.name, TowerFamily())


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, nn.Sequential])
def test_it_tells_classes_normalisation_and_classifier(wrap):
    backbone = wrap(Towers())
    assert find_num_classes(backbone) == 5
    assert find_normalization(backbone) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    encoder = make_encoder(backbone, 6)
    assert isinstance(encoder, Towers)
    assert encoder(torch.rand(2, 3, 8, 8)).shape == (2, 6)


def test_a_saved_guard_is_built_again(tmp_path):
    guard, images = ClusterGuard(Towers(embed_dim=16)), torch.rand(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.save_pretrained(tmp_path)
    assert torch.equal(ClusterGuard.from_pretrained(tmp_path).distances(images), guard.distances(images))


def test_its_recipes_set_no_more_than_others():
    with pytest.raises(ConfigurationError, match="settings that a recipe may hold"):
        FAMILIES["towers"].build("towers", {"embed_dim": 8, "checkpoint": "/etc/passwd"})


def test_a_folder_of_a_family_that_is_not_there_is_refused(tmp_path, monkeypatch):
    ClusterGuard(Towers()).save_pretrained(tmp_path)
    monkeypatch.delitem(FAMILIES, "towers")
    with pytest.raises(
        PersistenceError, match="expected a source among timm, torchvision, transformers, layers, got 'towers'"
    ):
        ClusterGuard.from_pretrained(tmp_path)
