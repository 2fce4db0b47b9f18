"""Bounds hold for every image in the ball; what is certified no attack breaks."""

import copy
import math

import clusterguard
import pytest
import torch
from clusterguard import (
    APGD,
    Calibrator,
    CertifiedTrainer,
    ClusterGuard,
    certified_radius,
    certified_success_rate,
    certify,
)
from clusterguard.certification import bound
from clusterguard.certified_training import initialise
from clusterguard.decision import decide, success_margin
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError
from clusterguard.intervals import Interval
from clusterguard.samples import load_digits
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SHAPE = 2, 6, 6
CALIBRATION = DataLoader(load_digits("calibration"), batch_size=500)
TEST = load_digits("test")


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


def points_of(box, count=200):
    """Vertices and inner points."""
    shares = torch.rand(count, *box.lower.shape[1:], dtype=torch.float64)
    shares[: count // 2] = shares[: count // 2].round()
    return torch.lerp(box.lower, box.upper, shares)


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


def guard_of(seed=0, block=1, dtype=torch.float64):
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3 * block))
    guard = ClusterGuard(body, 3, representation_dim=3 * block, center_scale=1.0, example=torch.rand(1, 1, 2, 2))
    guard.thresholds = torch.tensor([0.4, 0.6, 0.8])
    return guard.to(dtype).eval()


@given(seed=st.integers(0, 10_000), eps=st.floats(0, 0.5), block=st.sampled_from([1, 2]))
def test_distances_stay_within_their_bounds(seed, eps, block):
    guard = guard_of(seed, block)
    image, label = torch.rand(1, 1, 2, 2, dtype=torch.float64), torch.tensor([seed % 3])
    found = bound(guard, image, label, eps=eps)
    seen = guard.distances(points_of(Interval.around(image, eps)))
    squared = seen.square()
    assert (found.nearest - 1e-6 <= seen).all()
    assert (found.leads - 1e-6 <= squared - squared[:, label]).all()
    assert (seen[:, label] <= found.farthest + 1e-6).all()


@given(seed=st.integers(0, 10_000), eps=st.floats(0, 0.3))
def test_what_is_certified_holds_all_over_the_ball(seed, eps):
    guard = guard_of(seed, dtype=torch.float32)
    image, label = torch.rand(1, 1, 2, 2), torch.tensor([seed % 3])
    proved = certify(guard, image, label, eps=eps)
    evidence = guard.evidence(points_of(Interval.around(image.double(), eps)).float())
    verdicts, labels = decide(evidence, guard.thresholds), label.expand(200)
    if proved.is_secure:
        assert (success_margin(evidence, guard.thresholds, labels) > 0).all()
    if proved.is_kept:
        assert ((verdicts.labels == label) & ~verdicts.is_adversarial).all()


@given(seed=st.integers(0, 10_000))
def test_without_a_radius_the_certificate_is_the_decision(seed):
    guard = guard_of(seed, dtype=torch.float32)
    images, labels = torch.rand(20, 1, 2, 2), torch.arange(20) % 3
    proved, evidence = certify(guard, images, labels, eps=0.0), guard.evidence(images)
    margins, verdict = success_margin(evidence, guard.thresholds, labels), decide(evidence, guard.thresholds)
    assert (margins > 0)[proved.is_secure].all()
    assert proved.is_secure[(margins > 1e-2) & (verdict.labels == labels)].all()
    assert not (proved.is_kept & ((verdict.labels != labels) | verdict.is_adversarial)).any()


@given(seed=st.integers(0, 10_000), largest=st.sampled_from([0.05, 1.0]))
def test_the_certified_radius_is_where_certificates_end(seed, largest):
    guard = guard_of(seed, dtype=torch.float32)
    images = torch.rand(10, 1, 2, 2)
    labels = guard.detect(images).labels
    radius = certified_radius(guard, images, labels, largest=largest, precision=1e-4)
    proved = radius > 0
    assert certify(guard, images, labels, eps=radius).is_secure[proved].all()
    ends = proved & (radius < largest)
    assert not certify(guard, images, labels, eps=radius + 2e-4).is_secure[ends].any()
    assert ((radius >= 0) & (radius <= largest)).all()


