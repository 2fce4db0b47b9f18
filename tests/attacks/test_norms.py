import math

import pytest
import torch
from clusterguard.attacks import Norm, get_norm
from clusterguard.attacks._norm_base import mask_largest
from clusterguard.attacks._norms import dense_l1_direction
from clusterguard.errors import ConfigurationError, InputError
from hypothesis import given
from hypothesis import strategies as st
from norm_problems import NAMES, assert_inside, each_convex_norm, each_dtype, each_norm, problems, property_test, radii

# Direction


@each_norm
@each_dtype
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e30])
def test_direction_is_a_unit_step_at_every_scale(name, dtype, scale):
    torch.manual_seed(0)
    gradient = torch.randn(4, 3, 5, 5, dtype=dtype)
    norm = get_norm("l1" if get_norm(name).grain else name)
    direction = get_norm(name).direction(gradient * scale)
    assert direction.dtype == dtype
    torch.testing.assert_close(norm.size(direction), torch.ones(4, dtype=dtype))
    torch.testing.assert_close(direction, get_norm(name).direction(gradient))


@each_convex_norm
@property_test(20)
@given(seed=st.integers(0, 2**32), ties=st.booleans())
def test_direction_rises_fastest_of_all_unit_steps(name, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(3, 2, 2, 3, generator=generator, dtype=torch.float64)
    gradient = gradient.round() if ties else gradient
    norm = get_norm(name)
    best = (gradient * norm.direction(gradient)).flatten(1).sum(1)
    for _ in range(50):
        other = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        other = other * (torch.rand(gradient.shape, generator=generator) < 0.5)
        other = other / norm.size(other).clamp_min(1e-30)[:, None, None, None]
        assert bool(((gradient * other).flatten(1).sum(1) <= best + 1e-12).all())


@each_norm
def test_a_zero_gradient_gives_a_zero_step(name):
    gradient = torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])
    direction = get_norm(name).direction(gradient)
    assert not direction[0].any()
    assert bool(direction[1].any())
    assert bool(direction.isfinite().all())


def test_l1_direction_changes_as_many_coordinates_as_asked():
    gradient = torch.tensor([[3.0, -4.0, 1.0, 0.5], [3.0, -4.0, 1.0, 0.5], [0.0, 0.0, -1.0, 0.0]])
    direction = get_norm("l1").direction(gradient.reshape(3, 1, 2, 2), sparsity=torch.tensor([1, 2, 3]))
    expected = torch.tensor([[0, -1, 0, 0], [0.5, -0.5, 0, 0], [0, 0, -1, 0]])
    torch.testing.assert_close(direction.flatten(1), expected)
    everywhere = get_norm("l1").direction(gradient[:2].reshape(2, 1, 2, 2), sparsity=4)
    torch.testing.assert_close(everywhere.flatten(1), gradient[:2].sign() / 4)


def test_dense_l1_direction_is_the_gradient_over_its_l1_norm():
    gradient = torch.tensor([[[[3.0, -1.0]]], [[[0.0, 0.0]]]])
    expected = torch.tensor([[[[0.75, -0.25]]], [[[0.0, 0.0]]]])
    torch.testing.assert_close(dense_l1_direction(gradient * 1e-30), expected)
    torch.testing.assert_close(get_norm("l0").direction(gradient), expected)


# Random starts


