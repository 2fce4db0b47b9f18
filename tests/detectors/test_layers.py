"""A folder can say how a network of torch's own layers is built."""

import json
from collections import OrderedDict

import pytest
import torch
from clusterguard import ClusterGuard
from clusterguard.detectors import LocalCosts
from clusterguard.detectors._layers import _LAYERS, build_layers, describe_layers
from clusterguard.errors import ConfigurationError
from torch import nn

NETWORK = nn.Sequential(
    OrderedDict(
        features=nn.Sequential(
            nn.Conv2d(1, 8, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.LeakyReLU(0.2)
        ),
        more=nn.Sequential(
            nn.ZeroPad2d(1), nn.Conv2d(8, 8, (3, 1), padding="same"), nn.GroupNorm(2, 8), nn.GELU("tanh")
        ),
        pool=nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((2, None)), nn.AvgPool2d((2, 1)), nn.Dropout2d(0.3)),
        flat=nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.LayerNorm(6), nn.Softplus(beta=2), nn.Linear(6, 5)),
    )
)
NETWORK(torch.rand(2, 1, 16, 16))


def test_what_is_described_is_built_again_layer_by_layer():
    again = build_layers(json.loads(json.dumps(describe_layers(NETWORK))))
    assert repr(again) == repr(NETWORK)
    again.load_state_dict(NETWORK.state_dict())
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(again.eval()(images), NETWORK.eval()(images))


@pytest.mark.parametrize("name", _LAYERS)
def test_every_layer_that_is_known_can_be_described(name):
    options = {
        "BatchNorm1d": [3],
        "BatchNorm2d": [3],
        "Conv2d": [3, 4, 2],
        "GroupNorm": [1, 3],
        "LayerNorm": [[2, 3]],
        "Linear": [3, 2],
        "Unflatten": [1, (2, 3)],
    }
    sizes = {"AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "AvgPool2d", "MaxPool2d", "ZeroPad2d"}
    layer = _LAYERS[name](*options.get(name, [2] if name in sizes else []))
    assert repr(build_layers(json.loads(json.dumps(describe_layers(layer))))) == repr(layer)


def test_costs_of_windows_are_built_again_and_their_layers_checked():
    local = LocalCosts(nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    description = json.loads(json.dumps(describe_layers(local)))
    assert repr(build_layers(description)) == repr(local)
    description["parts"][0][1] = {"layer": "Flatten", "options": {}}
    with pytest.raises(ConfigurationError, match="expected layers"):
        build_layers(description)


def test_a_layer_of_another_kind_is_not_described():
    class Flatten(nn.Flatten):
        def forward(self, images):
            return 2 * super().forward(images)

    assert describe_layers(nn.Sequential(nn.ReLU(), Flatten())) is None
    assert describe_layers(nn.Sequential(nn.ReLU(), nn.Bilinear(1, 1, 1))) is None


def test_a_guard_of_such_a_network_loads_from_its_folder_alone(tmp_path):
    guard, images = ClusterGuard(NETWORK, 3, image_shape=(1, 16, 16)), torch.rand(4, 1, 16, 16)
    guard.save_pretrained(tmp_path)
    again = ClusterGuard.from_pretrained(tmp_path)
    assert torch.equal(again.distances(images), guard.distances(images))
    assert "`Sequential` of layers" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "description",
    [
        None,
        {},
        {"layer": "Linear"},
        {"layer": "Bilinear", "options": {}},
        {"layer": "Linear", "options": {"in_features": 2, "out_features": "2"}},
        {"layer": "Linear", "options": {"in_features": 2, "out_features": 2, "device": {"a": 1}}},
        {"layer": "Sequential", "parts": [["0"]]},
        {"layer": "Sequential", "parts": [["a.b", {"layer": "ReLU", "options": {}}]]},
        {"layer": "Sequential", "parts": 3},
        {"layer": "LocalCosts", "parts": []},
        {"layer": "LocalCosts", "options": {}},
    ],
    ids=str,
)
def test_what_describes_no_layers_is_refused(description):
    with pytest.raises(ConfigurationError, match="expected layers"):
        build_layers(description)


def test_layers_in_layers_have_an_end():
    description = {"layer": "ReLU", "options": {}}
    for _ in range(30):
        description = {"layer": "Sequential", "parts": [["0", description]]}
    with pytest.raises(ConfigurationError, match="expected layers"):
        build_layers(description)
