import math
from dataclasses import replace

import pytest
import torch
from clusterguard import ClusterGuard, Evidence, success_margin
from clusterguard.attacks import CarliniWagner
from clusterguard.errors import ConfigurationError
from torch import nn

QUICK = CarliniWagner(searches=3, steps=50)


def length(perturbation):
    return perturbation.flatten(1).norm(dim=1)


def mid_box(detector, count=30, seed=3):
    """Images away from the ends of the box, so that it does not bind, with their labels and signed activations."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.5 + 0.05 * torch.randn(count, 1, 4, 4, generator=generator).to(detector.weight.dtype)
    activation = (images.flatten(1) @ detector.weight.flatten() - detector.bias).detach()
    return images, (activation > 0).long(), activation


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("threshold", [torch.inf, 0.5])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_the_distance_is_close_to_the_closed_form_optimum(linear_detector, targeted, threshold, scale):
    """Accepted under the other label from activation 1 − threshold on: (|w·x − b| + (1 − threshold)⁺) / ‖w‖₂ away."""
    linear_detector.weight.data *= scale
    linear_detector.bias *= scale
    linear_detector.thresholds.fill_(threshold)
    images, labels, activation = mid_box(linear_detector)
    attacked = CarliniWagner(steps=100)(linear_detector, images, labels, targets=1 - labels if targeted else None)
    assert (success_margin(linear_detector.evidence(attacked), linear_detector.thresholds, labels) <= 0).all()
    needed = (activation.abs() + max(0, 1 - threshold)) / linear_detector.weight.detach().norm()
    ratio = length(attacked - images) / needed
    assert ratio.max() < 1.25
    assert ratio.min() > 1 - 1e-4


@pytest.mark.parametrize("confidence", [0.5, 2.0])
def test_confidence_buys_margin_at_the_smallest_distance(linear_detector, confidence):
    images, labels, activation = mid_box(linear_detector)
    attacked = CarliniWagner(confidence=confidence, searches=4, steps=100)(linear_detector, images, labels)
    margin = success_margin(linear_detector.evidence(attacked), linear_detector.thresholds, labels)
    assert (margin <= -confidence).all()  # the margin is the difference of the scores, twice the activation
    needed = (activation.abs() + confidence / 2) / linear_detector.weight.detach().norm()
    assert (length(attacked - images) < 1.25 * needed).all()


def test_black_and_white_pixels_move_too(linear_detector):
    """At a corner of the box each coordinate moves one way: |w·x − b| / ‖w‖₂ over those that this helps."""
    weight = linear_detector.weight.detach()
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)).round()
    activation = images.flatten(1) @ weight.flatten() - linear_detector.bias
    labels = (activation > 0).long()
    wanted = -activation.sign()[:, None, None, None] * weight
    wanted = wanted * ((wanted > 0) == (images == 0))
    shift = wanted * (activation.abs() / length(wanted).square())[:, None, None, None]
    attacked = CarliniWagner(searches=4, steps=100)(linear_detector, images, labels)
    assert (success_margin(linear_detector.evidence(attacked), linear_detector.thresholds, labels) <= 0).all()
    reachable = shift.abs().flatten(1).amax(dim=1) <= 1  # else the other end of the box binds
    assert reachable.sum() > 20
    assert (length(attacked - images) < 1.25 * length(shift))[reachable].all()


def test_with_a_budget_what_is_farther_is_the_clean_image(linear_detector):
    images, labels, _ = mid_box(linear_detector)
    anywhere = QUICK(linear_detector, images, labels)
    distance = length(anywhere - images)
    eps = distance.median().item()
    inside = replace(QUICK, eps=eps)(linear_detector, images, labels)
    near = (distance <= eps)[:, None, None, None]
    assert torch.equal(inside, torch.where(near, anywhere, images))
    assert 0 < near.sum() < len(images)


def test_without_a_success_the_clean_image_comes_back(linear_detector):
    linear_detector.thresholds.fill_(-1e6)
    images, labels, _ = mid_box(linear_detector, count=5)
    assert torch.equal(QUICK(linear_detector, images, labels), images)


def test_what_is_broken_already_stays_as_it_is(linear_detector):
    images, labels, _ = mid_box(linear_detector, count=6)
    assert torch.equal(QUICK(linear_detector, images, 1 - labels), images)


@pytest.fixture
def wide_guard():
    """A linear guard whose representation reaches every class from everywhere in the box."""
    guard = ClusterGuard(nn.Flatten(), num_classes=3, representation_dim=6, example=torch.rand(1, 1, 8, 8))
    linear = guard.encoder[1]
    directions = torch.linalg.qr(torch.randn(64, 6, generator=torch.Generator().manual_seed(5))).Q.T
    linear.weight.data.copy_(30 * directions)
    linear.bias.data.copy_(-15 * directions.sum(dim=1))  # mid-grey lies at the origin
    guard.thresholds = torch.full((3,), 8.0)
    return guard.eval()


@pytest.mark.parametrize("shift", [1, 2])
def test_it_reaches_the_target_accepted(wide_guard, shift):
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    targets = (labels + shift) % 3
    verdict = wide_guard.detect(QUICK(wide_guard, images, labels, targets=targets))
    assert torch.equal(verdict.labels, targets)
    assert not verdict.is_adversarial.any()


def test_a_wrong_label_that_is_refused_is_no_success(wide_guard):
    """Acceptance costs distance: the nearest wrong label alone is nearer than the nearest accepted one."""
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = wide_guard(images).argmax(1)
    accepted = QUICK(wide_guard, images, labels)
    assert (success_margin(wide_guard.evidence(accepted), wide_guard.thresholds, labels) <= 0).all()
    wide_guard.thresholds = torch.full((3,), torch.inf)
    mislabelled = QUICK(wide_guard, images, labels)
    assert (length(accepted - images) > length(mislabelled - images)).all()


@pytest.mark.parametrize("objective", ["suspicion", "logit", "cross_entropy"])
def test_other_objectives_push_until_success(linear_detector, objective):
    images, labels, _ = mid_box(linear_detector, count=8)
    attacked = CarliniWagner(objective=objective, searches=3, steps=60)(linear_detector, images, labels)
    assert (success_margin(linear_detector.evidence(attacked), linear_detector.thresholds, labels) <= 0).all()


class Flickering:
    """A detector that has no evidence, and NaN or infinite gradients, at every fourth call."""

    def __init__(self, detector, value):
        self.detector, self.thresholds, self.value, self.calls = detector, detector.thresholds, value, 0

    def evidence(self, images):
        self.calls += 1
        evidence = self.detector.evidence(images)
        return evidence if self.calls % 4 else Evidence(*(part * self.value for part in evidence))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_iterates_without_evidence_do_not_spoil_the_search(linear_detector, value):
    images, labels, activation = mid_box(linear_detector)
    attacked = CarliniWagner(searches=4, steps=100)(Flickering(linear_detector, value), images, labels)
    assert (success_margin(linear_detector.evidence(attacked), linear_detector.thresholds, labels) <= 0).all()
    assert (length(attacked - images) < 1.25 * activation.abs() / linear_detector.weight.detach().norm()).all()


def test_an_image_that_fails_does_not_change_the_others(linear_detector):
    class Blind:
        """Sees nothing where the first pixel is large."""

        thresholds = linear_detector.thresholds

        def evidence(self, images):
            factor = torch.where(images[:, :1, 0, 0] > 0.9, math.nan, 1.0)
            return Evidence(*(part * factor for part in linear_detector.evidence(images)))

    images, labels, _ = mid_box(linear_detector, count=6)
    hopeless = images[:1].clone()
    hopeless[:, 0, 0, 0] = 0.99
    alone = QUICK(Blind(), images, labels)
    together = QUICK(Blind(), torch.cat([hopeless, images]), torch.cat([labels[:1], labels]))
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-4)
    assert torch.equal(together[:1], hopeless)
    assert (alone != images).flatten(1).any(dim=1).all()


def test_results_do_not_depend_on_the_batch(linear_detector):
    images, labels, _ = mid_box(linear_detector, count=10)
    images[::2] = images[::2] * 0.3  # so that images need very different c
    together = QUICK(linear_detector, images, labels)
    torch.testing.assert_close(
        replace(QUICK, batch_size=3)(linear_detector, images, labels), together, rtol=0, atol=1e-4
    )


def test_a_longer_search_is_never_farther(small_guard):
    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = small_guard(images).argmax(1)
    distances = []
    for searches in (2, 4):
        attacked = replace(QUICK, searches=searches)(small_guard, images, labels)
        success = success_margin(small_guard.evidence(attacked), small_guard.thresholds, labels) <= 0
        distances.append(length(attacked - images).masked_fill(~success, torch.inf))
        assert attacked.min() >= 0
        assert attacked.max() <= 1
    assert (distances[1] <= distances[0]).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_detector_and_the_caller_are_left_alone(small_guard, context):
    small_guard.train()
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    expected = QUICK(small_guard, images, labels)
    with context():
        attacked = QUICK(small_guard, images.clone(), labels.clone())
    assert torch.equal(attacked, expected)
    assert not attacked.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in small_guard.parameters())
    assert all(module.training for module in small_guard.encoder.modules())


def test_doubles_stay_doubles(linear_detector):
    detector = linear_detector.double()
    detector.thresholds = detector.thresholds.double()
    images, labels, activation = mid_box(detector, count=4)
    attacked = CarliniWagner(searches=4, steps=100)(detector, images, labels)
    assert attacked.dtype == torch.float64
    assert (length(attacked - images) < 1.25 * activation.abs() / detector.weight.detach().norm()).all()


def test_no_images_are_no_problem(small_guard):
    assert QUICK(small_guard, torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.long)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"eps": -1},
        {"searches": 0},
        {"steps": 0},
        {"learning_rate": 0},
        {"initial_c": 0},
        {"confidence": -0.1},
        {"confidence": math.nan},
        {"objective": "x"},
        {"batch_size": 0},
    ],
)
def test_options_are_checked_at_once(options):
    with pytest.raises(ConfigurationError, match="expected"):
        CarliniWagner(**options)


def test_it_prints_and_compares():
    attack = CarliniWagner(eps=2.0, confidence=1.0)
    assert eval(repr(attack)) == attack
    assert (attack.norm, attack.eps, CarliniWagner().eps) == ("l2", 2.0, None)
