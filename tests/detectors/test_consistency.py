import pytest
import torch
from clusterguard import (
    APGD,
    PGD,
    Calibrator,
    ClusterGuard,
    DetectorModule,
    Evidence,
    WorstCaseSuite,
    decide,
    evaluate,
    success_margin,
)
from clusterguard.attacks import Cost, Metered, MultiTarget, Square
from clusterguard.deployment import export_program
from clusterguard.detectors import ConsistentDetector, WithThresholds
from clusterguard.errors import ConfigurationError, InputError
from conftest import LinearDetector
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


class Spy(nn.Module):
    """A guard that remembers what it was asked."""

    def __init__(self, guard):
        super().__init__()
        self.guard, self.thresholds, self.seen = guard, guard.thresholds, []

    def evidence(self, images):
        self.seen.append(images.detach().clone())
        return self.guard.evidence(images)


@pytest.fixture
def images():
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def trained(blobs):
    """A guard of three bands of light, and its calibrated consistent version."""
    torch.manual_seed(0)
    guard = ClusterGuard(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()), 3)
    optimizer = torch.optim.Adam(guard.parameters(), lr=5e-3)
    for _ in range(15):
        for batch, labels in blobs:
            optimizer.zero_grad()
            guard.head.squared_distances(guard.represent(batch)).gather(1, labels[:, None]).mean().backward()
            optimizer.step()
    optimizer.zero_grad()
    consistent = ConsistentDetector(guard.eval().requires_grad_(False), radius=0.03, steps=2)
    Calibrator(0.05).fit(guard, blobs)
    Calibrator(0.05).fit(consistent, blobs)
    return consistent


@given(st.integers(0, 99), st.sampled_from([0.01, 0.1]), st.sampled_from([1, 2, 5]))
def test_of_a_linear_detector_the_worst_neighbour_is_a_corner_of_the_ball(seed, radius, steps):
    generator = torch.Generator().manual_seed(seed)
    linear = LinearDetector(torch.randn(1, 4, 4, generator=generator))
    images = 0.2 + 0.6 * torch.rand(5, 1, 4, 4, generator=generator)  # the box is out of reach
    consistent, plain = ConsistentDetector(linear, radius=radius, steps=steps).evidence(images), linear.evidence(images)
    label = plain.class_scores.argmax(dim=1, keepdim=True)
    rise = radius * linear.weight.abs().sum()
    torch.testing.assert_close(consistent.suspicion.gather(1, label), plain.suspicion.gather(1, label) + rise)
    other = 1 - label  # which has nothing to fear from being further from this label
    torch.testing.assert_close(consistent.suspicion.gather(1, other), plain.suspicion.gather(1, other))
    assert torch.equal(consistent.class_scores, plain.class_scores)


@pytest.mark.parametrize("radius", [0.02, 0.5, 2.0])
def test_neighbours_stay_in_ball_and_box(small_guard, images, radius):
    spy = Spy(small_guard)
    ConsistentDetector(spy, radius=radius, steps=4).evidence(images)
    assert len(spy.seen) == 6
    for neighbours in spy.seen:
        assert (neighbours - images).abs().max() <= radius + 1e-6
        assert neighbours.min() >= 0
        assert neighbours.max() <= 1 + 1e-6
    assert not torch.equal(spy.seen[-1], images)


def test_it_is_never_less_suspicious_and_never_labels_otherwise(small_guard, images):
    plain = small_guard.evidence(images)
    for steps in (1, 3, 8):
        consistent = ConsistentDetector(small_guard, radius=0.1, steps=steps).evidence(images)
        assert (consistent.suspicion >= plain.suspicion).all()
        assert torch.equal(consistent.class_scores, plain.class_scores)
        label = plain.class_scores.argmax(dim=1, keepdim=True)
        assert (consistent.suspicion > plain.suspicion).gather(1, label).all()


def test_margins_and_decisions_agree(trained, images):
    for factor in (0.5, 1.0, 2.0):
        thresholds = factor * trained.thresholds
        evidence = trained.evidence(images)
        verdict = decide(evidence, thresholds)
        for labels in (torch.full((40,), index) for index in range(3)):
            broken = ~verdict.is_adversarial & (verdict.labels != labels)
            assert torch.equal(success_margin(evidence, thresholds, labels) <= 0, broken)


def test_what_it_says_does_not_depend_on_the_batch_or_on_autograd(trained, images):
    with torch.no_grad():
        whole = trained.evidence(images)
    alone = [trained.evidence(image[None]) for image in images]
    with torch.inference_mode():
        inside = trained.evidence(images.clone())
    for index in range(2):
        torch.testing.assert_close(torch.cat([one[index] for one in alone]), whole[index])
        assert torch.equal(inside[index], whole[index])
    assert torch.equal(trained.detect(images).distances, trained.detect(images).distances)
    assert all(weight.grad is None for weight in trained.parameters())


