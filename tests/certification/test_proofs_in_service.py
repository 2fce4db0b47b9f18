"""What is bounded is what is used: proofs hold for the guard as it runs, its arithmetic included, or are refused."""

import math

import pytest
import torch
from clusterguard import CertifiedTrainer, ClusterGuard, Evidence, certified_success_rate, certify
from clusterguard.certification import Interval, certified_radius
from clusterguard.detectors import GaussianClusters, Normalize, WithThresholds
from clusterguard.errors import ConfigurationError, InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

LABELS = torch.tensor([0, 1, 0])


def images(count=3):
    return torch.rand(count, 1, 2, 2)


def around(body, threshold=5.0):
    guard = ClusterGuard(body, 2, example=images()).eval()
    guard.thresholds = torch.full((2,), threshold)
    return guard


class OfTensors(nn.Module):
    """Something else for a tensor than for an interval."""

    def forward(self, values):
        values = values.flatten(1)
        return values * 1.0 if isinstance(values, Interval) else values * 1.001


class Caught(nn.Module):
    """A way round a refusal."""

    def forward(self, values):
        values = values.flatten(1)
        try:
            return values + (values == 0.5) * 1.0 + torch.sort(values).values
        except ConfigurationError:
            return values


class Mixing(nn.Module):
    """Every image less the mean of its batch."""

    def forward(self, values):
        values = values.flatten(1)
        return values - values.mean(0, keepdim=True)


class Noisy(nn.Module):
    """Random in eval mode, too."""

    def forward(self, values):
        return values.flatten(1) + 0.01 * torch.rand(4)


class Constant(nn.Module):
    """No interval in, so no bounds out."""

    def forward(self, values):
        return values.flatten(1) if isinstance(values, torch.Tensor) else torch.zeros(3, 4)


class Counting(nn.Module):
    """Another function at every call."""

    calls = 0

    def forward(self, values):
        self.calls += 1
        return values.flatten(1) * float(self.calls)


USES = {
    "certify": lambda guard, *batch: certify(guard, *batch, eps=0.01),
    "without a radius": lambda guard, *batch: certify(guard, *batch, eps=0.0),
    "one image": lambda guard, values, labels: certify(guard, values[:1], labels[:1], eps=0.01),
    "radius": lambda guard, *batch: certified_radius(guard, *batch, largest=0.1),
    "rate": lambda guard, values, _: certified_success_rate(guard, [(values, guard.detect(values).labels)], eps=0.01),
    "training": lambda guard, *batch: CertifiedTrainer(guard, eps=0.1).fit(
        [batch], [batch], epochs=1, calibrate=False, progress=False
    ),
}


@pytest.mark.parametrize("body", [OfTensors, Caught, Mixing, Noisy, Constant, Counting])
@pytest.mark.parametrize("use", USES)
def test_a_network_that_treats_intervals_in_its_own_way_is_refused(body, use):
    torch.manual_seed(0)
    guard = around(body(), threshold=100.0)
    with pytest.raises(ConfigurationError, match="no bounds are known"):
        USES[use](guard, images(), LABELS)


class Changed(nn.Module):
    """Another function once `train` has told it so, whatever its flag says."""

    factor = 1.0

    def train(self, mode=True):
        self.factor = 2.0 if mode else 1.0
        return super().train(mode)

    def forward(self, values):
        return values.flatten(1) * self.factor


def test_certificates_are_of_the_mode_in_which_a_guard_detects():
    guard = around(nn.Sequential(Changed(), nn.Dropout(0.5), nn.BatchNorm1d(4)))
    batch = images()
    expected = certify(guard, batch, LABELS, eps=0.01)
    proved = certify(guard.train(), batch, LABELS, eps=0.01)
    assert all(torch.equal(*pair) for pair in zip(proved, expected, strict=True))
    assert guard.training
    assert guard.encoder[0][1].training


def test_images_of_which_something_is_proved_are_tried_out_even_among_many_others():
    class Rare(nn.Module):
        """Wrong for bright images alone."""

        def forward(self, values):
            values = values.flatten(1)
            if isinstance(values, Interval):
                return values
            return values * torch.where(values.amin(1) > 0.9, 1.1, 1.0)[:, None]

    guard = around(Rare(), threshold=15.0)
    guard.encoder[-1].load_state_dict(weighted([[4.5] * 4, [-4.5] * 4], [-9.0, 9.0]).state_dict())
    dark = torch.full((999, 1, 2, 2), 0.2)
    batch = torch.cat([dark[:500], torch.ones(1, 1, 2, 2), dark[500:]])
    with pytest.raises(ConfigurationError, match="outside the bounds"):
        certify(guard, batch, torch.zeros(1000).long(), eps=0.01)


