"""What is certified holds for every image in the ball."""

import copy
import math
import re

import pytest
import torch
from certifiable import guard_of, points_of
from clusterguard import ClusterGuard, certified_success_rate, certify, decide, success_margin
from clusterguard.certification import Interval, bound, certified_radius
from clusterguard.errors import ConfigurationError, InputError, NotCalibratedError
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


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


@settings(max_examples=examples(150))
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


@settings(max_examples=examples(100))
@given(seed=st.integers(0, 10_000))
def test_without_a_radius_the_certificate_is_the_decision(seed):
    guard = guard_of(seed, dtype=torch.float32)
    images, labels = torch.rand(20, 1, 2, 2), torch.arange(20) % 3
    proved, evidence = certify(guard, images, labels, eps=0.0), guard.evidence(images)
    margins, verdict = success_margin(evidence, guard.thresholds, labels), decide(evidence, guard.thresholds)
    assert (margins > 0)[proved.is_secure].all()
    assert proved.is_secure[(margins > 1e-2) & (verdict.labels == labels)].all()
    assert not (proved.is_kept & ((verdict.labels != labels) | verdict.is_adversarial)).any()


@settings(max_examples=examples(100))
@given(seed=st.integers(0, 10_000), largest=st.sampled_from([0.05, 1.0]))
def test_the_certified_radius_is_where_certificates_end(seed, largest):
    guard = guard_of(seed, dtype=torch.float32)
    images = torch.rand(10, 1, 2, 2)
    labels = guard.detect(images).labels
    radius = certified_radius(guard, images, labels, largest=largest, tolerance=1e-4)
    proved = radius > 0
    assert certify(guard, images, labels, eps=radius).is_secure[proved].all()
    ends = proved & (radius < largest)
    assert not certify(guard, images, labels, eps=(radius + 2e-4).clamp_max(1)).is_secure[ends].any()
    assert ((radius >= 0) & (radius <= largest)).all()


def test_a_search_finer_than_floats_ends():
    guard = guard_of(dtype=torch.float32)
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    fine, coarse = (certified_radius(guard, images, labels, tolerance=tolerance) for tolerance in (1e-300, 1e-6))
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
    proved = certify(guard, torch.rand(2, 1, 2, 2).double(), torch.tensor([0, 1]), eps=1.0)
    assert not (proved.is_secure | proved.is_kept).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_of_another_dtype_than_the_guards_are_refused(dtype):
    """Their rounding would be another than what the bounds allow for."""
    guard = guard_of(dtype=torch.float32).to(dtype)
    images, labels = torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    other = torch.float64 if dtype == torch.float32 else torch.float32
    assert certify(guard, images.to(dtype), labels, eps=0.1).is_secure.shape == (2,)
    for prove in (certify, certified_radius):
        options = {"eps": 0.1} if prove is certify else {}
        with pytest.raises(InputError, match=f"expected images in {dtype}, like the guard, got {other}"):
            prove(guard, images.to(other), labels, **options)


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


@pytest.mark.parametrize("eps", [8, torch.tensor([0.1, 8.0])])
def test_a_radius_of_8_bit_pixels_is_refused_with_what_to_do(eps):
    guard, images, labels = guard_of(dtype=torch.float32), torch.rand(2, 1, 2, 2), torch.tensor([0, 1])
    with pytest.raises(InputError, match=re.escape("eps=8 / 255")):
        certify(guard, images, labels, eps=eps)
    with pytest.raises(InputError, match=re.escape("eps=8 / 255")):
        certified_success_rate(guard, iter(()), eps=8)  # before any batch is asked for
    with pytest.raises(ConfigurationError, match=re.escape("eps=8 / 255")):
        certified_radius(guard, images, labels, largest=8.0)


def test_without_thresholds_there_is_nothing_to_prove():
    guard = guard_of(dtype=torch.float32)
    guard.reset_calibration()
    with pytest.raises(NotCalibratedError):
        certify(guard, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), eps=0.1)
    with pytest.raises(NotCalibratedError):
        certified_radius(guard, torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize("options", [{"largest": 0.0}, {"tolerance": -1.0}, {"largest": math.inf}])
def test_a_search_without_end_is_refused(options):
    with pytest.raises(ConfigurationError, match="positive"):
        certified_radius(guard_of(dtype=torch.float32), torch.rand(2, 1, 2, 2), torch.tensor([0, 1]), **options)