def test_what_was_changed_in_place_has_lost_its_linear_layer():
    layer, box = nn.Linear(2, 2), Interval(-torch.ones(1, 2), torch.ones(1, 2))
    found = layer(box)
    nn.functional.relu(found, inplace=True)
    assert (found.lowest(torch.eye(2)[None]) >= 0).all()


def test_a_search_finer_than_floats_ends():
    guard = guard_of(dtype=torch.float32)
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    fine, coarse = (certified_radius(guard, images, labels, precision=precision) for precision in (1e-300, 1e-6))
    torch.testing.assert_close(fine, coarse, rtol=0, atol=1e-6)


class Summed(nn.Module):
    def forward(self, images):
        return images.flatten(1) / images.sum()


def test_a_network_that_does_what_intervals_cannot_is_refused():
    guard = ClusterGuard(Summed(), 2, example=torch.rand(1, 1, 2, 2))
    guard.thresholds = torch.ones(2)
    with pytest.raises(ConfigurationError, match="no 'sum'"):
        certify(guard.eval(), torch.rand(1, 1, 2, 2), torch.tensor([0]), eps=0.1)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(InputError, match="empty"):
        certified_success_rate(guard_of(dtype=torch.float32), [], eps=0.1)


def test_bounds_that_overflow_prove_nothing():
    guard = guard_of(dtype=torch.float32).double()
    with torch.no_grad():
        for weight in guard.encoder.parameters():
            weight.fill_(1e200)
    proved = certify(guard, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), eps=1.0)
    assert not (proved.is_secure | proved.is_kept).any()


def test_certifying_leaves_the_guard_as_it_was():
    guard = guard_of(dtype=torch.float32).train()
    guard.encoder[0].eval()
    modes, before = [module.training for module in guard.modules()], copy.deepcopy(guard.encoder.state_dict())
    certify(guard, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), eps=0.1)
    assert [module.training for module in guard.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in guard.encoder.state_dict().items())
    assert all(weight.grad is None and weight.dtype == torch.float32 for weight in guard.parameters())


@pytest.mark.parametrize("eps", [-0.1, math.nan, torch.tensor([0.1, 0.1, 0.1])])
def test_a_radius_that_means_nothing_is_refused(eps):
    with pytest.raises(InputError, match="radius"):
        certify(guard_of(dtype=torch.float32), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), eps=eps)


def test_without_thresholds_there_is_nothing_to_prove():
    guard = guard_of(dtype=torch.float32)
    guard.reset_calibration()
    with pytest.raises(NotCalibratedError):
        certify(guard, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), eps=0.1)
    with pytest.raises(NotCalibratedError):
        certified_radius(guard, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize("options", [{"largest": 0.0}, {"precision": -1.0}, {"largest": math.inf}])
def test_a_search_without_end_is_refused(options):
    with pytest.raises(ConfigurationError, match="positive"):
        certified_radius(guard_of(dtype=torch.float32), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), **options)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU(), nn.Flatten())
    guard = ClusterGuard(body, 10, example=torch.rand(1, 1, 28, 28))
    loader = DataLoader(load_digits("train"), batch_size=50, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(guard.parameters(), 4e-3)
    trainer = CertifiedTrainer(guard, eps=0.1, optimizer=optimizer, ramp_epochs=3, calibrator=Calibrator(scarce="pool"))
    trainer.fit(loader, CALIBRATION, epochs=7, progress=False)
    return guard.eval()


def test_a_certified_guard_keeps_what_it_promises(trained):
    images, labels = (part[:300] for part in TEST.tensors)
    verdict = trained.detect(images)
    good = (verdict.labels == labels) & ~verdict.is_adversarial
    proved = certify(trained, images, labels, eps=0.1)
    assert good.float().mean() > 0.85
    assert (proved.is_secure & good).sum() > 0.6 * good.sum()
    attack = APGD(norm="linf", eps=0.1, steps=20, start="random")
    attacked = attack(trained, images, labels, generator=torch.Generator().manual_seed(0))
    evidence = trained.evidence(attacked)
    assert not (success_margin(evidence, trained.thresholds, labels)[proved.is_secure] <= 0).any()
    after = decide(evidence, trained.thresholds)
    assert not (after.is_adversarial | (after.labels != labels))[proved.is_kept].any()


def test_the_certified_rate_is_above_what_an_attack_finds_and_grows_with_the_radius(trained):
    batches = [tuple(part[:200] for part in TEST.tensors), tuple(part[200:300] for part in TEST.tensors)]
    rates = [certified_success_rate(trained, batches, eps=eps) for eps in (0.0, 0.05, 0.1, 0.3)]
    assert rates[0].count == 0
    assert [rate.count for rate in rates] == sorted(rate.count for rate in rates)
    assert len({rate.total for rate in rates}) == 1
    found = clusterguard.evaluate(trained, APGD(norm="linf", eps=0.1, steps=10), batches, sanity_images=0)
    assert found.results[0].success.count <= rates[2].count
    assert found.results[0].success.total == rates[2].total


def test_initial_weights_keep_the_width_of_intervals_and_leave_other_layers_alone():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 50, 3),
        nn.BatchNorm2d(50),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 400),
        nn.ReLU(),
        nn.Linear(400, 9),
    ]
    model = nn.Sequential(*layers).eval()
    statistics = copy.deepcopy(model[1].state_dict())
    initialise(model)
    assert all(torch.equal(statistics[name], value) for name, value in model[1].state_dict().items())
    assert not any(layer.bias.any() for layer in (model[0], model[4], model[6]))
    box = Interval(*(torch.full((4, *SHAPE), end) for end in (0.4, 0.6)))
    widths = [(found.upper - found.lower).mean().item() for found in (model[:3](box), model[:6](box))]
    assert all(0.1 < width < 0.4 for width in widths)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    drawn = [initialise(model, generator=generator) or model[4].weight.clone() for generator in generators]
    assert torch.equal(*drawn)


