"""Images, candidates and radii for every norm, and what every answer must be."""

import pytest
import torch
from clusterguard.attacks import NORMS, get_norm
from hypothesis import settings
from hypothesis import strategies as st

NAMES = tuple(NORMS)
CONVEX = tuple(name for name, norm in NORMS.items() if not norm.grain)
DTYPES = (torch.float32, torch.float64)

each_norm = pytest.mark.parametrize("name", NAMES)
each_convex_norm = pytest.mark.parametrize("name", CONVEX)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def property_test(max_examples=40):
    return settings(max_examples=max_examples, deadline=None)


@st.composite
def problems(draw, max_pixels=12, scales=(0.05, 0.5, 3.0, 30.0)):
    """Images, candidates and a share of the box for each; values may be few, so that they tie."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, max_pixels // 3)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    images = torch.rand(shape, generator=generator, dtype=dtype)
    levels = draw(st.sampled_from([None, 1, 2, 255]))  # 1: corners of the box; 255: 8-bit images
    if levels is not None:
        images = (images * levels).round() / levels
    steps = torch.randn(shape, generator=generator, dtype=dtype)
    if draw(st.booleans()):
        steps = steps.round() / 2
    candidates = images + draw(st.sampled_from(scales)) * steps
    share = torch.rand(shape[0], generator=generator, dtype=dtype) ** 2
    return images, candidates, share


def radii(name, images, share):
    """From 0 to about the whole box, in the units of the norm."""
    full = get_norm(name).size(torch.ones_like(images)) * 1.1
    return (full * share).floor() if get_norm(name).grain else full * share


def assert_inside(norm, images, points, eps):
    assert points.dtype == images.dtype
    assert points.shape == images.shape
    assert bool((norm.size(points - images) <= eps).all())
    assert bool(((points >= 0) & (points <= 1)).all())
