"""A network that computes something else for a tensor than for an interval gets no certificate, wherever that shows."""

import warnings

import pytest
import torch
from clusterguard import ClusterGuard, certify
from clusterguard.certification import Interval, certified_radius, check_bounds
from clusterguard.errors import ConfigurationError
from torch import nn
from torch.nn import functional

STRIPES = torch.tensor([1.0, -1.0]).repeat(8)


def inverted_where_striped(features):
    """Something else in a small part of the ball alone, which neither samples nor gradients lead to."""
    is_striped = ((features[:, :16] - 0.5) * STRIPES > 0.05).all(1)
    return torch.where(is_striped[:, None], -features, features)


class Network(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, values):
        return self.function(values)


def guard_of(network, weight=0.3):
    guard = ClusterGuard(network, num_classes=2, example=torch.rand(2, 1, 8, 8)).eval()
    with torch.no_grad():
        guard.encoder[-1].weight.copy_(torch.tensor([[weight], [-weight]]).expand(2, 64))
        guard.encoder[-1].bias.zero_()
    guard.thresholds = torch.full((2,), 14.0)
    return guard


GREY, ZEROS = torch.full((8, 1, 8, 8), 0.5), torch.zeros(8, dtype=torch.long)


def by_name(values):
    return "Tensor" in type(values).__name__


def by_attribute(values):
    try:
        return values.is_floating_point()
    except Exception:
        return False


def by_comparison(values):
    try:
        return bool((values <= 1.5).all())
    except Exception:
        return False


ASKING = {
    "isinstance": lambda values: isinstance(values, torch.Tensor),
    "is_tensor": torch.is_tensor,
    "type": lambda values: type(values) is torch.Tensor,
    "name of the type": by_name,
    "isinstance of an interval": lambda values: not isinstance(values, Interval),
}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch will give up scripted functions, which it tells nobody about
    SCRIPTED = torch.jit.trace(inverted_where_striped, GREY.flatten(1), check_trace=False)


class Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features):
        return inverted_where_striped(features)


def rising_above(shift):
    return lambda features: features + functional.relu(functional.relu(features - 0.58) - shift)


OTHER = {
    "other functions": inverted_where_striped,
    "a scripted function": SCRIPTED,
    "an autograd function": Autograd.apply,
    "numpy": lambda features: torch.from_numpy(inverted_where_striped(features).numpy()),
    "another number": rising_above(0.01),
    "another constant": rising_above(torch.tensor(0.01)),
}
USUAL = {"another number": rising_above(2.0), "another constant": rising_above(torch.tensor(2.0))}


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("asking", ASKING)
def test_a_network_that_asks_whether_it_gets_a_tensor_is_refused_though_no_sample_shows_it(asking, other):
    usual = USUAL.get(other, lambda features: features)

    def function(values):
        features = values.flatten(1)
        return OTHER[other](features) if ASKING[asking](values) else usual(features)

    guard = guard_of(Network(function))
    for use in (certify, check_bounds):
        with pytest.raises(ConfigurationError, match="no bounds are known"):
            use(guard, GREY, ZEROS, eps=0.01)
    with pytest.raises(ConfigurationError, match="no bounds are known"):
        certified_radius(guard, GREY, ZEROS, largest=0.1)


@pytest.mark.parametrize("asking", [by_attribute, by_comparison])
def test_a_network_that_finds_out_by_an_error_is_refused(asking):
    guard = guard_of(Network(lambda values: inverted_where_striped(values.flatten(1)) if asking(values) else values))
    with pytest.raises(ConfigurationError, match="no bounds are known"):
        certify(guard, GREY, ZEROS, eps=0.01)


def test_the_message_names_the_first_step_that_differs():
    def function(values):
        values = values.flatten(1)
        return values.sin().asin() if isinstance(values, torch.Tensor) else values

    with pytest.raises(ConfigurationError, match="sin"):
        certify(guard_of(Network(function)), GREY, ZEROS, eps=0.0)


class Everything(nn.Module):
    """Uses whatever has bounds, as methods, operators, functions and modules."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            *(nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.GELU(), nn.Dropout(), nn.PReLU(), nn.Softplus(), nn.Hardswish()),
        )
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.compiled = torch.compile(lambda values: functional.relu6(values), backend="eager")
        self.last = None

    def forward(self, images):
        values = self.body(images)
        assert values.ndim == 4
        assert isinstance(values, list) is False  # a harmless question
        rest = functional.dropout(values, 0.5, self.training)
        values = values.clone() + rest * 0.5 + 1 - (2 - values) / 3 + torch.ones(1, 4, 1, 1) - values
        values += 1
        values = torch.cat([values, -values, torch.zeros(values.shape[0], 4, 4, 4)], 1).relu_()
        values = torch.stack([values, values.sigmoid()]).mean(0)
        pooled = functional.adaptive_avg_pool2d(values, 1).view(values.size(0), -1)
        self.last = values = functional.pad(pooled, (0, 64 - pooled.shape[1]))
        return self.compiled(self.normed(values.to(torch.float32).contiguous()))


def test_a_network_that_takes_the_same_steps_for_both_keeps_its_certificates():
    torch.manual_seed(0)
    guard = guard_of(Everything())
    batch = torch.rand(5, 1, 8, 8)
    proved = certify(guard, batch, guard.detect(batch).labels, eps=0.0)
    assert proved.is_secure.shape == (5,)
    check_bounds(guard, batch, ZEROS[:5], eps=0.01)


def test_a_copy_that_only_a_tensor_gets_is_no_other_step():
    def copied(values):
        return values.flatten(1).clone() if isinstance(values, torch.Tensor) else values.flatten(1)

    assert certify(guard_of(Network(copied)), GREY, ZEROS, eps=0.01).is_secure.all()
