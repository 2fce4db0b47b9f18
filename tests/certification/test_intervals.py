"""Bounds hold everything that a box of images becomes."""

import copy
import math
import pickle

import numpy
import pytest
import torch
from certifiable import points_of
from clusterguard.certification import Interval
from clusterguard.detection import Arithmetic
from clusterguard.errors import ConfigurationError
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

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
        (nn.CELU(-1.0), "celu with alpha below 1e-06"),
        (nn.ELU(1e39), "elu with alpha below 0 or of at least 1e30"),
        (nn.ReflectionPad2d(1), "pad with such arguments: mode is 'reflect'"),
        (nn.ConstantPad2d(1, -math.inf), "pad with such arguments: mode is 'constant' and value is -inf"),
    ],
)
def test_a_layer_without_bounds_is_named(layer, named):
    with pytest.raises(ConfigurationError, match=named):
        layer(Interval.around(torch.rand(1, *SHAPE), 0.1))


def test_an_attribute_without_bounds_is_named():
    with pytest.raises(ConfigurationError, match="fft"):
        Interval.around(torch.rand(1, *SHAPE), 0.1).fft  # noqa: B018


def test_what_was_changed_in_place_has_lost_its_linear_layer():
    layer, box = nn.Linear(2, 2), Interval(-torch.ones(1, 2), torch.ones(1, 2))
    found = layer(box)
    nn.functional.relu(found, inplace=True)
    assert (found.lowest(torch.eye(2)[None]) >= 0).all()


def box(*shape):
    center = torch.rand(2, *(shape or (4,)), dtype=torch.float64)
    return Interval(center - 0.1, center + 0.1)


def of_python(name):
    def apply(h):
        scope = {"h": h, "t": torch.ones(4, dtype=torch.float64), "copy": copy, "numpy": numpy, "pickle": pickle}
        exec(name, scope)

    return apply


