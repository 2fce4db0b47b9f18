"""Bounds hold everything that a box of images becomes."""

import pytest
import torch
from certifiable import points_of
from clusterguard.errors import ConfigurationError
from clusterguard.intervals import Interval
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

SHAPE = 2, 6, 6


class Gated(nn.Module):
    """A gate, a skip, a concatenation and a mean, written as one writes a forward pass."""

    def __init__(self):
        super().__init__()
        self.gate, self.change = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, images):
        gated = images * torch.sigmoid(self.gate(images).mean((2, 3), keepdim=True))
        gated += self.change(images) / 2 - 0.1
        return torch.cat([gated, torch.ones(1) * images, 1 - -images, torch.ones(1) - images], dim=1)


class Attended(nn.Module):
    """What mobile networks do: one interval times another."""

    def forward(self, images):
        return images * nn.functional.hardsigmoid(images.mean((2, 3), keepdim=True))


def normalised(channels):
    layer = nn.BatchNorm2d(channels)
    nn.init.normal_(layer.weight)  # of either sign
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


LAYERS = {
    "careless": lambda: [Careless(), nn.ELU(0.5)],
    "linear": lambda: [nn.Flatten(), nn.Linear(72, 5), nn.ReLU(), nn.Linear(5, 6)],
    "strided": lambda: [nn.Conv2d(2, 3, 3, 2, 1), nn.LeakyReLU(0.1), nn.MaxPool2d(2, 1), nn.Flatten()],
    "normalised": lambda: [nn.Conv2d(2, 3, 3), normalised(3), nn.SiLU(), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten()],
    "gated": lambda: [Gated(), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Tanh()],
    "squeezed": lambda: [
        nn.Conv2d(2, 4, 3),
        nn.Hardswish(),
        Attended(),
        nn.Mish(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    ],
}


class Careless(nn.Module):
    """Options by keyword, and changes in place of what goes by two names."""

    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(2, 2, 3, 3)), nn.Linear(18, 3)

    def forward(self, images):
        found = nn.functional.conv2d(images, self.weight, stride=2, padding=2, dilation=2)
        alias = found
        alias += 0.3
        alias *= -2.0
        found = self.last(found.flatten(1))
        nn.functional.relu(found, inplace=True)
        return found


def network(name, seed):
    torch.manual_seed(seed)
    return nn.Sequential(*LAYERS[name]()).double().eval()


@pytest.mark.parametrize("name", LAYERS)
@given(seed=st.integers(0, 10_000), eps=st.sampled_from([0.0, 0.001, 0.1, 1.0]))
def test_bounds_hold_everything_that_the_box_becomes(name, seed, eps):
    model = network(name, seed)
    box = Interval.around(torch.rand(1, *SHAPE, dtype=torch.float64), eps)
    found, seen = model(box), model(points_of(box))
    assert ((found.lower - 1e-9 <= seen) & (seen <= found.upper + 1e-9)).all()
    if eps == 0:
        torch.testing.assert_close(found.lower, found.upper)


@given(seed=st.integers(0, 10_000))
def test_bounds_of_one_affine_layer_are_reached(seed):
    torch.manual_seed(seed)
    layer, center = nn.Linear(4, 3).double(), torch.rand(1, 4, dtype=torch.float64)
    found = layer(Interval(center - 0.1, center + 0.1))
    vertices = center + 0.1 * (torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4))
    torch.testing.assert_close(found.lower[0], layer(vertices).amin(dim=0))
    torch.testing.assert_close(found.upper[0], layer(vertices).amax(dim=0))


@given(seed=st.integers(0, 10_000))
def test_a_direction_is_bounded_through_the_last_layer_and_never_worse_than_by_the_interval(seed):
    model = network("linear", seed)
    box = Interval.around(torch.rand(1, *SHAPE, dtype=torch.float64), 0.1)
    found, directions = model(box), torch.randn(1, 3, 6, dtype=torch.float64)
    lowest = found.lowest(directions)
    assert (lowest >= Interval(found.lower, found.upper).lowest(directions) - 1e-9).all()
    seen = model(points_of(box)) @ directions[0].T
    assert (lowest - 1e-9 <= seen).all()


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.LayerNorm(6), "layer_norm"),
        (nn.BatchNorm2d(2), "batch statistics"),
        (nn.Dropout(), "dropout"),
        (nn.Softmax(dim=1), "softmax"),
        (nn.ELU(-1.0), "elu with alpha below 0"),
        (nn.LeakyReLU(-0.5), "leaky_relu with negative_slope below 0"),
    ],
)
def test_a_layer_without_bounds_is_named(layer, named):
    with pytest.raises(ConfigurationError, match=named):
        layer(Interval.around(torch.rand(1, *SHAPE), 0.1))


def test_an_attribute_without_bounds_is_named():
    with pytest.raises(AttributeError, match="fft"):
        Interval.around(torch.rand(1, *SHAPE), 0.1).fft  # noqa: B018


def test_what_was_changed_in_place_has_lost_its_linear_layer():
    layer, box = nn.Linear(2, 2), Interval(-torch.ones(1, 2), torch.ones(1, 2))
    found = layer(box)
    nn.functional.relu(found, inplace=True)
    assert (found.lowest(torch.eye(2)[None]) >= 0).all()