@each_norm
@property_test(20)
@given(problem=problems(), seed=st.integers(0, 2**32))
def test_random_start_is_inside_and_reproducible(name, problem, seed):
    images, _, share = problem
    norm, eps = get_norm(name), radii(name, images, share)
    first, second = (norm.random_start(images, eps, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert_inside(norm, images, first, eps)
    assert torch.equal(first, second)
    assert torch.equal(norm.random_start(images, 0.0), images)


@each_norm
def test_random_starts_differ_between_examples_coordinates_and_seeds(name):
    images = torch.full((8, 3, 6, 6), 0.5)
    norm = get_norm(name)
    eps = {"l0": 10.0, "patch": 3.0}.get(name, 0.3)
    starts = norm.random_start(images, eps, torch.Generator().manual_seed(0))
    assert len(starts.unique(dim=0)) == 8
    assert len(starts[0].flatten().unique()) == (3 if norm.grain else 108)
    assert not torch.equal(starts, norm.random_start(images, eps, torch.Generator().manual_seed(1)))
    assert not torch.equal(norm.random_start(images, eps), norm.random_start(images, eps))


@pytest.mark.parametrize("name", ["l2", "l1"])
def test_random_starts_fill_the_ball_evenly(name):
    images, eps = torch.full((4000, 1, 1, 3), 0.5, dtype=torch.float64), 0.25
    starts = get_norm(name).random_start(images, eps, torch.Generator().manual_seed(0))
    volume = (get_norm(name).size(starts - images) / eps) ** 3  # share of the ball closer to the image
    quantiles = volume.quantile(torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    torch.testing.assert_close(quantiles, torch.linspace(0.1, 0.9, 9, dtype=torch.float64), rtol=0, atol=0.03)
    assert float((starts - images).mean(0).abs().max()) < 0.01


def test_linf_random_starts_fill_the_cut_box_evenly():
    images = torch.tensor([0.0, 0.5, 0.95]).expand(4000, 1, 1, 3)
    starts = get_norm("linf").random_start(images, 0.1, torch.Generator().manual_seed(0)).flatten(1)
    torch.testing.assert_close(starts.mean(0), torch.tensor([0.05, 0.5, 0.925]), rtol=0, atol=0.005)


def test_l0_random_starts_take_every_pixel_and_corner_alike():
    images = torch.full((3000, 2, 2, 3), 0.5)
    starts = get_norm("l0").random_start(images, 2, torch.Generator().manual_seed(0))
    assert get_norm("l0").size(starts - images).unique().tolist() == [2]
    assert starts.unique().tolist() == [0, 0.5, 1]
    changed = (starts != 0.5).float().mean(0)
    torch.testing.assert_close(changed, torch.full((2, 2, 3), 1 / 3), rtol=0, atol=0.03)
    assert float((starts[starts != 0.5].mean() - 0.5).abs()) < 0.02


# What every norm promises


@each_norm
def test_nothing_waits_for_the_device(name):
    # A meta tensor has no values: whatever asks for one, or branches on one, raises.
    images = torch.empty(4, 3, 5, 5, device="meta")
    norm, eps = get_norm(name), torch.empty(4, device="meta")
    directions = norm.direction(images, sparsity=eps)
    for point in (norm.project(images, images, eps), directions, norm.random_start(images, eps)):
        assert point.shape == images.shape
        assert point.device.type == "meta"
    assert norm.size(images).shape == (4,)


@each_norm
def test_an_empty_batch_stays_empty(name):
    images, norm = torch.empty(0, 3, 4, 4), get_norm(name)
    assert norm.project(images, images, 1.0).shape == images.shape
    assert norm.direction(images).shape == images.shape
    assert norm.random_start(images, 1.0).shape == images.shape
    assert norm.size(images).shape == (0,)


@each_norm
def test_sizes(name):
    perturbations = torch.tensor([[[[3.0, 0.0]], [[-4.0, 0.0]]], [[[0.0, 0.0]], [[0.0, 0.0]]]])
    expected = {"linf": 4.0, "l2": 5.0, "l1": 7.0, "l0": 1.0, "patch": 1.0}[name]
    torch.testing.assert_close(get_norm(name).size(perturbations), torch.tensor([expected, 0.0]))


def test_names():
    for name, cls in zip(NAMES, ("LInf", "L2", "L1", "L0", "Patch"), strict=True):
        assert isinstance(get_norm(name), Norm)
        assert type(get_norm(name)).__name__ == cls
    with pytest.raises(ConfigurationError, match=r"linf, l2, l1, l0, patch, got 'l3'"):
        get_norm("l3")


@each_norm
def test_bad_input_is_refused(name):
    images, norm = torch.rand(2, 1, 2, 2), get_norm(name)
    with pytest.raises(InputError, match=r"candidates of shape \(2, 1, 2, 2\)"):
        norm.project(images, images[:1], 1.0)
    with pytest.raises(InputError, match=r"images of shape \(B, C, H, W\)"):
        norm.project(images[0], images[0], 1.0)
    with pytest.raises(InputError, match=r"shape \(2,\), got shape \(3,\)"):
        norm.project(images, images, torch.ones(3))
    with pytest.raises(ConfigurationError, match="at least 0, got -1"):
        norm.project(images, images, -1.0)


@pytest.mark.gpu
@each_norm
def test_the_gpu_agrees(name):
    images, candidates = torch.rand(50, 3, 32, 32), torch.randn(50, 3, 32, 32)
    norm, eps = get_norm(name), {"linf": 0.03, "l2": 0.5, "l1": 12.0, "l0": 20, "patch": 5}[name]
    on_gpu = norm.project(images.cuda(), candidates.cuda(), eps)
    torch.testing.assert_close(on_gpu.cpu(), norm.project(images, candidates, eps), rtol=0, atol=1e-5)
    assert_inside(norm, images.cuda(), on_gpu, eps)
    assert_inside(norm, images.cuda(), norm.random_start(images.cuda(), eps), eps)


@each_norm
def test_no_change_of_that_size_raises_a_linear_function_by_more_than_the_slope(name):
    norm, gradient = get_norm(name), torch.randn(8, 3, 4, 4)
    changes = torch.randn(8, 3, 4, 4).clamp(-1, 1) * (torch.rand(8, 3, 4, 4) < 0.3)
    rise = (gradient * changes).flatten(1).sum(dim=1)
    # For l0 the bound holds a channel at a time: three in a pixel.
    bound = norm.slope(gradient) * norm.size(changes) * (3 if norm.grain else 1)
    assert (rise <= bound * (1 + 1e-5)).all()


@each_convex_norm
def test_the_slope_is_that_of_the_steepest_step(name):
    norm, gradient = get_norm(name), torch.randn(8, 3, 4, 4)
    torch.testing.assert_close(norm.slope(gradient), Norm.slope(norm, gradient))


@each_norm
def test_distances_are_the_sizes_of_all_differences(name):
    norm, images, others = get_norm(name), torch.rand(5, 3, 4, 4), torch.rand(7, 3, 4, 4)
    expected = torch.stack([norm.size(image - others) for image in images])
    torch.testing.assert_close(norm.distances(images, others), expected)
    assert norm.distances(images, others[:0]).shape == (5, 0)


@each_norm
@given(st.floats(0.01, 500))
def test_a_rounded_radius_is_one_that_the_norm_can_have(name, eps):
    norm = get_norm(name)
    rounded = norm.round_radius(eps)
    assert rounded == eps if not norm.grain else rounded == max(1, math.floor(eps))


@each_norm
def test_steps_of_equal_length_are_a_share_of_the_radius_unless_the_norm_is_sparse(name):
    lengths = {"linf": 0.05, "l2": 0.05, "l1": 0.5, "l0": 3 * 4 * 5, "patch": 3 * 4 * 5}
    assert get_norm(name).step_size(0.5, (3, 4, 5), share=0.1) == pytest.approx(lengths[name])


# Proximal points


@each_convex_norm
@each_dtype
def test_shrinking_minimises_distance_and_price_together(name, dtype):
    generator = torch.Generator().manual_seed(0)
    norm, given_ = get_norm(name), torch.randn(40, 2, 3, 3, generator=generator, dtype=dtype)
    amount = torch.rand(40, generator=generator, dtype=dtype) * norm.slope(given_)
    point = norm.shrink(given_, amount)

    def cost(candidates):
        return (candidates - given_).square().flatten(1).sum(dim=1) / 2 + amount * norm.size(candidates)

    others = [point * factor for factor in (0, 0.9, 0.99, 1.01, 1.1)]
    others += [point + scale * torch.randn(point.shape, generator=generator, dtype=dtype) for scale in (1e-3, 0.1, 1)]
    for other in others:
        assert (cost(point) <= cost(other) + 1e-4).all()
    assert (norm.size(point) < norm.size(given_)).all()


@each_convex_norm
def test_a_high_price_leaves_nothing_and_no_price_leaves_everything(name):
    norm, perturbations = get_norm(name), torch.randn(4, 1, 3, 3)
    assert not norm.shrink(perturbations, 1e3).any()
    torch.testing.assert_close(norm.shrink(perturbations, 0.0), perturbations)
    assert not norm.shrink(torch.zeros(2, 1, 3, 3), torch.tensor([0.0, 1.0])).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@given(levels=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_the_largest_scores_are_masked_and_the_first_ones_on_ties(dtype, levels, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels + 1, (6, columns), generator=generator).to(dtype)
    scores[0] = torch.inf
    count = torch.tensor([[0.0], [1.0], [2.7], [columns], [columns + 3.0], [torch.inf]]).to(dtype)
    order = scores.double().sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(1, columns + 1)
    expected = torch.zeros(6, columns, dtype=torch.bool).scatter(1, order, places <= count.double())
    assert mask_largest(scores, count).equal(expected)
    assert mask_largest(scores[:0], count[:0]).shape == (0, columns)
