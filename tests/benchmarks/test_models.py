import pytest
import torch
from clusterguard.errors import ConfigurationError

from benchmarks.detectors import _networks as networks
from benchmarks.running import _plan as plan

SIZES = {  # parameters without the classifier, as published with it less its own
    "tiny-cnn": 165_380,
    "wide-cnn": 836_448,
    "cnn-5": 688376,
    "small-cnn": 310_296,
    "released-cnn": 6_498_688,
    "resnet9": 6_568_000,
    "resnet18": 11_168_832,
    "resnet18-half": 2_807_296,
    "wrn-10-1": 77_200,
    "wrn-16-4": 2_746_000,
    "wrn-28-10": 36_472_752,
    "wrn-34-10": 46_153_872,
}


@pytest.mark.parametrize("name", networks.MODELS)
def test_images_become_features_with_a_gradient(name):
    shape = (1, 28, 28) if "cnn" in name else (3, 32, 32)
    network = networks.build_network(name, shape).eval()
    if not name.startswith("wrn-"):
        images = torch.rand(2, *shape, requires_grad=True)
        features = network(images)
        assert features.shape == (2, network.num_features)
        (gradient,) = torch.autograd.grad(features.sum(), images)
        assert gradient.abs().sum() > 0
    count = sum(parameter.numel() for parameter in network.parameters())
    assert abs(count - SIZES[name]) / SIZES[name] < 0.01
    assert network.image_shape == shape


def test_the_cost_of_every_network_can_be_estimated():
    assert set(plan.KERNELS) == set(networks.MODELS)


@pytest.mark.parametrize("name", ["tiny-cnn", "wide-cnn", "cnn-5", "small-cnn", "released-cnn"])
def test_small_networks_take_colour_images_too(name):
    assert networks.build_network(name, (3, 32, 32))(torch.rand(2, 3, 32, 32)).shape[0] == 2


def test_a_wide_block_halves_the_image_where_it_should():
    network = networks.wide_resnet((3, 32, 32), depth=10, width=1).eval()
    maps = network[:4](torch.rand(1, 3, 32, 32))  # the stem and one block of each group
    assert maps.shape == (1, 64, 8, 8)


def test_equal_seeds_give_equal_networks():
    first, second = (torch.manual_seed(0) and networks.build_network("tiny-cnn", (1, 28, 28)) for _ in range(2))
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(first(images), second(images))


def test_an_unknown_model_is_named():
    with pytest.raises(ConfigurationError, match="lenet"):
        networks.build_network("lenet", (1, 28, 28))
