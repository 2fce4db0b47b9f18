"""Recipes from strangers: they name a classifier and sizes, and nothing that fetches or reads a file."""

import json

import pytest
import timm
from clusterguard.detectors._backbone_recipes import build_backbone
from clusterguard.errors import ConfigurationError
from saving import make_guard
from torchvision import models


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "deeplabv3_resnet50", "get_model", "resnet18 "])
def test_only_classifiers_of_torchvision_are_built(name, monkeypatch):
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    with pytest.raises(ConfigurationError, match=f"'{name}' is no name of a classifier of torchvision"):
        build_backbone({"source": "torchvision", "name": name, "arguments": {}})
    assert {"fasterrcnn_resnet50_fpn", "deeplabv3_resnet50"} <= {*models.list_models()}  # whose builders would fetch


@pytest.mark.parametrize("source", ["timm", "torchvision"])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("weights", "DEFAULT"),
        ("weights_backbone", "DEFAULT"),
        ("pretrained", True),
        ("checkpoint_path", "weights.pth"),
        ("cache_dir", "/tmp"),
        ("device", "cuda"),
        ("num_classes", 10**6),
        ("num_classes", -(10**6)),
        ("img_size", [4096, 4097]),
        ("num_classes", float("nan")),
        ("num_classes", [[]] * 201),
        ("global_pool", "../weights"),
        ("global_pool", "a" * 41),
        ("global_pool", {"type": "avg"}),
    ],
)
def test_a_recipe_sets_numbers_and_kinds_of_layers_and_nothing_else(source, setting, value):
    name = {"timm": "test_resnet", "torchvision": "resnet18"}[source]
    recipe = {"source": source, "name": name, "arguments": {setting: value}}
    with pytest.raises(ConfigurationError, match=f"expected settings that a recipe may hold, got .*{setting}"):
        build_backbone(recipe)


def test_what_a_recipe_may_not_set_is_not_saved_as_one(tmp_path):
    backbone = timm.create_model("test_resnet", num_classes=3, block_args={"attn_layer": "se"})
    with pytest.warns(UserWarning, match="will need backbone="):
        make_guard(backbone).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["source"] == "module"
