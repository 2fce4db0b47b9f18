"""Random programs, as people write forward passes: bounds hold what float32 computes, or the program is refused."""

import pytest
import torch
from certifiable import points_of
from clusterguard.certification import Interval
from clusterguard.detection import Arithmetic, full_precision
from clusterguard.errors import ConfigurationError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

SHAPE = 2, 4, 4


def view_as_map(values):
    return values.view(-1, *SHAPE)


def minus(values, other):
    values -= other
    return values


def plus(values, other):
    values += other
    return values


def times(values, factor):
    values *= factor
    return values


def over(values, divisor):
    values /= divisor
    return values


def relu_of_a_view(values, _):
    functional.relu(values.flatten(1), inplace=True)
    return values


def shifted_transpose(values, _):
    turned = values.transpose(2, 3)
    turned += 1.5
    return values


def reshaped_copy(values, _):  # a copy of a transpose, whatever its name says
    copy = values.permute(0, 2, 3, 1).reshape(-1, *SHAPE)
    copy *= -2.0
    return values


def shifted_original(values, _):
    view = view_as_map(values.contiguous().flatten(1))
    values -= 0.7
    return view


def cloned(values, _):
    copy = values.clone()
    functional.relu(values, inplace=True)
    return copy


def padded(values, border):
    return functional.max_pool2d(nn.ConstantPad2d((1, 0, 2, 1), border)(values), (4, 2), 1)


STEPS = {
    "prelu": lambda values, layers: layers["prelu"](values),
    "selu": lambda values, _: functional.selu(values),
    "celu in place": lambda values, _: functional.celu(values, 0.3, inplace=True),
    "log sigmoid": lambda values, _: functional.logsigmoid(values),
    "padded": lambda values, _: padded(values, 0.1),
    "padded with zeros": lambda values, _: functional.avg_pool2d(nn.ZeroPad2d(1)(values), 3, 1),
    "cropped and padded": lambda values, _: functional.pad(values, (-1, 1), value=-3.3),
    "unflattened": lambda values, _: plus(nn.Unflatten(1, SHAPE)(values.flatten(1)), 0.1),
    "convolution": lambda values, layers: layers["convolution"](values),
    "normalisation": lambda values, layers: layers["normalisation"](values),
    "linear": lambda values, layers: view_as_map(layers["linear"](values.flatten(1))),
    "relu": lambda values, _: torch.relu(values),
    "relu in place": lambda values, _: functional.relu(values, inplace=True),
    "relu of a view": relu_of_a_view,
    "leaky relu in place": lambda values, _: functional.leaky_relu(values, 0.3, inplace=True),
    "relu6": lambda values, _: functional.relu6(values),
    "clamp": lambda values, _: values.clamp(-0.3, 1.1),
    "sigmoid": lambda values, _: torch.sigmoid(values),
    "softplus": lambda values, _: functional.softplus(values, beta=3.0),
    "gelu": lambda values, _: functional.gelu(values, approximate="tanh"),
    "silu": lambda values, _: functional.silu(values),
    "elu": lambda values, _: functional.elu(values, 0.7),
    "largest": lambda values, _: functional.max_pool2d(values, 3, 1, 1),
    "mean": lambda values, _: functional.avg_pool2d(values, 3, 1, 1),
    "gate": lambda values, _: values * functional.hardsigmoid(values.mean((2, 3), keepdim=True)),
    "less 0.1": lambda values, _: minus(values, 0.1),
    "times −1.7": lambda values, _: times(values, -1.7),
    "over 3": lambda values, _: over(values, 3.0),
    "shifted transpose": shifted_transpose,
    "reshaped copy": reshaped_copy,
    "shifted original": shifted_original,
    "cloned": cloned,
    "reversed difference": lambda values, _: 1.0 - values,
}
JOINS = {
    "sum": lambda one, other: one + other,
    "difference in place": minus,
    "sum in place": plus,
    "product": lambda one, other: one * other,
    "stacked": lambda one, other: torch.stack([one, other], dim=-1).mean(-1),
    "beside": lambda one, other: torch.cat([one, other], dim=1).mean(1, keepdim=True) + one,
}