def test_an_image_that_is_not_finite_is_refused_and_its_neighbours_in_the_batch_are_not(trained, blobs):
    images = next(iter(blobs))[0][:6].clone()
    before = trained.detect(images)
    assert not before.is_adversarial.all()
    images[2, 0, 3, 3], images[4, 0, 0, 0] = torch.nan, torch.inf
    after = trained.detect(images)
    others = torch.tensor([0, 1, 3, 5])
    assert after.is_adversarial[[2, 4]].all()
    assert torch.equal(after.is_adversarial[others], before.is_adversarial[others])
    assert torch.equal(after.distances[others], before.distances[others])


class Steps(DetectorModule):
    """A detector that hides its gradients."""

    def evidence(self, images):
        scores = (images.flatten(1)[:, :2] * 4).round() + 0 * images.flatten(1)[:, :2]
        return Evidence(scores, -scores)


def test_without_a_way_up_the_neighbour_is_the_image(images):
    consistent, plain = ConsistentDetector(Steps(2), radius=0.2).evidence(images), Steps(2).evidence(images)
    assert torch.equal(consistent.suspicion, plain.suspicion)


def test_it_is_calibrated_like_any_other(trained, blobs):
    consistent = ConsistentDetector(trained.detector, radius=0.03, steps=2)
    assert not consistent.is_calibrated
    assert consistent.detect(next(iter(blobs))[0], check=False).is_adversarial.all()  # until then it refuses
    calibration = Calibrator(0.05).fit(consistent, blobs)
    assert 0 < calibration.realised_rate <= 0.05
    assert (consistent.thresholds > trained.detector.thresholds).all()


def test_attackers_get_the_gradient_of_the_neighbour_it_decides_by(trained, images):
    leaf = images.clone().requires_grad_()
    label = trained.evidence(images).class_scores.argmax(dim=1, keepdim=True)
    suspicion = trained.evidence(leaf).suspicion.gather(1, label)
    (gradient,) = torch.autograd.grad(suspicion.sum(), leaf)
    spy = Spy(trained.detector)
    ConsistentDetector(spy, radius=0.03, steps=2).evidence(images)
    neighbours = spy.seen[-1].requires_grad_()
    (there,) = torch.autograd.grad(trained.detector.evidence(neighbours).suspicion.gather(1, label).sum(), neighbours)
    torch.testing.assert_close(gradient, there)
    assert gradient.flatten(1).any(dim=1).all()


@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=0.7, step_size=0.05, steps=40, objective="margin"),
        APGD(norm="l2", eps=6.0, steps=40),
        MultiTarget(attack=PGD(eps=0.7, step_size=0.05, steps=40)),
        Square(eps=0.7, queries=500),
        WorstCaseSuite("linf", eps=0.7, budget="quick"),
    ],
    ids=lambda attack: type(attack).__name__,
)
def test_every_attack_works_on_it_as_it_is(trained, blobs, attack, light_suites):
    images, labels = next(iter(blobs))
    report = evaluate(trained, attack, [(images[:20], labels[:20])], sanity_images=0)
    assert report.asr > 0.3  # a small network that was never trained against attacks
    assert report.results[0].cost.forward > 0


def test_its_cost_is_counted_at_the_detector_inside(small_guard, images):
    metered = Metered(small_guard)
    consistent = ConsistentDetector(metered, radius=0.1, steps=3)
    consistent.thresholds = torch.full((3,), 14.0)
    consistent.detect(images)
    assert metered.cost == Cost(forward=40 * (3 + 2), backward=40 * 3)
    outside = Metered(consistent)  # what an attacker pays: one query is one look
    PGD(eps=0.1, step_size=0.1, steps=2, keep="last")(outside, images, torch.zeros(40).long())
    assert outside.cost == Cost(forward=80, backward=80)


def test_wrapped_again_at_other_thresholds_it_is_the_same_detector(trained, images):
    permissive = WithThresholds(trained, torch.full((3,), torch.inf))
    assert torch.equal(permissive.evidence(images).suspicion, trained.evidence(images).suspicion)
    assert trained.state_dict().keys() > {"thresholds", "detector.thresholds"}


@pytest.mark.parametrize(
    "options",
    [{"radius": 0.0}, {"radius": torch.inf}, {"radius": 0.1, "steps": 0}, {"radius": 0.1, "step_size": -1.0}],
)
def test_options_are_checked_at_once(small_guard, options):
    with pytest.raises(ConfigurationError, match="expected"):
        ConsistentDetector(small_guard, **options)


def test_what_it_cannot_search_is_named(images):
    class Opaque(Steps):
        @torch.no_grad()
        def evidence(self, images):
            return super().evidence(images)

    with pytest.raises(InputError, match="evidence"):
        ConsistentDetector(nn.Flatten(), radius=0.1)
    with pytest.raises(ConfigurationError, match="differentiable"):
        ConsistentDetector(Opaque(2), radius=0.1).evidence(images)


def test_a_graph_of_it_is_refused_with_a_reason(trained, images):
    with pytest.raises(ConfigurationError, match="export what it wraps"):
        export_program(trained, images)
