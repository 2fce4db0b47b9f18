"""How far a linear function can fall in a ball of each norm, on which certificates rest."""

import pytest
import torch
from clusterguard.attacks import NORMS, Norm
from clusterguard.errors import ConfigurationError
from hypothesis import given
from hypothesis import strategies as st

RADII = {"linf": 0.15, "l2": 0.7, "l1": 1.8, "l0": 3, "patch": 2}


def scene(seed, channels=2):
    """Images of which many pixels are exactly 0 or 1, and slopes of which some are 0."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, channels, 3, 4, generator=generator, dtype=torch.float64).mul(2).sub(0.5).clamp(0, 1)
    slopes = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return images, slopes * (torch.rand(images.shape, generator=generator) > 0.2)


@pytest.mark.parametrize("name", NORMS)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1.5))
def test_no_point_of_the_ball_is_lower_and_one_is_as_low(name, seed, share):
    norm, (images, slopes) = NORMS[name], scene(seed)
    eps = norm.round_radius(share * RADII[name]) if share * RADII[name] >= norm.grain else 0.0
    falls = norm.largest_fall(slopes, images, eps)
    # The point that is nearest to one far down the slope is the lowest point of the ball.
    lowest = norm.project(images, images - 1e6 * slopes, eps)
    reached = (slopes * (images - lowest)).flatten(1).sum(dim=1)
    assert (reached <= falls + 1e-9).all()
    if name != "l2":  # its bound does not see where the box cuts the ball, beyond values without any room
        assert reached.tolist() == pytest.approx(falls.tolist(), rel=1e-3, abs=1e-4)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inside = norm.project(images, noise, eps)
    assert ((slopes * (images - inside)).flatten(1).sum(dim=1) <= falls + 1e-9).all()


@pytest.mark.parametrize("name", NORMS)
def test_each_image_may_have_its_own_radius(name):
    norm, (images, slopes) = NORMS[name], scene(0)
    radii = torch.tensor([0.0, 1.0, 2.0, 1.0], dtype=torch.float64) * (1 if norm.grain else RADII[name] / 2)
    together = norm.largest_fall(slopes, images, radii)
    alone = [norm.largest_fall(slopes[i : i + 1], images[i : i + 1], float(radii[i])).item() for i in range(4)]
    assert together.tolist() == pytest.approx(alone)
    assert together[0] == 0


def test_l2_is_exact_where_the_box_cuts_nothing():
    norm, (_, slopes) = NORMS["l2"], scene(1)
    images = torch.full_like(slopes, 0.5)
    expected = 0.3 * slopes.flatten(1).norm(dim=1)
    assert norm.largest_fall(slopes, images, 0.3).tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("norm", NORMS)
def test_falls_of_tiny_and_huge_slopes_are_in_proportion(norm):
    slopes = torch.tensor([[[[1.0, -2.0], [3.0, 0.5]]]], dtype=torch.float64)
    images = torch.full_like(slopes, 0.4)
    fall = NORMS[norm].largest_fall(slopes, images, 0.5 if norm == "linf" else 1.0).item()
    for scale in (1e-200, 1e200):
        scaled = NORMS[norm].largest_fall(scale * slopes, images, 0.5 if norm == "linf" else 1.0).item()
        assert scaled == pytest.approx(scale * fall, rel=1e-12, abs=0)


def test_a_norm_without_certificates_says_so():
    with pytest.raises(ConfigurationError, match="defines no largest_fall"):
        Norm.largest_fall(NORMS["l1"], torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 1.0)
