import math

import pytest
import torch
from clusterguard import GaussianClusters
from clusterguard.errors import ConfigurationError, InputError
from hypothesis import given, settings
from hypothesis import strategies as st


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
    torch.testing.assert_close(clusters.adversarial_squared_distance(z), z.square().sum(dim=1))


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
