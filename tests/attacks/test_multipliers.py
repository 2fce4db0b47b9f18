from unittest.mock import patch

import pytest
import torch
from clusterguard.attacks import _multipliers as multipliers
from clusterguard.attacks import get_norm
from hypothesis import given, settings
from hypothesis import strategies as st

EACH = pytest.mark.parametrize("name", ["l2", "l1"])


@st.composite
def problems(draw):
    """Images, candidates near and far, and radii (B,); values may tie, or span many orders of magnitude."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    shape = draw(st.integers(1, 4)), 1, 1, draw(st.sampled_from([1, 2, 7, 40, 300]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    images, steps, spread = (torch.rand(shape, generator=generator, dtype=dtype) for _ in range(3))
    levels = draw(st.sampled_from([None, 1, 255]))
    images = images if levels is None else (images * levels).round() / levels
    steps = 2 * steps - 1
    steps = {
        "any": steps,
        "ties": steps.sign(),
        "few": steps * (spread < 0.1),
        "spread": steps * 10 ** (9 * spread - 6),
    }[draw(st.sampled_from(["any", "ties", "few", "spread"]))]
    candidates = images + draw(st.sampled_from([1e-6, 0.05, 1.0, 30.0, 1e6, 1e30])) * steps
    share = draw(st.sampled_from([0.0, 1e-6, 0.01, 0.2, 1.0])) * torch.rand(shape[0], generator=generator, dtype=dtype)
    return images, candidates, share


def project(name, images, candidates, eps, *, searched):
    with patch.object(multipliers, "_SEARCHED_FROM", 0 if searched else torch.inf):
        return get_norm(name).project(images, candidates, eps)


@EACH
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_searching_finds_what_sorting_finds(name, problem):
    images, candidates, share = problem
    norm, rounding = get_norm(name), torch.finfo(images.dtype).eps
    eps = share * norm.size(torch.ones_like(images))
    searched, by_sorting = (project(name, images, candidates, eps, searched=way) for way in (True, False))
    assert (norm.size(searched - images) <= eps).all()
    assert ((searched >= 0) & (searched <= 1)).all()
    assert torch.equal(project(name, images, searched, eps, searched=True), searched)
    # Near a radius that the box nearly fills, the solution hangs on the radius's last digits.
    slack = project(name, images, candidates, eps * (1 - 32 * rounding), searched=False) - by_sorting
    coarse = 32 * rounding * candidates.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(1, 1e15)
    assert ((searched - by_sorting).abs() <= slack.abs() + coarse).all()


@pytest.mark.parametrize("searched", [True, False])
@EACH
@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_an_image_alone_gets_the_same_bits_as_in_a_batch(name, searched, problem):
    images, candidates, share = problem
    eps = share * get_norm(name).size(torch.ones_like(images))
    together = project(name, images, candidates, eps, searched=searched)
    for i in range(len(images)):
        alone = project(name, images[i : i + 1], candidates[i : i + 1], eps[i : i + 1], searched=searched)
        assert torch.equal(alone, together[i : i + 1])


@EACH
def test_rows_that_differ_in_what_they_take_keep_their_bits(name):
    torch.manual_seed(0)
    images = torch.rand(12, 3, 16, 16)
    scales = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 0.3, 1.0, 3.0, 30.0, 1e3, 1e6, 1e14, torch.nan])
    candidates = images + scales[:, None, None, None] * torch.randn_like(images)
    eps = get_norm(name).size(torch.ones_like(images)) * 0.01
    together = get_norm(name).project(images, candidates, eps)
    for i in range(11):
        alone = get_norm(name).project(images[i : i + 1], candidates[i : i + 1], eps[i : i + 1])
        assert torch.equal(alone, together[i : i + 1])
    assert together[11].isnan().all()


@EACH
def test_the_search_goes_into_one_graph_when_compiled(name):
    torch.manual_seed(0)
    images = torch.rand(9, 3, 16, 16)
    scales = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 0.3, 1.0, 30.0, 1e6, 1e14])
    candidates = images + scales[:, None, None, None] * torch.randn_like(images)
    project, eps = get_norm(name).project, 3.0
    compiled = torch.compile(project, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images, candidates, eps), project(images, candidates, eps))


@EACH
def test_a_candidate_with_a_gradient_is_projected_without_one(name):
    images, candidates = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16, requires_grad=True)
    assert not get_norm(name).project(images, candidates, 0.1).requires_grad