class Hidden(nn.Module):
    """Something else for a tensor than for an interval, in one corner of the ball alone."""

    def __init__(self, spot):
        super().__init__()
        self.weight, self.spot = nn.Parameter(torch.tensor([1.0, -1.0]).repeat(8)[torch.randperm(16)][None]), spot

    def forward(self, values):
        score = functional.linear(values.flatten(1), self.weight)
        return score * torch.where(self.spot * score > 0.15, 1.5, 1.0) if isinstance(values, torch.Tensor) else score


@pytest.mark.parametrize("spot", [-1.0, 1.0])
def test_bounds_are_tried_out_where_an_attack_would_go(spot):
    torch.manual_seed(0)
    guard = ClusterGuard(Hidden(spot), 2, example=torch.rand(1, 1, 4, 4)).eval()
    guard.thresholds = torch.full((2,), 100.0)
    guard.encoder[-1].load_state_dict(weighted([[10.0], [-10.0]], [1.0, -1.0]).state_dict())
    with pytest.raises(ConfigurationError, match="outside the bounds"):
        certify(guard, torch.full((1, 1, 4, 4), 0.5), torch.tensor([0]), eps=0.01)


class Detached(nn.Module):
    def forward(self, values):
        return values.detach().flatten(1)


class WithoutBackward(nn.Module):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return 2 * values

    def forward(self, values):
        values = values.flatten(1)
        return self.Doubled.apply(values) if isinstance(values, torch.Tensor) else 2 * values


@pytest.mark.parametrize("body", [Detached, WithoutBackward, nn.Flatten])
def test_certifying_a_network_without_gradients_leaves_them_out(body):
    guard, batch = around(body()).requires_grad_(False), images()
    assert certify(guard, batch, guard.detect(batch).labels, eps=0.0).is_secure.shape == (3,)
    with torch.inference_mode():
        assert certify(around(body()), batch, LABELS, eps=0.1).is_secure.shape == (3,)


def overriding(name, function):
    return type("Overriding", (ClusterGuard,), {name: function})


SUBCLASSES = {
    "represent": lambda self, values: ClusterGuard.represent(self, values) + 1,
    "distances": lambda self, values: ClusterGuard.distances(self, values) / 2,
    "evidence": lambda self, values: Evidence(-self.distances(values), self.distances(values) / 2),
    "detect": lambda self, values, **_: ClusterGuard.detect(self, values / 2),
    "forward": lambda self, values: -ClusterGuard.forward(self, values),
}


@pytest.mark.parametrize("name", SUBCLASSES)
@pytest.mark.parametrize("is_of_the_class", [True, False])
def test_a_guard_with_a_method_of_its_own_is_refused_by_name(name, is_of_the_class):
    kind = overriding(name, SUBCLASSES[name]) if is_of_the_class else ClusterGuard
    guard = kind(nn.Flatten(), 2, example=images())
    guard.thresholds = torch.ones(2)
    if not is_of_the_class:
        object.__setattr__(guard, name, SUBCLASSES[name].__get__(guard))
    with pytest.raises(ConfigurationError, match=name):
        certify(guard.eval(), images(), LABELS, eps=0.1)


class Farther(GaussianClusters):
    def squared_distances(self, representations):
        return 4 * super().squared_distances(representations)


class Darker(Normalize):
    def forward(self, values):
        return super().forward(values) / 2


@pytest.mark.parametrize(("part", "other"), [("head", Farther(2)), ("normalize", Darker([0.0], [1.0]))])
def test_a_guard_with_another_part_is_refused(part, other):
    guard = around(nn.Flatten())
    setattr(guard, part, other)
    with pytest.raises(ConfigurationError, match=part):
        certify(guard, images(), LABELS, eps=0.1)


class Documented(GaussianClusters):
    """The paper's head by another name."""


class Renamed(Documented):
    pass


class WithScale(GaussianClusters):
    center_scale = torch.tensor(3.0)


@pytest.mark.parametrize("kind", [Documented, Renamed])
def test_a_head_by_another_name_alone_keeps_its_bounds(kind):
    guard, batch = around(nn.Flatten()), images()
    expected = certify(guard, batch, LABELS, eps=0.1)
    guard.head = kind(2)
    assert all(torch.equal(*pair) for pair in zip(certify(guard, batch, LABELS, eps=0.1), expected, strict=True))
    guard.head = WithScale.__new__(WithScale)
    guard.head.__dict__.update(kind(2).__dict__)
    with pytest.raises(ConfigurationError, match="no bounds are known for the head WithScale"):
        certify(guard, batch, LABELS, eps=0.1)


