from itertools import combinations, product

import pytest
import torch
from clusterguard.attacks import get_norm
from hypothesis import given
from hypothesis import strategies as st
from norm_problems import assert_inside, each_convex_norm, each_dtype, each_norm, problems, property_test, radii


def tolerance(candidates):
    return 16 * torch.finfo(candidates.dtype).eps * float(candidates.abs().max().clamp_min(1))


def reference(name, images, candidates, eps):
    """Bisection on the multiplier in float64: slow, and nothing in common with the sort-based method."""
    x, c, eps = images.double().flatten(1), candidates.double().flatten(1), eps.double()[:, None]
    boxed = c.clamp(0, 1)
    cap, beyond = (boxed - x).abs(), (c - boxed).abs()
    if name == "linf":
        return (x + (c - x).clamp(-eps, eps)).clamp(0, 1).reshape(images.shape)

    def lengths(multiplier):
        if name == "l1":
            return (beyond - multiplier + cap).clamp_min(0).minimum(cap)
        return ((beyond + cap) / multiplier).minimum(cap)

    def size(y):
        return y.sum(1, keepdim=True) if name == "l1" else y.square().sum(1, keepdim=True).sqrt()

    low = torch.full_like(eps, 0.0 if name == "l1" else 1.0)
    high = (beyond + cap).amax(1, keepdim=True) * (1 if name == "l1" else 1e30) + 1
    for _ in range(300):
        middle = (low + high) / 2 if name == "l1" else (low * high).sqrt()
        outside = size(lengths(middle)) > eps
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    y = torch.where(size(cap) <= eps, cap, lengths(high))
    return (x + (boxed - x).sign() * y).reshape(images.shape)


def random_feasible(name, images, eps, generator):
    """Points of ball ∩ box that owe nothing to `project`: clamping to the box only shortens a step."""
    steps = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    if torch.rand((), generator=generator) < 0.5:
        steps = steps * (torch.rand(images.shape, generator=generator) < 0.3)
    size = get_norm(name).size(steps).clamp_min(1e-30)
    length = eps * torch.rand(len(images), generator=generator, dtype=images.dtype).sqrt()
    return (images + steps * (length / size)[:, None, None, None]).clamp(0, 1)


# Projection


@each_norm
@property_test()
@given(problem=problems())
def test_projection_is_inside_idempotent_and_keeps_signs(name, problem):
    images, candidates, share = problem
    norm, eps = get_norm(name), radii(name, images, share)
    projected = norm.project(images, candidates, eps)
    assert_inside(norm, images, projected, eps)
    assert torch.equal(norm.project(images, projected, eps), projected)
    moved, wanted = (projected - images).sign(), (candidates - images).sign()
    assert bool(((moved == wanted) | (moved == 0)).all())


@each_convex_norm
@property_test()
@given(problem=problems())
def test_projection_equals_a_slow_reference(name, problem):
    images, candidates, share = problem
    eps = radii(name, images, share)
    projected = get_norm(name).project(images, candidates, eps)
    expected = reference(name, images, candidates, eps)
    # Where the box takes nearly the whole radius, the rest hangs on the radius's last digits.
    slack = reference(name, images, candidates, eps * (1 - 16 * torch.finfo(images.dtype).eps)) - expected
    assert bool(((projected - expected).abs() <= slack.abs() + tolerance(candidates)).all())


@each_convex_norm
@property_test()
@given(problem=problems(), seed=st.integers(0, 2**32))
def test_no_feasible_point_is_closer(name, problem, seed):
    # For a convex set, p is the projection of c iff (c - p)·(q - p) <= 0 for every q in the set.
    images, candidates, share = problem
    eps, generator = radii(name, images, share), torch.Generator().manual_seed(seed)
    projected = get_norm(name).project(images, candidates, eps)
    left = (candidates - projected).double()
    scale = candidates.abs().max().clamp_min(1) * images[0].numel()
    for _ in range(20):
        other = random_feasible(name, images, eps, generator)
        gain = (left * (other - projected).double()).flatten(1).sum(1)
        assert float(gain.max()) <= tolerance(candidates) * float(scale)


@property_test(60)
@given(problem=problems(max_pixels=6))
def test_l0_projection_is_the_best_of_all_subsets(problem):
    images, candidates, share = problem
    eps = radii("l0", images, share)
    projected = get_norm("l0").project(images, candidates, eps)
    lengths = (projected - candidates).double().flatten(1).norm(dim=1)
    boxed, pixels = candidates.clamp(0, 1), images.shape[2] * images.shape[3]
    for i in range(len(images)):
        for chosen in combinations(range(pixels), min(int(eps[i]), pixels)):
            mask = torch.zeros(pixels, dtype=torch.bool)
            mask[list(chosen)] = True
            point = torch.where(mask.reshape(images.shape[2:]), boxed[i], images[i])
            distance = float((point - candidates[i]).double().norm())
            assert float(lengths[i]) <= distance * (1 + 1e-6) + 1e-12


