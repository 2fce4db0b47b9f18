"""A network that computes something else for a tensor than for an interval gets no certificate, wherever that shows."""

import copy
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType

import pytest
import torch
from clusterguard import ClusterGuard, certify
from clusterguard.certification import Interval, certified_radius
from clusterguard.certification._internal import check_bounds
from clusterguard.errors import ConfigurationError
from torch import nn
from torch._dynamo.testing import CompileCounter
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


SIGNS = torch.tensor([[1.0, -1.0]]).repeat(1, 32)


def bump(features):
    """(B, 1), which is 0 unless an image is striped."""
    return functional.relu(functional.linear(features, SIGNS) - 0.5)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SCRIPTED_BUMP = torch.jit.trace(bump, GREY.flatten(1), check_trace=False)
    SCRIPTED_CHANGE = torch.jit.trace(
        lambda features: features.sub_(bump(features)), GREY.flatten(1), check_trace=False
    )
SHIFT = torch.tensor(2.0)


def is_tensor(values):
    return isinstance(values, torch.Tensor)


def another_argument(features):
    values = bump(features)
    nothing = values * 0.0
    return features - (values if is_tensor(features) else nothing)


def another_output(features):
    outputs = features - bump(features), features - bump(features) * 0.0
    return outputs[0 if is_tensor(features) else 1]


def a_copy_that_is_changed(features):
    values = bump(features)
    changed = values.clone() if is_tensor(features) else values
    changed *= 0.0
    return features - values


def a_copy_of_the_interval_alone(features):
    values = -bump(features)
    changed = (values if is_tensor(features) else values.clone()).flatten(1)
    changed *= 100.0
    return features + values


def a_change_in_place(features):
    values = -bump(features)
    values.relu() if is_tensor(features) else values.relu_()
    return features + values


def a_change_of_another(features):
    values, others = bump(features), bump(features)
    changed = others if is_tensor(features) else values
    changed *= 0.0
    return features - values


def no_change(features):
    values = bump(features)
    if is_tensor(features):
        torch.ops.aten.mul_(features * 1.0, 0.0)
    else:
        values *= 0.0
    return features - values


def scripted_code(features):
    values = SCRIPTED_BUMP(features) if is_tensor(features) else torch.zeros(features.shape[0], 1)
    return features - values


def scripted_code_in_place(features):
    values = features * 1.0
    if is_tensor(features):
        SCRIPTED_CHANGE(values)
    return values


def a_second_name(features):
    values = bump(features)
    return features - (nn.Parameter(values) if is_tensor(features) else torch.zeros(features.shape[0], 1))


def a_constant_that_is_changed(features):
    SHIFT.fill_(0.01 if is_tensor(features) else 2.0)
    return features + functional.relu(functional.relu(features - 0.58) - SHIFT)


def an_interval_of_its_own(features):
    values = bump(features)
    if not is_tensor(features):
        values = Interval(values.lower * 0, values.upper * 0, error=values.error, arithmetic=values.arithmetic)
    return features - values


def relu(values):
    if torch.overrides.has_torch_function_unary(values):
        return torch.overrides.handle_torch_function(relu, (values,), values)
    return values * 100.0


def a_function_by_a_borrowed_name(features):
    values = bump(features)
    return features - (relu(values) if is_tensor(features) else functional.relu(values))


FLOWS = [
    *(another_argument, another_output, a_copy_that_is_changed, a_copy_of_the_interval_alone, a_change_in_place),
    *(a_change_of_another, no_change, scripted_code, scripted_code_in_place, a_second_name),
    *(a_constant_that_is_changed, an_interval_of_its_own, a_function_by_a_borrowed_name),
]


@pytest.mark.parametrize("flow", FLOWS)
def test_the_same_functions_of_other_numbers_are_other_steps(flow):
    guard = guard_of(Network(lambda values: flow(values.flatten(1))))
    with pytest.raises(ConfigurationError, match="no bounds are known for this network: it takes other steps"):
        certify(guard, GREY, ZEROS, eps=0.01)