def test_without_bounds_the_loss_is_that_of_benign_images_and_with_them_that_of_the_worst(monkeypatch):
    guard = guard_of(dtype=torch.float32).train()
    images, labels = torch.rand(6, 1, 2, 2), torch.arange(6) % 3
    options = {"eps": 0.2, "center_weight": 0.5, "temperature": 2.0, "ramp_epochs": 2, "bound_weight": 0.4}
    trainer = CertifiedTrainer(guard, warmup_epochs=1, **options)
    distances = guard.distances(images).square()
    own = distances.gather(1, labels[:, None]).mean() / 2
    benign = nn.functional.cross_entropy(-distances / 4, labels) + 0.5 * own
    monkeypatch.setattr(type(trainer), "epochs_done", 0.5)
    torch.testing.assert_close(trainer.training_step(images, labels, None).loss, benign)
    monkeypatch.setattr(type(trainer), "epochs_done", 2.0)  # half the radius, half the weight
    worst = bound(guard, images, labels, eps=0.1).leads
    expected = 0.8 * benign + 0.2 * nn.functional.cross_entropy(-worst / 4, labels)
    step = trainer.training_step(images, labels, None)
    torch.testing.assert_close(step.loss, expected)
    assert step.successes == ((worst < 0).sum(dim=1) > 0).sum()
    assert all(module.training for module in guard.modules())


@pytest.mark.parametrize(
    "option",
    [
        {"eps": 0.0},
        {"eps": 1.5},
        {"bound_weight": 0.0},
        {"warmup_epochs": -1},
        {"ramp_epochs": math.inf},
        {"center_weight": -1.0},
        {"temperature": 0.0},
    ],
)
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ConfigurationError, match=next(iter(option))):
        CertifiedTrainer(guard_of(), **{"eps": 0.1, **option})


def test_a_network_without_bounds_is_refused_at_the_first_step_and_not_half_trained():
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.LayerNorm(4)), 2, example=torch.rand(1, 1, 2, 2))
    before = copy.deepcopy(guard.encoder.state_dict())
    loader = DataLoader(TensorDataset(torch.rand(8, 1, 2, 2), torch.arange(8) % 2), batch_size=4)
    with pytest.raises(ConfigurationError, match="layer_norm"):
        CertifiedTrainer(guard, eps=0.1, warmup_epochs=5).fit(loader, loader, epochs=6, calibrate=False, progress=False)
    assert all(torch.equal(before[name], value) for name, value in guard.encoder.state_dict().items())
