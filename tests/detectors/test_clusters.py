import math

import pytest
import torch
from clusterguard.detectors import GaussianClusters
from clusterguard.errors import ConfigurationError, InputError
from clusterguard.training import Opposite, Outside
from clusterguard.training._losses import class_cross_entropy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional


def naive_squared_distances(clusters: GaussianClusters, representations: torch.Tensor) -> torch.Tensor:
    """The definition, one (B, K, m) tensor of differences in float64."""
    return (representations.double()[:, None] - clusters.centers.double()).square().sum(dim=2)


@given(
    st.integers(2, 12),
    st.integers(1, 4),
    st.integers(0, 5),
    st.sampled_from([0.5, 10.0, 64.0]),
    st.integers(0, 99),
)
def test_distances_match_the_definition(classes, block, batch, scale, seed):
    clusters = GaussianClusters(classes, classes * block, center_scale=scale)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, classes * block, generator=generator) * scale
    torch.testing.assert_close(
        clusters.squared_distances(z).double(),
        naive_squared_distances(clusters, z),
        rtol=1e-5,
        atol=1e-5 * scale**2,
    )
    torch.testing.assert_close(clusters.adversarial_energy(z), z.square().sum(dim=1))


@pytest.mark.parametrize("classes", [1000, 21_841])
def test_distances_at_the_size_of_imagenet(classes):
    clusters = GaussianClusters(classes)
    z = torch.randn(2, classes, generator=torch.Generator().manual_seed(0))
    z[0, 7] += 10
    columns = torch.tensor([0, 7, classes - 1])
    centers = torch.zeros(3, classes, dtype=torch.float64)
    centers[torch.arange(3), columns] = 10
    expected = (z.double()[:, None] - centers).square().sum(dim=2)
    torch.testing.assert_close(clusters.squared_distances(z)[:, columns].double(), expected, rtol=1e-5, atol=1e-3)
    assert clusters.logits(z)[0].argmax() == 7


def test_near_a_centre_the_distance_is_precise():
    clusters = GaussianClusters(10)
    z = clusters.centers[3:4].clone()
    z[0, 3] += 1e-3
    torch.testing.assert_close(clusters.distances(z)[0, 3].item(), 1e-3, rtol=1e-3, atol=0)


@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 99))
def test_logits_are_log_likelihoods_up_to_a_constant_per_row(classes, block, seed):
    clusters = GaussianClusters(classes, classes * block)
    z = torch.randn(4, classes * block, generator=torch.Generator().manual_seed(seed)) * 5
    difference = clusters.logits(z) - clusters.log_likelihood(z)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(clusters.posterior(z), clusters.log_likelihood(z).softmax(1), rtol=1e-2, atol=1e-4)


def test_log_likelihood_matches_torchs_own_gaussian():
    clusters = GaussianClusters(3, 6)
    z = torch.randn(5, 6)
    for index, center in enumerate(clusters.centers):
        gaussian = torch.distributions.MultivariateNormal(center, torch.eye(6))
        torch.testing.assert_close(clusters.log_likelihood(z)[:, index], gaussian.log_prob(z), rtol=1e-4, atol=1e-3)


def test_centres_are_as_far_apart_as_stated():
    clusters = GaussianClusters(4, 12, center_scale=10.0)
    distances = torch.cdist(clusters.centers, clusters.centers)
    off_diagonal = distances[~torch.eye(4, dtype=torch.bool)]
    torch.testing.assert_close(off_diagonal, torch.full((12,), 10 * math.sqrt(6)))
    torch.testing.assert_close(clusters.centers.norm(dim=1), torch.full((4,), 10 * math.sqrt(3)))


def test_the_gradient_is_finite_even_at_a_centre():
    clusters = GaussianClusters(4)
    z = clusters.centers.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(clusters.distances(z).sum(), z)
    assert gradient.isfinite().all()