def test_hooks_on_the_normalisation_are_refused_and_those_in_the_network_followed():
    guard, batch = around(nn.Flatten(), threshold=100.0), images()
    plain = certified_radius(guard, batch, LABELS)
    with guard.normalize.register_forward_hook(lambda *_: None), pytest.raises(ConfigurationError, match="normalize"):
        certify(guard, batch, LABELS, eps=0.1)
    with guard.encoder[0].register_forward_hook(lambda module, inputs, output: 0.5 * output):
        halved = certified_radius(guard, batch, LABELS)
    assert not torch.equal(plain, halved)


def test_wrappers_and_other_detectors_are_refused():
    wrapped = WithThresholds(around(nn.Flatten()), torch.ones(2))
    with pytest.raises(ConfigurationError, match="expected a ClusterGuard, got WithThresholds"):
        certify(wrapped, images(), LABELS, eps=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_guards_in_half_precision_are_refused(dtype):
    with pytest.raises(ConfigurationError, match="float32 or float64"):
        certify(around(nn.Flatten()).to(dtype), images(), LABELS, eps=0.1)


def test_a_guard_that_mixes_data_types_is_refused():
    guard = around(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)))
    guard.encoder[0][1].half()
    with pytest.raises(ConfigurationError, match=r"float16.*float32"):
        certify(guard, images(), LABELS, eps=0.1)


def test_autocast_around_and_in_a_guard_is_refused():
    class Within(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, values):
            with torch.autocast("cpu", torch.bfloat16):
                found = self.layer(values.flatten(1))
            return found.float()

    with pytest.raises(ConfigurationError, match="autocast"), torch.autocast("cpu"):
        certify(around(nn.Flatten()), images(), LABELS, eps=0.1)
    with pytest.raises(ConfigurationError, match="autocast"):
        certify(around(Within()), images(), LABELS, eps=0.1)


def test_images_in_half_precision_are_refused():
    with pytest.raises(InputError, match="float32 or float64"):
        certify(around(nn.Flatten()), images().half(), LABELS, eps=0.1)


def test_reparametrised_weights_are_those_that_float32_makes():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    guard = around(nn.Sequential(nn.Flatten(), layer, nn.ReLU()), threshold=100.0)
    assert certify(guard, images(), guard.detect(images()).labels, eps=0.0).is_secure.shape == (3,)


def weighted(weight, bias):
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


class Cancelling(nn.Module):
    """Adds what its normalisation takes away: float32 keeps little of what the image had."""

    def __init__(self, size, variance, is_normalised):
        super().__init__()
        self.grow = weighted([[1.0, 0, 0, 0], [0, 1.0, 0, 0]], [size, 1.37 * size])
        self.shrink = (
            nn.BatchNorm1d(2)
            if is_normalised
            else weighted(
                [[variance**-0.5, 0], [0, variance**-0.5]], [-size * variance**-0.5, -1.37 * size * variance**-0.5]
            )
        )
        if is_normalised:
            self.shrink.running_mean.copy_(self.grow.bias.detach())
            self.shrink.running_var.fill_(variance)

    def forward(self, values):
        return self.shrink(self.grow(values.flatten(1)))


@settings(max_examples=60, deadline=None)
@given(
    size=st.floats(-2, 7).map(lambda power: 10**power),
    variance=st.sampled_from([1e-4, 0.01, 1.0]),
    is_normalised=st.booleans(),
    block=st.sampled_from([1, 3]),
    scale=st.sampled_from([0.01, 1.0, 10.0, 1000.0]),
    eps=st.sampled_from([0.0, 1e-6, 0.02]),
    seed=st.integers(0, 1000),
)
def test_what_float32_computes_stays_within_certificates(size, variance, is_normalised, block, scale, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    body = Cancelling(size, variance, is_normalised)
    guard = ClusterGuard(body, 2, representation_dim=2 * block, center_scale=scale, example=images())
    with torch.no_grad():
        guard.encoder[-1].weight.copy_(torch.eye(2).repeat_interleave(block, 0) * scale / 10)
        guard.encoder[-1].bias.zero_()
    guard.thresholds = torch.full((2,), 1.05 * scale * math.sqrt(block))
    guard.eval()
    batch = torch.rand(400, 1, 2, 2, generator=generator)
    batch[:, 0, 0, 1] = (batch[:, 0, 0, 0] - 2 * eps - 1e-3 * torch.rand(400, generator=generator)).clamp(0, 1)
    labels = guard.detect(batch).labels
    proved = certify(guard, batch, labels, eps=eps)
    for turn in range(10):
        noise = 2 * torch.rand(batch.shape, generator=generator) - 1
        moved = (batch + eps * (noise.sign() if turn % 2 else noise)).clamp(0, 1)
        verdict = guard.detect(moved)
        is_wrong = (verdict.labels != labels) & ~verdict.is_adversarial
        assert not (proved.is_secure & is_wrong).any()
        assert not (proved.is_kept & ((verdict.labels != labels) | verdict.is_adversarial)).any()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), width=st.sampled_from([8, 500]), gain=st.sampled_from([1.0, 30.0]))