class Program(nn.Module):
    """Two values, each changed by some steps, with joins; the last layer is applied before the last change."""

    def __init__(self, steps, seed, scale):
        super().__init__()
        torch.manual_seed(seed)
        self.steps = steps
        layers = {"convolution": nn.Conv2d(2, 2, 3, padding=1), "linear": nn.Linear(32, 32)}
        self.layers = nn.ModuleDict({**layers, "normalisation": nn.BatchNorm2d(2), "prelu": nn.PReLU(2)})
        self.last = nn.Linear(32, 3)
        normalisation = self.layers["normalisation"]
        nn.init.normal_(normalisation.weight)
        nn.init.normal_(normalisation.bias)
        nn.init.normal_(self.layers["prelu"].weight, std=2.0)  # of either sign, and steeper than 1
        normalisation.running_mean.normal_(std=scale)
        normalisation.running_var.uniform_(0.01, 1)
        nn.init.normal_(self.layers["convolution"].bias, std=scale)

    def forward(self, images):
        values = [self.layers["convolution"](images), images * 1.0]
        for where, step in self.steps:
            if step in JOINS:
                values[where] = JOINS[step](values[where], values[1 - where])
            else:
                values[where] = STEPS[step](values[where], self.layers)
        flat = values[0].flatten(1)
        found = self.last(flat)
        functional.relu(flat, inplace=True)  # too late for what is found
        return found + 0.0 * self.last(values[1].flatten(1))


PROGRAMS = st.lists(st.tuples(st.integers(0, 1), st.sampled_from([*STEPS, *JOINS])), max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    steps=PROGRAMS,
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 3.0, 1000.0]),
    eps=st.sampled_from([0.0, 0.01, 0.2]),
)
def test_bounds_hold_what_float32_computes(steps, seed, scale, eps):
    model = Program(steps, seed, scale).eval()
    ball = Interval.around(torch.rand(2, *SHAPE, dtype=torch.float64), eps)
    arithmetic = Arithmetic.of(torch.float32)
    error = torch.full_like(ball.lower, 2 * arithmetic.unit)
    directions = torch.randn(2, 4, 3, dtype=torch.float64)
    with torch.no_grad(), full_precision():
        try:
            found = model(Interval(ball.lower, ball.upper, error=error, arithmetic=arithmetic))
        except ConfigurationError:
            return
        points = torch.stack([points_of(Interval(ball.lower[i : i + 1], ball.upper[i : i + 1]), 60) for i in (0, 1)])
        seen = model(points.flatten(0, 1).float()).double().unflatten(0, (2, -1))
    lower, upper = (found.lower - found.error)[:, None], (found.upper + found.error)[:, None]
    assert not ((seen < lower) | (seen > upper)).any()
    along = torch.einsum("bsm,bpm->bps", directions, seen)
    assert not (along < (found.lowest(directions) - found.slack(directions))[:, None]).any()


@settings(max_examples=60, deadline=None)
@given(steps=PROGRAMS, seed=st.integers(0, 10_000))
def test_bounds_in_exact_numbers_hold_too_and_can_be_differentiated(steps, seed):
    model = Program(steps, seed, 1.0).double().eval()
    ball = Interval.around(torch.rand(1, *SHAPE, dtype=torch.float64), 0.05)
    try:
        found = model(ball)
    except ConfigurationError:
        return
    seen = model(points_of(ball, 60))
    room = 1e-9 * (1 + seen.abs().max())
    assert not ((seen < found.lower - room) | (seen > found.upper + room)).any()
    slopes = torch.autograd.grad(found.lower.sum(), model.last.weight)[0]
    assert slopes.isfinite().all()


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_bounds_so_that_programs_are_not_refused_for_nothing(step):
    model = Program([(0, step), (1, step)], 0, 1.0).double().eval()
    image = torch.rand(1, *SHAPE, dtype=torch.float64)
    found = model(Interval(image, image))
    assert ((found.lower - 1e-9 <= model(image)) & (model(image) <= found.upper + 1e-9)).all()