@settings(deadline=None)
@given(st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_representations_are_measured_in_float32(dtype):
    clusters = GaussianClusters(10)
    z = (torch.randn(3, 10) * 10).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = clusters.distances(z)
    assert distances.dtype == torch.float32
    torch.testing.assert_close(
        distances.double(), naive_squared_distances(clusters, z.float()).sqrt(), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(("classes", "dim"), [(3, 7), (3, 2), (3, 0), (1, 4)])
def test_dimensions_that_do_not_fit_are_refused(classes, dim):
    with pytest.raises(ConfigurationError, match="expected"):
        GaussianClusters(classes, dim)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_cannot_work_is_refused(scale):
    with pytest.raises(ConfigurationError, match="center_scale"):
        GaussianClusters(3, center_scale=scale)


def test_representations_of_the_wrong_width_are_refused():
    with pytest.raises(InputError, match=r"representations of shape \(B, 3\), got .* \(2, 4\)"):
        GaussianClusters(3).distances(torch.zeros(2, 4))


def scattered(classes: int, block: int, seed: int) -> tuple[GaussianClusters, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A mixture, six representations, their classes, and the wrong labels they got."""
    generator = torch.Generator().manual_seed(seed)
    clusters = GaussianClusters(classes, classes * block)
    z = 8 * torch.randn(6, classes * block, generator=generator)
    labels = torch.randint(classes, (6,), generator=generator)
    return clusters, z, labels, (labels + 1) % classes


@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 99))
def test_the_opposite_of_a_class_is_its_centre_across_the_origin(classes, block, seed):
    clusters, z, labels, predicted = scattered(classes, block, seed)
    infinite = torch.full((classes,), torch.inf)
    energy = Opposite().energy(clusters, z, labels, predicted, infinite)
    torch.testing.assert_close(energy, (z + clusters.centers[labels]).square().sum(dim=1), rtol=1e-4, atol=1e-3)
    there = Opposite().energy(clusters, -clusters.centers[labels], labels, predicted, infinite)
    assert not there.any()


@given(
    st.integers(2, 9),
    st.integers(1, 3),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.5, 5.0, 60.0, math.inf]),
)
def test_one_step_down_the_hinge_leaves_the_accepted_region_and_goes_nowhere_else(classes, block, seed, margin, tau):
    clusters, z, labels, predicted = scattered(classes, block, seed)
    thresholds = torch.full((classes,), tau)
    z = z.double().requires_grad_()
    packing_radius = 0.5 * (clusters.centers[0] - clusters.centers[1]).norm().item()
    edge = (1 + margin) * (packing_radius if tau == math.inf else tau)

    def distance(z):
        return clusters.distances(z).gather(1, predicted[:, None]).squeeze(1)

    energy = Outside(margin).energy(clusters, z, labels, predicted, thresholds)
    assert energy.isfinite().all()
    (gradient,) = torch.autograd.grad(0.5 * energy.sum(), z)
    stepped = z.detach() - gradient
    inside = distance(z.detach()) < edge
    close = {"rtol": 1e-5, "atol": 1e-5}  # thresholds are float32
    torch.testing.assert_close(energy[inside], (edge - distance(z)[inside]).square(), **close)
    assert torch.equal(stepped[~inside], z.detach()[~inside])
    # A step of length 1 down ½(r − d)² ends at distance r, straight away from the centre.
    torch.testing.assert_close(distance(stepped)[inside], torch.full_like(energy[inside], edge), **close)
    centres = clusters.centers[predicted].double()
    away, before = stepped - centres, z.detach() - centres
    torch.testing.assert_close(functional.cosine_similarity(away, before), torch.ones(6).double())


def test_at_a_centre_the_hinge_has_a_finite_gradient():
    clusters = GaussianClusters(3)
    z = clusters.centers[:1].clone().requires_grad_()
    thresholds, label, predicted = torch.ones(3), torch.tensor([1]), torch.tensor([0])
    energy = Outside().energy(clusters, z, label, predicted, thresholds)
    assert energy.item() == pytest.approx(1.21)
    assert torch.autograd.grad(energy.sum(), z)[0].isfinite().all()


@given(st.integers(2, 9), st.integers(1, 3), st.integers(0, 99), st.sampled_from([1.0, 10.0, 100.0]))
def test_cross_entropy_is_of_the_tempered_posterior(classes, block, seed, temperature):
    clusters, z, labels, _ = scattered(classes, block, seed)
    shares = torch.tensor([0.0, 1.0, 0.25, 0.0, 1.0, 0.0])
    counts = torch.tensor([3.75, 2.25])
    loss = class_cross_entropy(clusters, z, labels, shares, counts, temperature=temperature)
    log_p = (-0.5 * clusters.squared_distances(z).double() / temperature).log_softmax(dim=1)
    expected = -((1 - shares) * log_p.gather(1, labels[:, None]).squeeze(1)).sum() / 3.75
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