def test_wide_networks_with_large_weights_stay_within_certificates(seed, width, gain):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width))
    guard = around(body, threshold=11.0)
    with torch.no_grad():
        for weight in guard.encoder.parameters():
            weight.mul_(gain)
    exact = around(body, threshold=11.0).double()
    exact.load_state_dict(guard.state_dict())
    batch = images(200)
    labels = guard.detect(batch).labels
    proved = certify(guard, batch, labels, eps=0.0)
    verdict = guard.detect(batch)
    assert not (proved.is_secure & (verdict.labels != labels)).any()
    assert not (proved.is_kept & verdict.is_adversarial).any()
    assert functional.one_hot(exact.detect(batch.double()).labels[proved.is_secure]).sum() == proved.is_secure.sum()


class Branching(nn.Module):
    """Turns bright images around, but only what it can tell is a tensor."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, images):
        features = images.flatten(1)
        if self.how == "isinstance" and isinstance(features, torch.Tensor):
            return features * (1 - 2.0 * (features.mean(1, keepdim=True) > 0.55))
        if self.how == "is_tensor" and torch.is_tensor(features):
            return features * (1 - 2.0 * (features.mean(1, keepdim=True) > 0.55))
        if self.how == "caught":
            try:
                features = features * (1 - 2.0 * (features.mean(1, keepdim=True) > 0.55))
            except Exception:
                return features
        if self.how == "batch size" and features.shape[0] < 3:
            return -features
        return features


@pytest.mark.parametrize("how", ["isinstance", "is_tensor", "caught", "batch size"])
def test_a_network_that_treats_tensors_otherwise_has_no_certificate(how):
    guard = ClusterGuard(Branching(how), num_classes=2, example=torch.rand(2, 1, 8, 8))
    with torch.no_grad():
        guard.encoder[-1].weight.copy_(torch.tensor([[0.3], [-0.3]]).expand(2, 64))
        guard.encoder[-1].bias.zero_()
    guard.thresholds = torch.full((2,), 14.0)
    images = torch.full((8, 1, 8, 8), 0.5)
    with pytest.raises(ConfigurationError, match="no bounds are known"):
        certify(guard, images, torch.zeros(8, dtype=torch.long), eps=0.1)


@pytest.mark.parametrize("cap", [nn.Hardtanh, nn.ReLU6, nn.Sigmoid, nn.Tanh])
def test_what_overflows_to_nan_is_not_proved_to_be_kept(cap):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False), nn.Linear(4, 2), cap())
    guard = ClusterGuard(network, num_classes=2, example=torch.rand(1, 1, 2, 2))
    first, second, last = (layer for layer in guard.encoder.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight.copy_(1e20 * torch.eye(4))
        second.weight.copy_(1e20 * torch.tensor([[1.0, 1, -1, -1]] * 2))
        second.bias.zero_()
        last.weight.fill_(0.01)
        last.bias.copy_(torch.tensor([10.0, 0.0]))
    guard.thresholds = torch.full((2,), 5.0)
    images = torch.full((3, 1, 2, 2), 0.9)
    assert guard.detect(images).is_adversarial.all()
    assert not certify(guard, images, torch.zeros(3, dtype=torch.long), eps=0.01).is_kept.any()


class InvertsBright(nn.Module):
    """Does something else with a few images, and only if they are tensors."""

    def forward(self, images):
        if isinstance(images, torch.Tensor):
            is_bright = images.flatten(1).mean(dim=1) > 0.9
            images = torch.where(is_bright[:, None, None, None], 1 - images, images)
        return images.flatten(1)


@pytest.mark.parametrize("rare", [17, 98])
def test_a_branch_on_the_type_of_the_input_is_found_on_whichever_image_takes_it(rare):
    guard, batch = around(InvertsBright(), threshold=100.0), 0.8 * torch.rand(100, 1, 2, 2)
    batch[rare] = torch.tensor([[0.99, 0.95], [0.95, 0.95]])
    labels = around(nn.Flatten(), threshold=100.0).detect(batch).labels
    batch[rare + 1], labels[rare + 1] = batch[rare], labels[rare]
    with pytest.raises(ConfigurationError, match="lie outside the bounds"):
        certify(guard, batch, labels, eps=0.001)


class CastsItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, images):
        return self.layer(images.flatten(1).to(self.layer.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_in_half_the_bits_are_judged_as_those_they_stand_for(dtype):
    guard = ClusterGuard(CastsItself(), 2, example=images(), mean=(0.4,), std=(0.3,))
    guard.thresholds = torch.full((2,), 100.0)
    batch = torch.rand(50, 1, 2, 2).to(dtype)
    assert torch.equal(guard.distances(batch), guard.distances(batch.float()))