@property_test(60)
@given(problem=problems())
def test_patch_projection_is_the_best_of_all_places(problem):
    images, candidates, share = problem
    eps = radii("patch", images, share)
    projected = get_norm("patch").project(images, candidates, eps)
    lengths = (projected - candidates).double().flatten(1).norm(dim=1)
    boxed = candidates.clamp(0, 1)
    for i, side in enumerate(eps.int().tolist()):
        for row, column in product(range(images.shape[2]), range(images.shape[3])):
            point = images[i].clone()
            inside = (..., slice(row, row + side), slice(column, column + side))
            point[inside] = boxed[i][inside]
            distance = float((point - candidates[i]).double().norm())
            assert float(lengths[i]) <= distance * (1 + 1e-5) + 1e-6


@each_norm
@property_test(20)
@given(problem=problems())
def test_candidates_inside_are_returned_bit_by_bit(name, problem):
    images, candidates, _ = problem
    candidates = candidates.clamp(0, 1)
    norm = get_norm(name)
    eps = norm.size(candidates - images)
    assert torch.equal(norm.project(images, candidates, eps), candidates)


@each_norm
@property_test(20)
@given(problem=problems())
def test_eps_of_zero_returns_the_images(name, problem):
    images, candidates, _ = problem
    assert torch.equal(get_norm(name).project(images, candidates, 0.0), images)


@each_norm
@pytest.mark.parametrize("eps", [1e4, float("inf")])
def test_a_ball_that_covers_the_box_only_clamps(name, eps):
    images, candidates = torch.rand(3, 2, 4, 4), 3 * torch.randn(3, 2, 4, 4)
    assert torch.equal(get_norm(name).project(images, candidates, eps), candidates.clamp(0, 1))