SIGNS = ("==", "!=", "<", "<=", ">", ">=", "@", "**", "//", "%", "&", "|", "^", "<<", ">>")
PHRASES = """2.0 / h; t / h; h / h; h / 0; h / (0 * t); h + 1j; h * 'a'; h + None; divmod(h, 2); abs(h); +h; ~h
bool(h); not h; h and 1; 1 if h else 2; len(h); list(h); next(h); a, b = h; 1.0 in h; h in [t]; reversed(h)
h[0]; h[:, 1:]; h[0] = 1; del h[0]; int(h); float(h); complex(h); range(h); round(h); hash(h); {h: 1}; {h}
h.data; h.T; h.grad; h.sum(); h.item(); h.numel(); h.numpy(); h.abs(); h.add_(1); hasattr(h, 'max'); h.half()
h.data = t; h.lower = t; h.more = 1; del h.lower; h.long(); h.int(); h.type_as(t); h.to(h); numpy.asarray(h)
copy.copy(h); copy.deepcopy(h); pickle.dumps(h)"""
PYTHON = [
    *(f"h {sign}= 2" for sign in SIGNS[6:]),
    *(f"t {sign}= h" for sign in "+-*/"),
    *(f"{pair[0]} {sign} {pair[-1]}" for sign in SIGNS for pair in ("hh", "ht", "h0", "th", "2h")),
    *(phrase for line in PHRASES.splitlines() for phrase in line.split("; ")),
]
TORCH = {
    "view as another type": lambda h: h.view(torch.int64),
    "to integers": lambda h: h.to(torch.int),
    "to bool": lambda h: h.to(dtype=torch.bool),
    "to half": lambda h: h.to(torch.float16),
    "to float32": lambda h: h.float(),
    "to complex": lambda h: h.to(torch.complex128),
    "mean in half": lambda h: h.mean(1, dtype=torch.float16),
    "clamp by a tensor": lambda h: h.clamp(torch.zeros(4)),
    "clamp by itself": lambda h: h.clamp(min=h),
    "clamp out of order": lambda h: h.clamp(1, 0),
    "clamp by nan": lambda h: h.clamp(math.nan, 1),
    "hardtanh out of order": lambda h: functional.hardtanh(h, 1.0, -1.0),
    "scaled addition": lambda h: torch.add(h, h, alpha=2),
    "addition into": lambda h: torch.add(h, h, out=torch.zeros(2, 4)),
    "sigmoid into": lambda h: torch.sigmoid(h, out=torch.zeros(2, 4)),
    "clamp into": lambda h: torch.clamp(h, 0, 1, out=torch.zeros(2, 4)),
    "copied into a tensor": lambda h: torch.zeros(2, 4).copy_(h),
    "written into a tensor": lambda h: torch.zeros(2, 4).__setitem__(0, h),
    "tensor of it": torch.tensor,
    "like it": torch.zeros_like,
    "shaped like it": lambda h: torch.zeros(8).view_as(h),
    "where": lambda h: torch.where(torch.ones(4).bool(), h, 0.0),
    "power": lambda h: torch.pow(h, 2),
    "maximum": lambda h: torch.maximum(h, torch.zeros(4)),
    "norm": torch.norm,
    "weights of the image": lambda h: functional.linear(torch.ones(2, 4).double(), h),
    "slopes of the image": lambda h: functional.prelu(torch.ones(2, 4).double(), h),
    "slopes of another type": lambda h: functional.prelu(h, torch.ones(1)),
    "padded by a tensor": lambda h: functional.pad(h, (1, 1), value=torch.ones(())),
    "bias of the image": lambda h: functional.linear(h, torch.ones(4, 4).double(), h),
    "softplus of a low threshold": lambda h: functional.softplus(h, threshold=1.0),
    "falling softplus": lambda h: functional.softplus(h, beta=-1.0),
    "falling leaky relu": lambda h: functional.leaky_relu(h, -0.1),
    "leaky relu without slope": lambda h: functional.leaky_relu(h, math.nan),
    "falling elu": lambda h: functional.elu(h, -1.0),
    "random relu": lambda h: functional.rrelu(h, training=True),
    "celu": lambda h: functional.celu(h, -1.0),
    "gelu of another kind": lambda h: functional.gelu(h, approximate="other"),
    "threshold": lambda h: functional.threshold(h, 0.1, 5.0),
    "changed beyond its shape": lambda h: h.mean(1, keepdim=True).__iadd__(h),
    "in place of a new type": lambda h: Interval(h.lower.float(), h.upper.float()).__iadd__(h),
    "softmax in place of a rule": lambda h: h.softmax(1),
}
MAPS = {
    "falling average": lambda h: functional.avg_pool2d(h, 2, divisor_override=-4),
    "falling average by position": lambda h: functional.avg_pool2d(h, 2, None, 0, False, True, -4),
    "where the largest lies": lambda h: functional.max_pool2d(h, 2, return_indices=True),
    "where the largest lies, adaptively": lambda h: functional.adaptive_max_pool2d(h, 2, return_indices=True),
    "padded by reflection": nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect").double(),
    "statistics of the batch": nn.BatchNorm2d(2, track_running_stats=False).double().eval(),
    "normalisation by the image": lambda h: functional.batch_norm(h, torch.zeros(2), torch.ones(2), h),
}


@pytest.mark.parametrize("code", PYTHON)
def test_whatever_python_does_without_a_rule_is_refused(code):
    with pytest.raises(ConfigurationError, match="no bounds are known"):
        of_python(code)(box())


@pytest.mark.parametrize("name", TORCH)
def test_whatever_torch_does_without_a_rule_is_refused(name):
    with pytest.raises((ConfigurationError, RuntimeError)) as raised:
        TORCH[name](box())
    assert raised.type is ConfigurationError or name == "tensor of it"


@pytest.mark.parametrize("name", MAPS)
def test_options_of_layers_without_bounds_are_refused(name):
    with pytest.raises(ConfigurationError, match="no bounds are known"):
        MAPS[name](box(*SHAPE))


def test_a_change_reaches_an_interval_under_all_its_names():
    h = box()
    alias, dropped = nn.Identity()(h), nn.Dropout().eval()(h)
    alias -= 3.0
    alias /= 2.0
    assert h is alias
    assert (dropped.lower <= h.lower).all()
    assert (dropped.upper >= h.upper).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda h: h.flatten(1),
        lambda h: torch.flatten(h, 1),
        lambda h: h.view(len(h.lower), -1),
        lambda h: h.reshape(2, -1),
        lambda h: h.transpose(1, 3),
        lambda h: torch.permute(h, (3, 0, 2, 1)),
        lambda h: h.contiguous(),
        lambda h: h.to(h.dtype),
        lambda h: h.unsqueeze(0).squeeze(0).detach(),
    ],
)
@pytest.mark.parametrize("is_through_view", [True, False])
def test_a_change_through_a_view_is_held_by_what_it_is_a_view_of_and_the_other_way_round(view, is_through_view):
    values = torch.rand(2, *SHAPE, dtype=torch.float64)
    h, real = Interval(values - 0.1, values + 0.1), values.clone()
    of_box, of_real = view(h), view(Real(real)).value
    changed, real_changed = (of_box, of_real) if is_through_view else (h, real)
    changed *= -2.0
    real_changed *= -2.0
    for bounds, exact in ((h, real), (of_box, of_real)):
        assert ((bounds.lower <= exact) & (exact <= bounds.upper)).all()
    torch.testing.assert_close(changed.center, real_changed)