class Everything(nn.Module):
    """Uses whatever has bounds, as methods, operators, functions and modules."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            *(nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.GELU(), nn.Dropout(), nn.PReLU(), nn.Softplus(), nn.Hardswish()),
        )
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.last = None

    def forward(self, images):
        values = self.body(images)
        assert values.ndim == 4
        assert isinstance(values, list) is False  # a harmless question
        rest = functional.dropout(values, 0.5, self.training)
        changed = values.contiguous().view(values.shape)
        changed += rest.flatten(1).view(values.shape)  # of which nobody knows whether it changes the values too
        values = values + functional.dropout(changed, 0.5, False, inplace=True)
        values = values.clone() + rest * 0.5 + 1 - (2 - values) / 3 + torch.ones(1, 4, 1, 1) - values
        values += 1
        values -= values * 0.5
        values *= 3
        values /= torch.tensor(2.0)
        values = torch.cat([values, -values, torch.zeros(values.shape[0], 4, 4, 4)], 1).relu_()
        values = torch.stack([values, values.sigmoid()]).mean(0)
        pooled = functional.adaptive_avg_pool2d(values, 1).view(values.size(0), -1)
        self.last = values = functional.pad(pooled, (0, 64 - pooled.shape[1]))
        return functional.relu6(self.normed(values.to(torch.float32).contiguous()))


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


def other_while_compiling(values):
    features = values.flatten(1)
    return features - bump(features) * (100.0 if torch.compiler.is_compiling() else 0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_a_compiled_guard_is_refused_and_its_copy_is_not():
    torch._dynamo.reset()
    guard = guard_of(Network(other_while_compiling))
    guard.compile(backend="eager")
    for use in (lambda one: certify(one, GREY, ZEROS, eps=0.01), lambda one: certified_radius(one, GREY, ZEROS)):
        with pytest.raises(ConfigurationError, match=r"not compiled.*copy\.deepcopy"):
            use(guard)
        use(copy.deepcopy(guard))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("is_used_before", [True, False])
def test_a_network_with_a_compiled_part_is_refused(is_used_before):
    torch._dynamo.reset()
    part = torch.compile(other_while_compiling, backend="eager")
    guard = guard_of(Network(lambda values: part(values) if is_tensor(values) else other_while_compiling(values)))
    if is_used_before:
        guard.detect(GREY)
    with pytest.raises(ConfigurationError, match=r"a part of it is compiled \(encoder.*function\.part\)"):
        certify(guard, GREY, ZEROS, eps=0.01)


COMPILED = {"hidden": torch.compile(other_while_compiling, backend="eager")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("is_used_before", [True, False])
def test_compiled_code_that_no_search_finds_is_another_step(is_used_before):
    torch._dynamo.reset()

    def hidden(values):
        part = getattr(sys.modules[__name__], "COMP" + "ILED")["hidden"]
        return part(values) if is_tensor(values) else other_while_compiling(values)

    guard = guard_of(Network(hidden))
    if is_used_before:
        guard.detect(GREY)
    with pytest.raises(ConfigurationError, match="first at code that is compiled"):
        certify(guard, GREY, ZEROS, eps=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_another_thread_compiles_while_a_guard_is_certified():
    torch._dynamo.reset()
    counter, one_more = CompileCounter(), lambda numbers: numbers + 1
    pool = ThreadPoolExecutor(1)

    def compiling_elsewhere(values):
        function = FunctionType(one_more.__code__.replace(), globals())  # torch compiles each code object once
        assert pool.submit(torch.compile(function, backend=counter), torch.zeros(2)).result().tolist() == [1.0, 1.0]
        return values.flatten(1)

    with pool:
        certify(guard_of(Network(compiling_elsewhere)), GREY, ZEROS, eps=0.01)
    assert counter.frame_count > 1