@each_norm
def test_each_image_has_its_own_radius_and_does_not_see_the_others(name):
    images, candidates = torch.rand(5, 3, 4, 4), 2 * torch.randn(5, 3, 4, 4)
    norm, eps = get_norm(name), torch.tensor([0.0, 0.3, 1.0, 2.0, 500.0])
    together = norm.project(images, candidates, eps)
    for i in range(5):
        alone = norm.project(images[i : i + 1], candidates[i : i + 1], float(eps[i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)


@each_convex_norm
@each_dtype
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("kind", ["gaussian", "equal", "signs", "few far", "outwards", "farthest stuck"])
def test_far_candidates(name, dtype, scale, kind):
    torch.manual_seed(0)
    images = torch.rand(6, 3, 16, 16, dtype=dtype)
    images[:2] = images[:2].round()
    steps = torch.randn_like(images)
    if kind == "equal":
        steps = torch.ones_like(steps)
    elif kind == "signs":
        steps = steps.sign()
    elif kind == "few far":
        steps = torch.where(torch.rand_like(steps) < 0.002, steps, steps / scale)
    elif kind == "outwards":
        steps = torch.where(images > 0.5, steps.abs(), -steps.abs())
    elif kind == "farthest stuck":
        images[..., ::2] = 1
        steps = torch.where(images == 1, 3.0, 1.0).to(dtype)
    candidates = images + scale * steps
    norm = get_norm(name)
    for share in (0.001, 0.01, 0.2):
        eps = share * norm.size(torch.ones_like(images))
        projected = norm.project(images, candidates, eps)
        assert_inside(norm, images, projected, eps)
        expected = reference(name, images, candidates, eps)
        atol = 1e-3 if dtype == torch.float32 else 1e-8
        torch.testing.assert_close(projected.double(), expected, rtol=0, atol=atol)


@each_norm
def test_infinite_candidates_are_projected_and_nan_stays_visible(name):
    images = torch.full((3, 1, 2, 2), 0.25)
    candidates = images.clone()
    candidates[0, 0, 0] = torch.tensor([torch.inf, -torch.inf])
    candidates[1, 0, 0, 0] = torch.nan
    candidates[2] += 1
    norm = get_norm(name)
    eps = 1.0 if norm.grain else 0.2
    projected = norm.project(images, candidates, eps)
    assert_inside(norm, images[::2], projected[::2], eps)
    assert float((projected - images)[0].abs().sum()) > 0.1
    assert bool(projected[1, 0, 0, 0].isnan())


@each_convex_norm
@each_dtype
@pytest.mark.parametrize("step", [0.2, 2.0])
def test_candidates_a_rounding_error_outside(name, dtype, step):
    torch.manual_seed(0)
    images = torch.rand(16, 3, 32, 32, dtype=dtype)
    candidates = images + step * torch.randn_like(images)
    boxed, norm, unit = candidates.clamp(0, 1), get_norm(name), torch.finfo(dtype).eps
    eps = norm.size(boxed - images) * (1 - unit * torch.arange(16, dtype=dtype))
    projected = norm.project(images, candidates, eps)
    assert_inside(norm, images, projected, eps)
    torch.testing.assert_close(projected, boxed, rtol=0, atol=1000 * unit)


@each_norm
def test_images_that_overshoot_the_box_by_rounding_come_back_into_it(name):
    images = torch.tensor([-3e-8, 1 + 1.2e-7, 1 + 1e-5, 0.5]).reshape(1, 1, 2, 2)
    projected = get_norm(name).project(images, images + 0.1, 1e-7)
    assert bool(((projected >= 0) & (projected <= 1)).all())


@each_convex_norm
def test_float32_accuracy_on_cifar_sized_images(name):
    torch.manual_seed(0)
    images = (torch.rand(8, 3, 32, 32) * 255).round() / 255
    norm, eps = get_norm(name), {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}[name]
    for step in (2.0, 0.05):
        candidates = images + step * torch.randn_like(images)
        projected = norm.project(images, candidates, eps)
        exact = norm.size(projected.double() - images.double())
        assert bool((exact <= eps * (1 + 1e-6)).all())
        assert bool((exact >= eps * (1 - 1e-5)).all())
        expected = reference(name, images, candidates, torch.full((8,), eps))
        torch.testing.assert_close(projected.double(), expected, rtol=0, atol=2e-6)


def test_l2_projection_gives_to_free_coordinates_what_the_box_takes():
    images = torch.tensor([[[[0.0, 0.5]]]], dtype=torch.float64)
    candidates = images + torch.tensor([[[[-4.0, 4.0]]]], dtype=torch.float64)
    projected = get_norm("l2").project(images, candidates, 0.4)
    torch.testing.assert_close(projected, images + torch.tensor([[[[0.0, 0.4]]]], dtype=torch.float64))


def test_l1_projection_by_hand():
    images = torch.tensor([[[[0.9, 0.5, 0.5]]]], dtype=torch.float64)
    candidates = images + torch.tensor([[[[1.0, -0.4, 0.1]]]], dtype=torch.float64)
    # λ = .2: min(1 - .2, cap .1) + (.4 - .2) + 0 = .3
    projected = get_norm("l1").project(images, candidates, 0.3)
    expected = torch.tensor([[[[1.0, 0.3, 0.5]]]], dtype=torch.float64)
    torch.testing.assert_close(projected, expected)


def test_l0_counts_a_pixel_once_and_breaks_ties_without_exceeding_eps():
    images, candidates = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    norm = get_norm("l0")
    assert norm.size(candidates).tolist() == [4]
    assert norm.size(norm.project(images, candidates, 3)).tolist() == [3]
    assert norm.size(norm.project(images, candidates, 2.9)).tolist() == [2]


@each_norm
def test_layout_of_the_memory_does_not_matter(name):
    images, candidates = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    norm = get_norm(name)
    expected = norm.project(images, candidates, 1.0)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(norm.project(channels_last, candidates, 1.0), expected)
    expanded = norm.random_start(images[:1].expand(4, -1, -1, -1), 1.0)
    assert len(expanded.unique(dim=0)) == 4


@pytest.mark.parametrize("name", ["linf", "l2", "l1", "l0"])
@given(data=st.data())
def test_a_prepared_projection_is_the_projection(name, data):
    seed, eps = data.draw(st.integers(0, 1000)), data.draw(st.sampled_from([0.0, 1e-8, 0.1, 0.3, 1.0, 3.0]))
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 2, 4, 4, generator=generator).pow(data.draw(st.sampled_from([1, 12])))
    candidates = images + torch.randn(images.shape, generator=generator) * data.draw(st.sampled_from([1e-7, 0.3, 4.0]))
    norm, radius = get_norm(name), float(round(eps)) if name == "l0" else eps
    projected, expected = norm.projection(images, radius)(candidates), norm.project(images, candidates, radius)
    torch.testing.assert_close(projected, expected, rtol=0, atol=2e-7)
    assert (norm.size(projected - images) <= radius).all()
    assert ((projected >= 0) & (projected <= 1)).all()
    assert torch.equal(norm.projection(images, radius)(projected), projected)