class Real:
    """A tensor in an interval's clothes, so that one view is written once."""

    def __init__(self, value):
        self.value = self.lower = value
        self.dtype = value.dtype

    def __getattr__(self, name):
        return lambda *args: Real(getattr(self.value, name)(*args))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return Real(function(args[0].value, *args[1:], **(kwargs or {})))


def test_a_linear_layer_is_recorded_with_its_input_and_weights_as_they_were():
    layer, h = nn.Linear(4, 3).double(), box()
    with torch.no_grad():
        found, directions = layer(h), torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
        before = found.lowest(directions)
        h *= 100.0
        layer.weight.zero_()
    torch.testing.assert_close(found.lowest(directions), before)
    assert before.any()


@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([20.0, 25.0]))
def test_a_softplus_holds_where_its_formula_changes(seed, threshold):
    torch.manual_seed(seed)
    ends = threshold / 3 + torch.randn(100, 2, dtype=torch.float64).sort(dim=1).values * 10.0 ** -(seed % 12)
    found = functional.softplus(Interval(ends[:, 0], ends[:, 1]), 3.0, threshold)
    seen = functional.softplus(torch.lerp(ends[:, :1], ends[:, 1:], torch.rand(100, 50).double()), 3.0, threshold)
    assert ((found.lower[:, None] <= seen) & (seen <= found.upper[:, None])).all()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_bottom_of_a_gelu_is_held(approximate):
    found = functional.gelu(Interval(torch.tensor([-2.0]).double(), torch.zeros(1).double()), approximate=approximate)
    seen = functional.gelu(torch.linspace(-1, 0, 100_001, dtype=torch.float64), approximate=approximate)
    assert found.lower <= seen.min()


@pytest.mark.parametrize("layer", [nn.PReLU(init=-0.5), nn.PReLU(4), nn.SELU(), nn.CELU(0.5), nn.LogSigmoid()])
def test_bounds_of_one_activation_are_reached(layer):
    ends = torch.tensor([[[-3.0] * 4], [[2.0] * 4]], dtype=torch.float64)
    found = layer.double()(Interval(ends[0], ends[1]))
    seen = layer(torch.linspace(-3, 2, 501, dtype=torch.float64)[:, None].expand(-1, 4))  # 0 and both ends are in it
    torch.testing.assert_close(found.lower[0], seen.amin(dim=0))
    torch.testing.assert_close(found.upper[0], seen.amax(dim=0))


def test_following_rounding_ends_under_autocast_and_with_other_types():
    layer, arithmetic = nn.Linear(4, 3), Arithmetic.of(torch.float32)
    ends = torch.arange(2)[:, None, None].expand(2, 1, 4).double()
    h = Interval(ends[0], ends[1], error=ends[0], arithmetic=arithmetic)
    assert h.dtype == torch.float32
    with pytest.raises(ConfigurationError, match="autocast"), torch.autocast("cpu"):
        layer(h)
    for wrong in (lambda: layer.double()(h), lambda: h + torch.ones(4).double(), lambda: h.double(), lambda: h.half()):
        with pytest.raises(ConfigurationError):
            wrong()


def test_where_float32_overflows_nothing_is_known():
    arithmetic, start = Arithmetic.of(torch.float32), torch.full((1, 1), 1e20, dtype=torch.float64)
    h = Interval(start, start, error=torch.zeros_like(start), arithmetic=arithmetic)
    assert (h * 1e10).error < 1e24
    for found in (h * h, h * 1e20, h / 1e-25, torch.relu(h * h), (h * h).flatten(0) + 1.0):
        assert found.error.isinf().all()
    assert (functional.relu6(h * h).error >= 6).all()  # all that it can be
